"""Stream data sets larger than the disk: rows from the Hub or a folder, of which only a window is in memory.

- Each consumer, that is a worker of a rank, reads its own shards (files), or its own rows if there are fewer shards
  than consumers. It repeats them without end, so that no rank waits for another at the end of an epoch.
- Shards, and the rows in a window, are shuffled by seed, epoch and position alone. A resumed run therefore reads the
  window again and continues at the next question; the content of a shuffle buffer would be lost.
- Images stay encoded until their question is requested: a consumer's memory is a window of files, however long the
  stream.
"""

import random
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.distributed import split_dataset_by_node
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import IterableDataset, get_worker_info

from idefics_lit.data.example import Example, Examples
from idefics_lit.data.grouping import group_by_page
from idefics_lit.data.samplers import short_digest
from idefics_lit.data.sources import hub
from idefics_lit.data.sources.columns import ColumnMapping
from idefics_lit.data.sources.features import text_conversions, undecoded
from idefics_lit.data.sources.official import find_official_splits
from idefics_lit.data.sources.stored_images import content_key
from idefics_lit.data.sources.tables import find_tables, find_text_files
from idefics_lit.data.sources.values import read_answers
from idefics_lit.errors import InputError, first_line

SHUFFLE_WINDOW = 500  # rows; a row of Docmatix has half a megabyte


class _Question(NamedTuple):
    """A question of a row, whose images are as they are stored; with a fault it raises when it is read."""

    row: Mapping[str, Any]
    turn: int | None
    number: str
    page_id: tuple[Hashable, ...]
    source: str
    fault: str = ""

    def check(self) -> None:
        if self.fault:
            raise InputError(self.fault)


class Stream:
    """One split of a streamed data set.

    Args:
        dataset: the split.
        name: names the split in error messages.
        columns: see `idefics_lit.data.sources.columns.ColumnMapping`.
        language: see there.
        folder: see there.

    Raises:
        InputError: when a column doesn't exist. A row without a question or image raises when it is read.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        name: str,
        columns: Mapping[str, str] | None = None,
        language: str = "en",
        folder: str | None = None,
    ) -> None:
        self.name = name
        column_names = dataset.column_names
        if column_names is None:
            raise InputError(f"{name}: its columns aren't known before it is read: give parquet or arrow files")
        self.mapping = ColumnMapping(column_names, columns, language, folder, name)
        self.conversions = text_conversions(dataset.features, self.mapping, name)
        # First of all, because `datasets` decodes rows in advance, in threads.
        stored = dataset.decode(False).cast(undecoded(dataset.features))
        self.dataset = stored.select_columns([*self.mapping.text_columns, *self.mapping.image_columns])

    def shard(self, index: int) -> datasets.IterableDataset:
        """Return the rows of one file."""
        return self.dataset.shard(self.dataset.num_shards, index)

    def questions(self, row: Mapping[str, Any], shard: int, number: int) -> list[_Question]:
        """Return the questions of a row of a shard; a bad row has one question, which raises when it is read."""
        source = f"{self.name}, row {number}" + (f" of shard {shard}" if self.dataset.num_shards > 1 else "")
        row = {name: self.conversions[name](v) if name in self.conversions else v for name, v in row.items()}
        row_id = f"{shard}-{number}"
        page_id = self._page_id(row) or (row_id,)
        try:
            turns = self.mapping.turns(row, source)
        except InputError as error:
            return [_Question(row, None, row_id, page_id, source, str(error))]
        sources = [source if turn is None else f"{source}, question {turn}" for turn in turns]
        return [_Question(row, turn, row_id, page_id, name) for turn, name in zip(turns, sources, strict=True)]

    def _page_id(self, row: Mapping[str, Any]) -> tuple[Hashable, ...]:
        columns = (row[column] for column in self.mapping.image_columns)
        images = (image for value in columns for image in (value if isinstance(value, list) else [value]))
        keys = (content_key(image, self.mapping.folder) for image in images if image is not None)
        return (*keys, *self.mapping.page_ids(row))

    def open(self, question: _Question, same_row: Example | None = None) -> Example:
        """Return a question with its decoded pages, which may be those of an example of the same row."""
        question.check()
        row, turn, number, page_id, source, _ = question
        example = self.mapping.example(row, turn, source, number, same_row.images if same_row else None)
        example.page_id = page_id
        return example

    def answers(self, question: _Question) -> list[str]:
        """Return a question's answers, without decoding its pages."""
        question.check()
        return self.mapping.read(question.row, question.turn, question.source, question.number)["answers"]

    def first(self, limit: int) -> Examples:
        """Read the first questions, in the order of the files."""
        questions: list[_Question] = []
        for shard in range(self.dataset.num_shards):
            for number, row in self._rows(shard):
                questions += self.questions(row, shard, number)
                if len(questions) >= limit:
                    return _FirstQuestions(self, questions[:limit])
        return _FirstQuestions(self, questions)

    def _rows(self, shard: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        try:
            yield from enumerate(self.shard(shard))
        except Exception as error:
            raise InputError(f"{self.name}, shard {shard}: can't be read: {first_line(error)}") from error


def find_streams(
    source: str, subset: str | None, columns: Mapping[str, str] | None, language: str, image_root: str | None = None
) -> dict[str, Stream]:
    """Return the stream of each split; see `DocVQADataModule` for the arguments.

    Raises:
        InputError: when `datasets` can't stream the source.
    """
    path = Path(source)
    is_local_file = not hub.is_saved(source) and (find_official_splits(path) or find_tables(path))
    if is_local_file or source.partition(":")[0] == "synthetic":
        raise InputError(f"data.source {source} can't be streamed, and needn't be: leave data.streaming out")
    if not hub.is_saved(source) and find_text_files(source, subset):
        rank_zero_warn(
            f"data.source {source}: the texts of a stream of CSV and JSON files are read by `datasets`, which may "
            f"change some, such as 0.10 and N/A: leave data.streaming out, or save them as parquet files"
        )
    splits = hub.load_splits(source, subset, streaming=True)
    folder = image_root or (source if path.exists() else None)
    return {split: Stream(rows, f"{source} {split}", columns, language, folder) for split, rows in splits.items()}


class _FirstQuestions(Examples):
    """The first questions of a stream, in memory, their images encoded."""

    def __init__(self, stream: Stream, questions: Sequence[_Question]) -> None:
        self.stream, self.questions = stream, questions
        self.page_ids = [question.page_id for question in questions]
        self.answers, self.faults = read_answers(lambda i: stream.answers(questions[i]), len(questions))

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Example:
        return self.stream.open(self.questions[index])

    def source(self, index: int) -> str:
        return self.questions[index].source


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
        # state of `datasets` at the start of the window; offset: the position of the next question in the window.
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
        offset = start.pop("offset")
        for window_state, questions in self._windows(**start):
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
    ) -> Iterator[tuple[dict[str, Any], list[_Question]]]:
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
                    values_of_rows = zip(*columns.values(), strict=True)
                    questions = [
                        question
                        for i, values in enumerate(values_of_rows, start=window * SHUFFLE_WINDOW)
                        for question in self.stream.questions(
                            dict(zip(columns, values, strict=True)), shard, first_row + step * i
                        )
                        if self.held_out.isdisjoint(question.page_id)
                    ]
                    has_questions |= bool(questions)
                    state = {"epoch": epoch, "place": place, "window": window, "source": source}
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

    def _shuffle(self, questions: Sequence[_Question], seed: str) -> list[_Question]:
        rng = random.Random(seed)
        shuffled = rng.sample(questions, len(questions))
        groups = group_by_page((question.page_id for question in shuffled), self.questions_per_page)
        return [shuffled[index] for group in rng.sample(groups, len(groups)) for index in group]
