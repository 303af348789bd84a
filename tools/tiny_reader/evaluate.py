"""How well the reader reads pages it has never seen: quickly during training, through `generate` at the end."""

import time
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from forward import PackedReader
from pages_store import TRAINED_FAMILIES, PageStore
from tasks import QUESTIONS, messages
from transformers import AutoModelForImageTextToText, AutoProcessor

from idefics_lit.data.pages import FAMILIES, Page, Question, render_page

NEW_TOKENS = 64


class HeldOut(NamedTuple):
    """A set of held-out pages: what `render_page` makes of ``seeds`` of ``families``."""

    name: str
    families: tuple[str, ...]
    words: Literal["known", "unseen"]
    font: Literal["known", "unseen"]


class Score(NamedTuple):
    """A row of the table: share of answers right to the letter, mean ANLS, pages."""

    exact: float
    anls: float
    pages: int


SETS = [
    HeldOut("unseen pages", TRAINED_FAMILIES, "known", "known"),
    HeldOut("unseen font", TRAINED_FAMILIES, "known", "unseen"),
    HeldOut("unseen words", TRAINED_FAMILIES, "unseen", "known"),
    *[HeldOut(f"{family} (never trained on)", (family,), "known", "known") for family in FAMILIES[3:]],
]


def render_held_out(kind: HeldOut, seeds: range) -> list[Page]:
    """The pages of a set, its families in turn."""
    return [render_page(family, seed, words=kind.words, font=kind.font) for seed in seeds for family in kind.families]


@torch.no_grad()
def teacher_forced(reader: PackedReader, store: PageStore, slots: int, batch: int) -> tuple[float, float]:
    """Shares of questions, and of reading tasks, whose answer is right in every token given the ones before."""
    shares = []
    for name, first in (("questions", 0), ("readings", QUESTIONS)):
        right = asked = 0
        for begin in range(0, store.size, batch):
            rows = torch.arange(begin, min(begin + batch, store.size), device=store.device)
            count = store.on_device[name][rows].long()[:, None]
            slot = torch.arange(slots, device=store.device)
            made = store.batch(rows, first + slot % count)
            hits = (reader(made.image, made.ids).logits.argmax(-1) == made.target) | (made.target < 0)
            right += int((hits.all(-1) & (slot < count)).sum())
            asked += int((slot < count).sum())
        shares.append(right / max(asked, 1))
    return shares[0], shares[1]


def anls(prediction: str, answers: list[str]) -> float:
    """1 - edit distance / longer length to the nearest answer, 0 below one half; case and extra spaces don't count."""

    def similarity(a: str, b: str) -> float:
        previous = list(range(len(b) + 1))
        for i, x in enumerate(a, start=1):
            row = [i]
            for j, y in enumerate(b, start=1):
                row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
            previous = row
        score = 1 - previous[-1] / max(len(a), len(b), 1)
        return score if score >= 0.5 else 0.0

    first, *others = (" ".join(text.lower().split()) for text in (prediction, *answers))
    return max(similarity(first, other) for other in others)


@torch.no_grad()
def answer(
    folder: Path, pages: dict[str, list[Page]], device: torch.device, batch: int, until: float
) -> dict[str, list[str]]:
    """Answers to one question of each page, by plain transformers from a saved folder; stops at the time ``until``."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    answers: dict[str, list[str]] = {name: [] for name in pages}
    chunks = [(name, begin) for name, some in pages.items() for begin in range(0, len(some), batch)]
    for name, begin in chunks:
        if time.monotonic() > until:
            print(f"WARNING: out of time, {name} stops at {len(answers[name])} of {len(pages[name])} pages", flush=True)
            break
        some = pages[name][begin : begin + batch]
        prompts = [
            processor.apply_chat_template(messages(question_of(page).text), add_generation_prompt=True) for page in some
        ]
        inputs = processor(text=prompts, images=[[page.image] for page in some], return_tensors="pt", padding=True)
        output = model.generate(**inputs.to(device), max_new_tokens=NEW_TOKENS)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers[name] += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def question_of(page: Page) -> Question:
    """The question that a page is tested with: its questions are in random order."""
    return page.questions[0]


def table(pages: dict[str, list[Page]], answers: dict[str, list[str]]) -> dict[str, Score]:
    """Scores of every set, and of each trained family within the first set."""
    rows = {}
    for name, some in pages.items():
        pairs = list(zip(some, answers[name], strict=False))
        rows[name] = _score(pairs)
        if name == SETS[0].name:
            for family in TRAINED_FAMILIES:
                rows[f"  {family}"] = _score([(page, text) for page, text in pairs if page.family == family])
    return {name: score for name, score in rows.items() if score.pages}


def _score(pairs: list[tuple[Page, str]]) -> Score:
    asked = [(question_of(page).answers, text) for page, text in pairs]
    count = max(len(asked), 1)
    exact = sum(text in right for right, text in asked) / count
    return Score(exact, sum(anls(text, right) for right, text in asked) / count, len(asked))
