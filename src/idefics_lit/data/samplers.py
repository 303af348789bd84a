"""Which questions of a split are visited, and in which order by which rank."""

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from idefics_lit.data.example import Example, Examples


def connected(page_ids: Sequence[tuple[Hashable, ...]]) -> list[list[int]]:
    """Group the questions' numbers so that no two groups have a page in common."""
    parents: dict[Hashable, Hashable] = {}

    def root(page: Hashable) -> Hashable:
        while (parent := parents.setdefault(page, page)) != page:
            parents[page] = page = parents[parent]
        return page

    for pages in page_ids:
        for page in pages[1:]:
            parents[root(page)] = root(pages[0])
    groups: dict[Hashable, list[int]] = {}
    for index, pages in enumerate(page_ids):
        groups.setdefault(root(pages[0]), []).append(index)
    return list(groups.values())


class Subset(Examples):
    """Some of the questions of a split, each visited in an epoch."""

    def __init__(self, examples: Examples, indices: Sequence[int]) -> None:
        self.examples, self.indices = examples, indices
        self.page_ids = [examples.page_ids[i] for i in indices]
        self.answers = [examples.answers[i] for i in indices]
        self.faults = {i: examples.faults[row] for i, row in enumerate(indices) if row in examples.faults}

    def __len__(self) -> int:
        """Count them."""
        return len(self.indices)

    def __getitem__(self, visit: int | tuple[int, int | None, bool]) -> Example:
        """Return a question: its number alone, or with the epoch, and whether another rank has it too."""
        index, epoch, repeated = visit if isinstance(visit, tuple) else (visit, None, False)
        example = self.examples[self.indices[index]]
        example.epoch, example.page_id, example.index = epoch, self.page_ids[index], index
        example.is_padding = repeated
        return example

    def source(self, index: int) -> str:
        """Name a question's row for error messages."""
        return self.examples.source(self.indices[index])


class TrainSampler(DistributedSampler[Any]):
    """Shuffled questions of a rank, each with its epoch, so that nothing drawn for it depends on a generator's state.

    A `DistributedSampler` in single-device runs too: the order is a function of (seed, epoch), which Lightning sets.
    With several questions a page, so many of a page follow one another.
    """

    def __init__(self, examples: Examples, questions_per_page: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(examples, **kwargs)
        self.page_ids, self.questions_per_page = examples.page_ids, questions_per_page
        self.answers = examples.answers

    @cached_property
    def decided_by(self) -> dict[str, Any]:
        """What decides the order of all epochs: options by name, and which questions there are, wherever they lie."""
        # By grouping and answers: a page's key may be a path of this machine.
        questions = digest(zip(grouped(self.page_ids), map(list, self.answers), strict=True))
        return {
            "trainer.devices": self.num_replicas,
            "data.seed": self.seed,
            "data.questions_per_page": self.questions_per_page,
            "training questions": f"{len(self.page_ids)} ({questions})",
        }

    def __iter__(self) -> Iterator[Any]:
        """Yield what `Subset` takes."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        groups: list[list[int]] = []
        open_groups: dict[Hashable, list[int]] = {}
        for index in torch.randperm(len(self.page_ids), generator=generator).tolist():
            group = open_groups.get(self.page_ids[index])
            if group is None or len(group) == self.questions_per_page:
                group = open_groups[self.page_ids[index]] = []
                groups.append(group)
            group.append(index)
        filled_up = islice(cycle(chain.from_iterable(groups)), self.total_size)
        order = [(index, self.epoch, place >= len(self.page_ids)) for place, index in enumerate(filled_up)]
        # Ranks take turns by so many questions as a page has; what is left at the end is cut into equal shares.
        whole = len(order) - len(order) % (self.questions_per_page * self.num_replicas)
        runs = [order[i : i + self.questions_per_page] for i in range(0, whole, self.questions_per_page)]
        share = (len(order) - whole) // self.num_replicas
        rest = order[whole + self.rank * share :][:share]
        return iter([*chain.from_iterable(runs[self.rank :: self.num_replicas]), *rest])


def grouped(page_ids: Iterable[Hashable]) -> list[int]:
    """Return which page each question is about, by the place of the page's first question."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(page_id, place) for place, page_id in enumerate(page_ids)]


def digest(values: Iterable[Any]) -> str:
    """Return eight hexadecimal digits that tell one sequence of numbers and texts from another."""
    found = hashlib.sha256()
    for value in values:
        found.update(f"{value!r}\n".encode())
    return found.hexdigest()[:8]


class EvalSampler(DistributedSampler[Any]):
    """Questions on a page behind one another, as pages with as many questions are: a batch's rows are of one length.

    Pages are sorted in windows of so many questions, so that every part of a set is like the whole. A rank's share is
    in one piece; the last rank's is filled up with questions that others have, and says so.
    """

    def __init__(self, examples: Examples, window: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(examples, shuffle=False, **kwargs)
        pages: dict[Hashable, list[int]] = {}
        for index, page in enumerate(examples.page_ids):
            pages.setdefault(page, []).append(index)
        windows: list[list[list[int]]] = [[]]
        for questions in pages.values():
            if sum(map(len, windows[-1])) >= window:
                windows.append([])
            windows[-1].append(questions)
        self.order = [index for some in windows for questions in sorted(some, key=len) for index in questions]

    def __iter__(self) -> Iterator[Any]:
        """Yield what `Subset` takes."""
        start = self.rank * self.num_samples
        return (
            (self.order[i % len(self.order)], None, i >= len(self.order))
            for i in range(start, start + self.num_samples)
        )
