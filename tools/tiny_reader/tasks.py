"""The reader's tasks on a page as token ids: answer the page's questions, and transcribe its lines.

A task consists of the tokens after the image: a space (which the processor inserts), the question,
`<end_of_utterance>`, "Assistant:", the answer, `<end_of_utterance>`. The tokens before are shared by a page's tasks.
"""

import random
from typing import Any, NamedTuple

from idefics_lit.data.pages import Page
from idefics_lit.model.tiny import BOS, END_OF_UTTERANCE, FAKE, IMAGE, LATENTS, tiny_processor

QUESTIONS, READINGS = 12, 12  # the largest number of tasks of each kind per page
SLOT = 80  # tokens of a task, padding included; longer tasks are dropped
CHARACTERS = 95  # printable ASCII, 0 for none


class Task(NamedTuple):
    """A task's token ids, the start of its answer, and the page's glyph index of each answer character (-1: none)."""

    ids: list[int]
    start: int
    glyphs: list[int]


def _ascii_ids() -> dict[str, int]:
    tokenizer = tiny_processor().tokenizer
    # After another character, since the tokenizer drops a space at the beginning.
    return {char: tokenizer.encode(f"a{char}", add_special_tokens=False)[1] for char in map(chr, (10, *range(32, 127)))}


ID_OF = _ascii_ids()


def encode(text: str) -> list[int]:
    """Tokenize a text, faster than the tokenizer; raises KeyError if it isn't ASCII."""
    return [ID_OF[char] for char in text]


PREFIX = [BOS, *encode("User: Answer briefly."), FAKE, *[IMAGE] * LATENTS, FAKE]
"""The prompt up to the question."""


def messages(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    """Return the conversation of a question, and of its answer if there is one."""
    user = [{"type": "text", "text": "Answer briefly."}, {"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": user}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def question_tasks(page: Page, rng: random.Random) -> list[Task]:
    """Return a random sample of the page's questions."""
    text = " ".join(page.lines)
    glyph_at = _glyph_indices(text)
    tasks = []
    for question in page.questions:
        answer = question.answers[0]
        start = text.find(answer)
        is_unique = start >= 0 and text.find(answer, start + 1) < 0
        tasks.append((question.text, answer, glyph_at[start : start + len(answer)] if is_unique else []))
    return _pack(tasks, QUESTIONS, rng)


def reading_tasks(page: Page, rng: random.Random) -> list[Task]:
    """Return tasks to transcribe a line that is given by its number or its first characters."""
    glyph_at = _glyph_indices(" ".join(page.lines))
    tasks, start = [], 0
    for number, line in enumerate(page.lines, start=1):
        glyphs = glyph_at[start : start + len(line)]
        start += len(line) + 1
        tasks.append((f"Read line {number}.", line, glyphs))
        prefix = line[: rng.randint(3, 7)]
        if sum(other.startswith(prefix) for other in page.lines) == 1:
            tasks.append((f'Read "{prefix}"', line, glyphs))
    return _pack(tasks, READINGS, rng)


def _glyph_indices(text: str) -> list[int]:
    """Return the glyph index of each character of a page's text; -1 for spaces."""
    indices, count = [], 0
    for char in text:
        indices.append(-1 if char == " " else count)
        count += char != " "
    return indices


def _pack(tasks: list[tuple[str, str, list[int]]], max_tasks: int, rng: random.Random) -> list[Task]:
    packed = []
    for question, answer, glyphs in tasks:
        if not (question + answer).isascii():
            continue
        prompt = [*encode(question), END_OF_UTTERANCE, *encode("\nAssistant:")]
        ids = [*prompt, *encode(f" {answer}"), END_OF_UTTERANCE]
        if len(ids) <= SLOT:
            packed.append(Task(ids, len(prompt), [-1, *glyphs]))
    return rng.sample(packed, min(max_tasks, len(packed)))
