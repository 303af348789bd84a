"""What is asked of the reader on a page, as token ids: the page's questions, and reading its lines aloud.

A task is packed as what follows the image in the prompt: a space (the processor puts it there), the question,
`<end_of_utterance>`, "Assistant:", the answer, `<end_of_utterance>`. What stands before is packed once a page.
"""

import random
from typing import Any, NamedTuple

from idefics_lit.data.pages import Page
from idefics_lit.model.tiny import BOS, END_OF_UTTERANCE, FAKE, IMAGE, LATENTS, tiny_processor

QUESTIONS, READINGS = 12, 12  # tasks of each kind kept per page
SLOT = 80  # tokens of a task, padding included; the few longer ones are left out
CHARACTERS = 95  # printable ASCII, 0 for none


class Task(NamedTuple):
    """A task's ids, where its answer begins and the glyph of the page that each answer character is (-1: none)."""

    ids: list[int]
    start: int
    glyphs: list[int]


def _ascii_ids() -> dict[str, int]:
    tokenizer = tiny_processor().tokenizer
    return {char: tokenizer.encode(char, add_special_tokens=False)[0] for char in map(chr, (10, *range(32, 127)))}


ID_OF = _ascii_ids()


def encode(text: str) -> list[int]:
    """The tokenizer's ids of a text, many times as fast; KeyError for anything but ASCII."""
    return [ID_OF[char] for char in text]


PREFIX = [BOS, *encode("User: Answer briefly."), FAKE, *[IMAGE] * LATENTS, FAKE]
"""The prompt up to the question."""


def messages(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    """The conversation that the reader is trained on."""
    user = [{"type": "text", "text": "Answer briefly."}, {"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": user}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def question_tasks(page: Page, rng: random.Random) -> list[Task]:
    """Some of the page's questions."""
    text = " ".join(page.lines)
    glyph_at = _glyph_indices(text)
    tasks = []
    for question in page.questions:
        answer = question.answers[0]
        at = text.find(answer)
        known = at >= 0 and text.find(answer, at + 1) < 0
        tasks.append((question.text, answer, glyph_at[at : at + len(answer)] if known else []))
    return _pack(tasks, QUESTIONS, rng)


def reading_tasks(page: Page, rng: random.Random) -> list[Task]:
    """Read a line, named by its number or by its beginning: many characters to learn from, little to understand."""
    glyph_at = _glyph_indices(" ".join(page.lines))
    tasks, at = [], 0
    for number, line in enumerate(page.lines, start=1):
        where = glyph_at[at : at + len(line)]
        at += len(line) + 1
        tasks.append((f"Read line {number}.", line, where))
        begin = line[: rng.randint(3, 7)]
        if sum(other.startswith(begin) for other in page.lines) == 1:
            tasks.append((f'Read "{begin}"', line, where))
    return _pack(tasks, READINGS, rng)


def _glyph_indices(text: str) -> list[int]:
    """Number the characters of a page's text that are not spaces."""
    indices, count = [], 0
    for char in text:
        indices.append(-1 if char == " " else count)
        count += char != " "
    return indices


def _pack(tasks: list[tuple[str, str, list[int]]], most: int, rng: random.Random) -> list[Task]:
    packed = []
    for question, answer, glyphs in tasks:
        if not (question + answer).isascii():
            continue
        prompt = [*encode(f" {question}"), END_OF_UTTERANCE, *encode("\nAssistant:")]
        ids = [*prompt, *encode(f" {answer}"), END_OF_UTTERANCE]
        if len(ids) <= SLOT:
            packed.append(Task(ids, len(prompt), [-1, *glyphs]))
    return rng.sample(packed, min(most, len(packed)))
