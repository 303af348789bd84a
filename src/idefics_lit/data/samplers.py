"""Distributed samplers: which questions each rank reads, in which order.

Both yield `SampledIndex` tuples, which `Subset` takes as an index. Nothing depends on the state of a random generator:
a resumed run reads the same questions.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from idefics_lit.data.example import Examples
from idefics_lit.data.grouping import group_by_page
from idefics_lit.data.subset import SampledIndex


class TrainSampler(DistributedSampler[Any]):
    """Shuffled questions of one rank, a function of the seed and the epoch alone.

    An optimizer step has the same questions on any number of ranks, each of which has an equal share of it. It is a
    `DistributedSampler` in single-device runs too, because Lightning calls its ``set_epoch``.

    Args:
        examples: the split.
        questions_per_page: up to this many questions about one page follow one another. A batch whose size is a
            multiple of this number splits few pages, whose images would be encoded in two batches.
        share: the questions of this rank in an optimizer step.
        kwargs: see `torch.utils.data.DistributedSampler`.
    """

    def __init__(self, examples: Examples, questions_per_page: int, share: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(examples, **kwargs)
        self.page_ids, self.answers = examples.page_ids, examples.answers
        self.questions_per_page, self.share = questions_per_page, share

    @cached_property
    def order_settings(self) -> dict[str, Any]:
        """Everything that decides the order of all epochs: options by name, and a digest of the questions."""
        identities = map(self.dataset.identity, range(len(self.page_ids)))  # type: ignore[attr-defined]
        # Pages are numbered here, because a page key may be a path of this machine.
        first_questions: dict[Any, int] = {}
        pages = [first_questions.setdefault(page_id, index) for index, page_id in enumerate(self.page_ids)]
        digest = short_digest(zip(pages, map(list, self.answers), identities, strict=True))
        return {
            # In earlier versions the ranks' steps were others than those of one process.
            "trainer.devices": ranks if (ranks := self.num_replicas) == 1 else f"{ranks} that share each step",
            "data.seed": self.seed,
            # Earlier versions didn't combine the groups of several pages into blocks.
            "data.questions_per_page": 1 if (size := self.questions_per_page) == 1 else f"{size} in blocks",
            "training questions": f"{len(self.page_ids)} ({digest})",
        }

    def __iter__(self) -> Iterator[SampledIndex]:
        """Yield this rank's questions."""
        size, ranks = self.questions_per_page, self.num_replicas
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.page_ids), generator=generator).tolist()
        groups = sorted(group_by_page((self.page_ids[index] for index in shuffled), size))
        order = [shuffled[position] for position in chain.from_iterable(_blocks(groups, size))]
        padded = islice(cycle(order), self.total_size)
        samples = [(index, self.epoch, position >= len(order)) for position, index in enumerate(padded)]
        step_size = self.share * ranks
        for start in range(0, len(samples), step_size):
            step = samples[start : start + step_size]
            share = len(step) // ranks  # less than `self.share` in an incomplete last step
            yield from step[self.rank * share : (self.rank + 1) * share]


def _blocks(groups: Iterable[list[int]], size: int) -> list[list[int]]:
    """Combine groups into blocks of ``size`` members, each at the position of its first member.

    Groups that fill no block with others are split over blocks of their own. Only the last block may be incomplete.

    Args:
        groups: groups of at most ``size`` positions.
        size: the size of a block.
    """
    blocks: list[list[int]] = []
    with_room: list[deque[list[int]]] = [deque() for _ in range(size + 1)]  # incomplete blocks, by their free places
    for group in groups:
        room = next((room for room in range(len(group), size + 1) if with_room[room]), None)
        block = with_room[room].popleft() if room is not None else []
        block += group
        (with_room[size - len(block)] if len(block) < size else blocks).append(block)
    rest = [*chain.from_iterable(sorted(chain.from_iterable(with_room)))]
    complete = len(rest) - len(rest) % size
    blocks += [rest[start : start + size] for start in range(0, complete, size)]
    return [*sorted(blocks), rest[complete:]]


class EvalSampler(DistributedSampler[Any]):
    """Questions of one rank for evaluation, ordered so that the rows of a batch are of similar length.

    Questions about one page follow one another, and so do pages with equally many questions. Pages are sorted within
    windows, so that every part of the order is like the split as a whole. Each rank has a contiguous share; the last
    rank's is padded with questions that other ranks have too.

    Args:
        examples: the split.
        window_size: the least number of questions in a window.
        kwargs: see `torch.utils.data.DistributedSampler`.
    """

    def __init__(self, examples: Examples, window_size: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(examples, shuffle=False, **kwargs)
        windows: list[list[list[int]]] = [[]]
        for page in group_by_page(examples.page_ids):
            if sum(map(len, windows[-1])) >= window_size:
                windows.append([])
            windows[-1].append(page)
        self.order = [index for window in windows for page in sorted(window, key=len) for index in page]

    def __iter__(self) -> Iterator[SampledIndex]:
        """Yield this rank's questions."""
        start, count = self.rank * self.num_samples, len(self.order)
        return ((self.order[i % count], None, i >= count) for i in range(start, start + self.num_samples))


def short_digest(values: Iterable[Any]) -> str:
    """Return eight hexadecimal digits of a hash of a sequence of numbers and strings."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{value!r}\n".encode())
    return digest.hexdigest()[:8]
