"""Subsets of a split: the first questions, the questions about held-out pages, or a random sample of pages."""

import random
from collections.abc import Sequence

from idefics_lit.data.example import Example, Examples
from idefics_lit.data.grouping import group_by_page, group_by_shared_pages
from idefics_lit.errors import InputError

SampledIndex = tuple[int, int | None, bool]
"""What the samplers yield: a question's index, the epoch, and whether it pads this rank's share."""


class Subset(Examples):
    """Chosen questions of a split, in the given order.

    Args:
        examples: the split.
        indices: the index of each chosen question.
    """

    def __init__(self, examples: Examples, indices: Sequence[int]) -> None:
        self.examples, self.indices = examples, indices
        self.page_ids = [examples.page_ids[i] for i in indices]
        self.answers = [examples.answers[i] for i in indices]
        self.faults = {i: examples.faults[index] for i, index in enumerate(indices) if index in examples.faults}

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.indices)

    def __getitem__(self, sampled: int | SampledIndex) -> Example:
        """Return a question by its index, or by what a sampler yields for it."""
        index, epoch, is_padding = sampled if isinstance(sampled, tuple) else (sampled, None, False)
        example = self.examples[self.indices[index]]
        example.epoch, example.page_id, example.index = epoch, self.page_ids[index], index
        example.is_padding = is_padding
        return example

    def source(self, index: int) -> str:
        """Return the name of a question's row, for error messages."""
        return self.examples.source(self.indices[index])

    def identity(self, index: int) -> object:
        """Return a question's id and text."""
        return self.examples.identity(self.indices[index])


def hold_out_pages(examples: Examples, fraction: float, seed: int, name: str) -> set[int]:
    """Choose the questions about a random fraction of the pages, for validation.

    Questions that share a page stay together, even if they share only one of several.

    Args:
        examples: the training split.
        fraction: the fraction of its pages to hold out, between 0 and 1.
        seed: decides which pages are chosen.
        name: names the data in the error message.

    Returns:
        The indices of the chosen questions.

    Raises:
        InputError: when no question would be left to train on.
    """
    groups = group_by_shared_pages(examples.page_ids)
    page_counts = [len({examples.page_ids[i] for i in group}) for group in groups]
    page_count = sum(page_counts)
    remaining = max(1, round(fraction * page_count))
    rng = random.Random(seed)
    order = rng.sample(range(len(groups)), min(remaining, len(groups)))
    order += rng.sample(rest := sorted({*range(len(groups))} - {*order}), len(rest))
    chosen: list[int] = []
    for number in order:
        if page_counts[number] <= remaining:
            chosen.append(number)
            remaining -= page_counts[number]
    chosen = chosen or [min(order, key=page_counts.__getitem__)]
    if len(chosen) == len(groups):
        apart = f", in {len(groups)} groups without a page in common," if len(groups) < page_count else ""
        raise InputError(
            f"{name}: its {page_count} pages{apart} are too few to hold out {fraction} of them for validation: "
            f"name a split with --data.val_split"
        )
    return {i for number in chosen for i in groups[number]}


def sample_pages(examples: Examples, count: int, seed: int) -> Subset:
    """Return ``count`` questions about pages drawn at random, on as few pages as possible, in the split's order."""
    pages = group_by_page(examples.page_ids)
    random.Random(seed).shuffle(pages)
    drawn = [index for page in pages for index in page]
    return Subset(examples, sorted(drawn[:count]))
