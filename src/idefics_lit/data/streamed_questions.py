"""The order of a stream's questions, of which only a window is in memory.

- Each consumer, that is a worker of a rank, reads its own shards (files), or its own rows if there are fewer shards
  than consumers. It repeats them without end, so that no rank waits for another at the end of an epoch.
- Shards, and the rows in a window, are shuffled by seed, epoch and position alone. A resumed run therefore reads the
  window again and continues at the next question; the content of a shuffle buffer would be lost.
- A consumer's memory is a window of encoded images, however long the stream.
"""

import random
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from idefics_lit.data.example import Example
from idefics_lit.data.grouping import group_by_page
from idefics_lit.data.samplers import short_digest
from idefics_lit.data.sources.streaming import Question, Stream
from idefics_lit.errors import InputError, first_line

SHUFFLE_WINDOW = 500  # rows; a row of Docmatix has half a megabyte


class StreamedQuestions(IterableDataset[Example]):
    """The training questions of one rank, without end; each of its workers reads a part of its own.

    Args:
        stream: the split.
        rank: the rank of this process.
        world_size: the number of processes.
        seed: decides the order, with the epoch.
        questions_per_page: up to this many questions about one page follow one another.
        held_out: keys of pages; questions about any of them are left out.
        skip: yield the `InputError` of a bad row instead of raising it.

    Raises:
        InputError: when a worker has no questions, or a row can't be read and isn't skipped.
    """

    def __init__(
        self,
        stream: Stream,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = 0,
        questions_per_page: int = 1,
        held_out: Collection[Hashable] = (),
        skip: bool = False,
    ) -> None:
        self.stream, self.rank, self.world_size, self.skip = stream, rank, world_size, skip
        self.seed, self.questions_per_page, self.held_out = seed, questions_per_page, frozenset(held_out)
        # place: the position in the epoch's order of shards; window: the index of the window in the shard; source: the
        # state of `datasets` at the start of the window; offset: the position of the next question in the window; rows,
        # absent at the start: a digest of the window's texts.
        self._state: dict[str, Any] = {"epoch": 0, "place": 0, "window": 0, "source": None, "offset": 0}

    @property
    def order_settings(self) -> dict[str, Any]:
        """Everything that decides the order: options by name, the files' number and a digest of held-out pages."""
        return {
            "trainer.devices": self.world_size,
            "data.seed": self.seed,
            "data.questions_per_page": self.questions_per_page,
            "data.source": f"{Path(self.stream.name).name}, {self.stream.dataset.num_shards} files",
            "held-out pages": f"{len(self.held_out)} ({short_digest(sorted(map(str, self.held_out)))})",
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next question."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position at which the next ``iter`` starts."""
        self._state = dict(state)

    def __iter__(self) -> Iterator[Any]:
        """Yield examples, each with its epoch."""
        start = self.state_dict()
        offset, expected_rows = start.pop("offset"), start.pop("rows", None)
        for window_state, questions in self._windows(**start):
            if expected_rows not in (None, window_state["rows"]):
                raise InputError(
                    f"{self.stream.name}: its rows aren't those that the checkpoint's fit has read: resume with the "
                    f"same data, or train anew"
                )
            expected_rows = None
            previous_row: Mapping[str, Any] | None = None
            example: Example | None = None
            for next_offset, question in enumerate(questions[offset:], start=offset + 1):
                self._state = {**window_state, "offset": next_offset}
                # Consecutive questions of a row share its decoded pages.
                same_row = example if question.row is previous_row else None
                try:
                    example = self.stream.open(question, same_row)
                except InputError as error:
                    if not self.skip:
                        raise
                    yield error
                    continue
                example.epoch, previous_row = window_state["epoch"], question.row
                yield example
            offset = 0

    def _windows(
        self, epoch: int, place: int, window: int, source: dict[str, Any] | None
    ) -> Iterator[tuple[dict[str, Any], list[Question]]]:
        """Yield the state and the shuffled questions of each window, from a given window on."""
        worker = get_worker_info()
        num_workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        consumer, consumers = self.rank * num_workers + worker_id, self.world_size * num_workers
        shards = range(self.stream.dataset.num_shards)
        # A consumer reads whole shards of its own, or else every n-th row of all shards.
        has_shards = len(shards) >= consumers
        first_row, step = (0, 1) if has_shards else (consumer, consumers)
        while True:
            has_questions = place > 0 or window > 0
            order = random.Random(f"{self.seed} {epoch}").sample(shards, len(shards))
            order = order[consumer::consumers] if has_shards else order
            while place < len(order):
                shard = order[place]
                rows = split_dataset_by_node(self.stream.shard(shard), first_row, step)
                if source:
                    rows.load_state_dict(source)
                batches = rows.iter(SHUFFLE_WINDOW)  # ``iter(rows)`` would split the rows among workers again
                while columns := self._read_window(batches, shard, window):
                    values_of_rows = list(zip(*columns.values(), strict=True))
                    texts = zip(*(columns[name] for name in self.stream.mapping.text_columns), strict=True)
                    questions = [
                        question
                        for i, values in enumerate(values_of_rows, start=window * SHUFFLE_WINDOW)
                        for question in self.stream.questions(
                            dict(zip(columns, values, strict=True)), shard, first_row + step * i
                        )
                        if self.held_out.isdisjoint(question.page_id)
                    ]
                    has_questions |= bool(questions)
                    rows_digest = short_digest(texts)
                    state = {"epoch": epoch, "place": place, "window": window, "source": source, "rows": rows_digest}
                    yield state, self._shuffle(questions, f"{self.seed} {epoch} {shard} {window}")
                    window, source = window + 1, rows.state_dict()
                place, window, source = place + 1, 0, None
            if not has_questions:
                raise InputError(
                    f"{self.stream.name}: no question is left to train on for one of {consumers} workers: lower "
                    f"data.num_workers or data.limit_val"
                )
            epoch, place = epoch + 1, 0

    def _read_window(self, batches: Iterator[dict[str, Any]], shard: int, window: int) -> dict[str, Any] | None:
        try:
            return next(batches, None)
        except Exception as error:
            name = f"{self.stream.name}, shard {shard}, window {window} of {SHUFFLE_WINDOW} rows"
            raise InputError(f"{name}: can't be read: {first_line(error)}") from error

    def _shuffle(self, questions: Sequence[Question], seed: str) -> list[Question]:
        rng = random.Random(seed)
        shuffled = rng.sample(questions, len(questions))
        groups = group_by_page((question.page_id for question in shuffled), self.questions_per_page)
        return [shuffled[index] for group in rng.sample(groups, len(groups)) for index in group]
