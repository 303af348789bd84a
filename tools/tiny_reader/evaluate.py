"""Evaluate the reader on held-out pages: with teacher forcing during training, with `generate` at the end."""

import time
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from forward import PackedReader
from pages_store import TRAINED_FAMILIES, PageStore
from tasks import QUESTIONS, messages
from transformers import AutoModelForImageTextToText, AutoProcessor

from idefics_lit.data.pages import FAMILIES, Page, Question, render_page
from idefics_lit.metrics import anls

NEW_TOKENS = 64


class HeldOut(NamedTuple):
    """A set of held-out pages: its families and the vocabulary and fonts of `render_page`."""

    name: str
    families: tuple[str, ...]
    words: Literal["known", "unseen"]
    font: Literal["known", "unseen"]


class Score(NamedTuple):
    """A row of the table: the fraction of exactly right answers, the mean ANLS, the number of pages."""

    exact: float
    anls: float
    pages: int


SETS = [
    HeldOut("unseen pages", TRAINED_FAMILIES, "known", "known"),
    HeldOut("unseen font", TRAINED_FAMILIES, "known", "unseen"),
    HeldOut("unseen words", TRAINED_FAMILIES, "unseen", "known"),
    *[HeldOut(f"{family} (never trained on)", (family,), "known", "known") for family in FAMILIES[3:]],
]


def render_held_out(held_out: HeldOut, seeds: range) -> list[Page]:
    """Render the pages of a set, with alternating families."""
    options = {"words": held_out.words, "font": held_out.font}
    return [render_page(family, seed, **options) for seed in seeds for family in held_out.families]


@torch.no_grad()
def teacher_forced(reader: PackedReader, store: PageStore, slots: int, batch: int) -> tuple[float, float]:
    """Return the fractions of questions and of reading tasks with every answer token right, by teacher forcing."""
    fractions = []
    for name, first in (("questions", 0), ("readings", QUESTIONS)):
        right = total = 0
        for begin in range(0, store.size, batch):
            rows = torch.arange(begin, min(begin + batch, store.size), device=store.device)
            count = store.on_device[name][rows].long()[:, None]
            slot = torch.arange(slots, device=store.device)
            tasks = store.batch(rows, first + slot % count)
            hits = (reader(tasks.image, tasks.ids).logits.argmax(-1) == tasks.target) | (tasks.target < 0)
            right += int((hits.all(-1) & (slot < count)).sum())
            total += int((slot < count).sum())
        fractions.append(right / max(total, 1))
    return fractions[0], fractions[1]


@torch.no_grad()
def answer(
    folder: Path, pages: dict[str, list[Page]], device: torch.device, batch: int, until: float
) -> dict[str, list[str]]:
    """Answer one question about each page with transformers' `generate`, from a saved folder, until a point in time."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    answers: dict[str, list[str]] = {name: [] for name in pages}
    chunks = [(name, begin) for name, pages_of_set in pages.items() for begin in range(0, len(pages_of_set), batch)]
    for name, begin in chunks:
        if time.monotonic() > until:
            print(f"WARNING: out of time, {name} stops at {len(answers[name])} of {len(pages[name])} pages", flush=True)
            break
        chunk = pages[name][begin : begin + batch]
        prompts = [
            processor.apply_chat_template(messages(question_of(page).text), add_generation_prompt=True)
            for page in chunk
        ]
        inputs = processor(text=prompts, images=[[page.image] for page in chunk], return_tensors="pt", padding=True)
        output = model.generate(**inputs.to(device), max_new_tokens=NEW_TOKENS)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers[name] += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def question_of(page: Page) -> Question:
    """Return the question that is asked about a page; its questions are in random order."""
    return page.questions[0]


def table(pages: dict[str, list[Page]], answers: dict[str, list[str]]) -> dict[str, Score]:
    """Return the scores of each set, and of each trained family in the first set."""
    rows = {}
    for name, pages_of_set in pages.items():
        pairs = list(zip(pages_of_set, answers[name], strict=False))
        rows[name] = _score(pairs)
        if name == SETS[0].name:
            for family in TRAINED_FAMILIES:
                rows[f"  {family}"] = _score([(page, text) for page, text in pairs if page.family == family])
    return {name: score for name, score in rows.items() if score.pages}


def _score(pairs: list[tuple[Page, str]]) -> Score:
    scored = [(text, question_of(page).answers) for page, text in pairs]
    count = max(len(scored), 1)
    exact = sum(text in references for text, references in scored) / count
    return Score(exact, sum(anls(text, references) for text, references in scored) / count, len(scored))
