"""At which call of a shape to capture a CUDA graph, and how coarsely to pad: seconds lost in a fit, computed.

    python benchmarks/graph_shapes.py

Lost are the time of captures, of calls without a graph, and of padding. Batches are those of `TrainSampler`: 16
questions a step, four a page. Pages are cached after their first visit. Three splits are drawn: the pages of
train_throughput.py, and pages around four formats with few and with many questions. No GPU is needed.
"""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from train_throughput import SIZES

from idefics_lit.data.samplers import TrainSampler

CALLS = (2, 3, 4, 6, 8)
# Assumed seconds, H200: of a capture, and that a call takes longer without a graph (NOTES.md).
CAPTURE = {"vision": 0.2, "connect": 0.15, "prefill": 0.3}
WITHOUT_GRAPH = {"vision": 0.010, "connect": 0.004, "prefill": 0.010}
# Of a step with four pages, whose padding costs in proportion: text model, patch projection, resampler's attention.
TEXT_S, PROJECTION_S, ATTENTION_S = 0.055, 0.012, 0.003
PAGE_TOKENS, QUESTION_TOKENS = 96, (28, 7)  # of a question mean and standard deviation
FORMATS = [(1700, 2200)] * 8 + [(1654, 2339)] * 2 + [(2200, 1700)] * 2 + [(1700, 2800)]
EDGE, PATCH = 980, 14


class Split:
    """What `TrainSampler` reads of a split, with the patches and the tokens of each question."""

    def __init__(self, pages: list[tuple[tuple[int, int], int]]) -> None:
        rng = random.Random(1)
        rows = [(page, patches(*size)) for page, (size, count) in enumerate(pages) for _ in range(count)]
        self.page_ids, self.answers = [(page,) for page, _ in rows], [["answer"]] * len(rows)
        self.patches = [count for _, count in rows]
        self.tokens = [max(12, int(rng.gauss(*QUESTION_TOKENS))) for _ in rows]

    def __len__(self) -> int:
        return len(self.page_ids)


def patches(width: int, height: int) -> int:
    """Return the number of a page's patches, whose longest edge is resized to `EDGE` pixels."""
    shorter = int(EDGE * min(width, height) / max(width, height))
    return (EDGE // PATCH) * ((shorter + shorter % 2) // PATCH)


def splits() -> dict[str, Split]:
    rng = random.Random(0)

    def drawn(questions: list[int]) -> Split:
        pages: list[tuple[tuple[int, int], int]] = []
        while sum(count for _, count in pages) < 1000:
            width, height = rng.choice(FORMATS)
            size = width + rng.randint(-60, 60), height + rng.randint(-60, 60)
            pages.append((size, rng.choice(questions)))
        return Split(pages)

    fixed = Split([(SIZES[number % len(SIZES)], 4) for number in range(160)])
    return {"160 pages": fixed, "1 to 4 questions": drawn([1, 1, 2, 2, 3, 4]), "3 to 6": drawn([3, 4, 4, 4, 4, 6])}


def batches(split: Split, steps: int) -> Iterator[list[list[int]]]:
    """Yield for each step the questions of each page."""
    sampler: Any = TrainSampler(split, 4, 16, seed=0, num_replicas=1, rank=0)  # type: ignore[arg-type]
    for epoch in range(steps):
        sampler.set_epoch(epoch)
        order = iter(sampler)
        while batch := [index for index, *_ in islice(order, 16)]:
            pages: dict[Any, list[int]] = {}
            for index in batch:
                pages.setdefault(split.page_ids[index], []).append(index)
            yield [*pages.values()]


def up(number: int, multiple: int) -> int:
    return number + -number % multiple


def lost(split: Split, steps: int, first_capture: int, token_multiple: int, longest_multiple: int) -> float:
    """Return the seconds that a fit loses.

    Args:
        split: the questions.
        steps: of the fit.
        first_capture: the call of a shape that is captured.
        token_multiple: to which rows are padded.
        longest_multiple: to which the patches of the longest image are padded.
    """
    calls: Counter[Any] = Counter()
    seen: set[Any] = set()
    seconds = 0.0
    for pages in islice(batches(split, steps), steps):
        rows, counts = len(pages), [split.patches[page[0]] for page in pages]
        tokens = max(PAGE_TOKENS + sum(split.tokens[index] for index in page) for page in pages)
        total = up(sum(counts), max(1024, 2 ** sum(counts).bit_length() // 16))
        longest = up(max(counts), longest_multiple)
        shapes: list[tuple[Any, ...]] = [
            ("prefill", rows, up(tokens, token_multiple)),
            ("connect", rows, longest, total),
        ]
        shapes += [("vision", split.patches[page[0]]) for page in pages if split.page_ids[page[0]] not in seen]
        seen |= {split.page_ids[page[0]] for page in pages}
        for shape in shapes:
            calls[shape] += 1
            if calls[shape] <= first_capture:
                seconds += (CAPTURE if calls[shape] == first_capture else WITHOUT_GRAPH)[shape[0]]
        seconds += rows / 4 * TEXT_S * (up(tokens, token_multiple) / up(tokens, 16) - 1)
        seconds += rows / 4 * PROJECTION_S * (total / sum(counts) - 1)
        seconds += rows / 4 * ATTENTION_S * (longest / up(max(counts), 256) - 1)
    return seconds


def main() -> None:
    for name, split in splits().items():
        print(f"\n{name}: {len(split)} questions on {len(set(split.page_ids))} pages; captured at call {CALLS}")
        for steps in (178, 2000):
            for tokens, longest in ((16, 256), (16, 1024), (32, 1024), (64, 1024)):
                seconds = [f"{lost(split, steps, call, tokens, longest):6.1f}" for call in CALLS]
                print(f"{steps:5} steps, tokens to {tokens:2}, longest image to {longest:4}:", *seconds, flush=True)


if __name__ == "__main__":
    main()
