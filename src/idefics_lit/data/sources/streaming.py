"""Data sets larger than a disk: rows that `datasets` streams from the Hub or a folder, never all of them at once.

What is special here:

- a consumer, one worker of one rank, has its own shards (files), or its own rows where there are too few shards; it
  goes over them without an end, so that no rank waits for another at an epoch's end;
- what is shuffled, shards and the rows of a window, is a function of seed, epoch and place: a resumed run reads the
  window again and goes on at the very next question, which a buffer's lost content wouldn't allow;
- images stay encoded until their question is asked for: memory is a window's files, however long the stream.
"""

import random
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.distributed import split_dataset_by_node
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import IterableDataset, get_worker_info

from idefics_lit.data.example import Example, Examples, read_answers
from idefics_lit.data.images import page_key
from idefics_lit.data.samplers import digest
from idefics_lit.data.sources import hub
from idefics_lit.data.sources.columns import ColumnMapping
from idefics_lit.data.sources.official import find_official_splits
from idefics_lit.data.sources.tables import find_tables, find_text_files
from idefics_lit.errors import InputError, first_line

SHUFFLE_WINDOW = 500  # rows; one of Docmatix takes half a megabyte


class _Question(NamedTuple):
    """A question of a row; the row's images are as they are stored."""

    row: Mapping[str, Any]
    turn: int | None
    number: str
    page_id: tuple[Hashable, ...]
    where: str
    fault: str = ""


class Stream:
    """One split, of whose rows each has one question, or several in the form of Docmatix.

    Args:
        dataset: the split.
        name: names the split in error messages.
        columns: see `idefics_lit.data.sources.columns.ColumnMapping`.
        language: which of the question's languages to take.
        folder: the local folder that it is from; its images' paths may lead nowhere else.

    Raises:
        InputError: when a column isn't there. A row without question or image raises when it is read.
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
        names = dataset.column_names
        if names is None:
            raise InputError(f"{name}: its columns aren't known before it is read: give parquet or arrow files")
        self.mapping = ColumnMapping(names, columns, language, folder, name)
        # Undecoded first: `datasets` decodes ahead, in threads, what it is not told to leave alone.
        self.typed = hub.typed_texts(dataset.features, self.mapping, name)
        stored = dataset.decode(False).cast(hub.undecoded(dataset.features))
        self.dataset = stored.select_columns([*self.mapping.text_columns, *self.mapping.image_columns])

    def shard(self, index: int) -> datasets.IterableDataset:
        """Return the rows of one file."""
        return self.dataset.shard(self.dataset.num_shards, index)

    def questions(self, row: Mapping[str, Any], shard: int, number: int) -> list[_Question]:
        """Return the questions of a row of a shard; a row without one has one with a fault, raised when read."""
        where = f"{self.name}, row {number}" + (f" of shard {shard}" if self.dataset.num_shards > 1 else "")
        row = {column: self.typed[column](value) if column in self.typed else value for column, value in row.items()}
        key = f"{shard}-{number}"
        page_id = self._page_id(row) or (key,)
        try:
            turns = self.mapping.turns(row, where)
        except InputError as error:
            return [_Question(row, None, key, page_id, where, str(error))]
        places = [where if turn is None else f"{where}, question {turn}" for turn in turns]
        return [_Question(row, turn, key, page_id, place) for turn, place in zip(turns, places, strict=True)]

    def _page_id(self, row: Mapping[str, Any]) -> tuple[Hashable, ...]:
        columns = (row[column] for column in self.mapping.image_columns)
        images = (image for stored in columns for image in (stored if isinstance(stored, list) else [stored]))
        keys = (page_key(image, self.mapping.folder) for image in images if image is not None)
        return (*keys, *self.mapping.page_ids(row))

    def open(self, question: _Question, like: Example | None = None) -> Example:
        """Return a question with its pages, decoded, or those of a question of the same row."""
        row, turn, number, page_id, where, fault = question
        _raise(fault)
        example = self.mapping.example(row, turn, where, number, like.images if like else None)
        example.page_id = page_id
        return example

    def texts(self, question: _Question) -> dict[str, Any]:
        """Return all of a question but its pages; see `idefics_lit.data.sources.columns.ColumnMapping.read`."""
        _raise(question.fault)
        return self.mapping.read(question.row, question.turn, question.where, question.number)

    def _rows(self, shard: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        try:
            yield from enumerate(self.shard(shard))
        except Exception as error:
            raise InputError(f"{self.name}, shard {shard}: can't be read: {first_line(error)}") from error

    def first(self, limit: int) -> Examples:
        """Read the first so many questions, in the order of the files."""
        questions: list[_Question] = []
        for shard in range(self.dataset.num_shards):
            for number, row in self._rows(shard):
                questions += self.questions(row, shard, number)
                if len(questions) >= limit:
                    return _First(self, questions[:limit])
        return _First(self, questions)


def _raise(fault: str) -> None:
    if fault:
        raise InputError(fault)


def find_streams(
    source: str, subset: str | None, columns: Mapping[str, str] | None, language: str
) -> dict[str, Stream]:
    """Return the stream of each split; see `DocVQADataModule` for the arguments.

    Raises:
        InputError: when the source can't be read, or is none that `datasets` reads.
    """
    path = Path(source)
    small = not hub.is_saved(source) and (find_official_splits(path) or find_tables(path))
    if small or source.partition(":")[0] == "synthetic":
        raise InputError(f"data.source {source} can't be streamed, and needn't be: leave data.streaming out")
    if not hub.is_saved(source) and find_text_files(source, subset):
        rank_zero_warn(
            f"data.source {source}: the texts of a stream of CSV and JSON files are read by `datasets`, which may "
            f"change some, such as 0.10 and N/A: leave data.streaming out, or save them as parquet files"
        )
    splits = hub.load_splits(source, subset, streaming=True)
    folder = source if Path(source).exists() else None
    return {split: Stream(rows, f"{source} {split}", columns, language, folder) for split, rows in splits.items()}


class _First(Examples):
    """The first questions of a stream, in memory, their images encoded."""

    def __init__(self, stream: Stream, questions: Sequence[_Question]) -> None:
        self.stream, self.questions = stream, questions
        self.page_ids = [question.page_id for question in questions]
        self.answers, self.faults = read_answers(lambda i: stream.texts(questions[i])["answers"], len(questions))

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Example:
        return self.stream.open(self.questions[index])

    def source(self, index: int) -> str:
        return self.questions[index].where


class StreamedQuestions(IterableDataset[Example]):
    """The questions that one rank trains on, without an end; each of its workers has a part of its own.

    Args:
        stream: the split.
        rank: this process' number.
        world_size: the number of processes.
        seed: with the epoch it decides the order.
        questions_per_page: so many questions on a page follow one another.
        held_out: keys of pages: a question on any of them is left out.
        skip: yield what is wrong with a bad row in its place.

    Raises:
        InputError: when a worker's part is empty, or a row can't be read and isn't skipped.
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
        # Epoch, shard in the epoch's order, window in it, what `datasets` reads that from, question in it.
        self._state: dict[str, Any] = {"epoch": 0, "place": 0, "window": 0, "source": None, "offset": 0}

    @property
    def decided_by(self) -> dict[str, Any]:
        """What decides the order: options by name, and which files and questions there are, wherever they lie."""
        return {
            "trainer.devices": self.world_size,
            "data.seed": self.seed,
            "data.questions_per_page": self.questions_per_page,
            "data.source": f"{Path(self.stream.name).name}, {self.stream.dataset.num_shards} files",
            "held-out pages": f"{len(self.held_out)} ({digest(sorted(map(str, self.held_out)))})",
        }

    def state_dict(self) -> dict[str, Any]:
        """Return where the next question is."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there, with the next ``iter``."""
        self._state = dict(state)

    def __iter__(self) -> Iterator[Any]:
        """Yield examples, each with its epoch."""
        start = self.state_dict()
        offset = start.pop("offset")
        for window, questions in self._windows(**start):
            last, example = None, None
            for number, question in enumerate(questions[offset:], start=offset + 1):
                self._state = {**window, "offset": number}
                # A page is decoded once for the questions that follow one another.
                try:
                    example = self.stream.open(question, like=example if question.row is last else None)
                except InputError as error:
                    if not self.skip:
                        raise
                    yield error
                    continue
                example.epoch, last = window["epoch"], question.row
                yield example
            offset = 0

    def _windows(
        self, epoch: int, place: int, window: int, source: dict[str, Any] | None
    ) -> Iterator[tuple[dict[str, Any], list[_Question]]]:
        """Yield where a window is, and its questions in their order, from one window on."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        consumer, consumers = self.rank * workers + number, self.world_size * workers
        shards = range(self.stream.dataset.num_shards)
        # Its own shards; or of each shard a row in so many.
        first, step = (0, 1) if len(shards) >= consumers else (consumer, consumers)
        while True:
            found = place > 0 or window > 0
            order = random.Random(f"{self.seed} {epoch}").sample(shards, len(shards))
            order = order[consumer::consumers] if step == 1 else order
            while place < len(order):
                shard = order[place]
                rows = split_dataset_by_node(self.stream.shard(shard), first, step)
                if source:
                    rows.load_state_dict(source)
                batches = rows.iter(SHUFFLE_WINDOW)  # not ``iter(rows)``: in a worker that takes a share of its own
                while batch := self._read(batches, shard, window):
                    read = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
                    questions = [
                        question
                        for i, row in enumerate(read, start=window * SHUFFLE_WINDOW)
                        for question in self.stream.questions(row, shard, first + step * i)
                        if self.held_out.isdisjoint(question.page_id)
                    ]
                    found |= bool(questions)
                    at = {"epoch": epoch, "place": place, "window": window, "source": source}
                    yield at, self._shuffled(questions, f"{self.seed} {epoch} {shard} {window}")
                    window, source = window + 1, rows.state_dict()
                place, window, source = place + 1, 0, None
            if not found:
                raise InputError(
                    f"{self.stream.name}: no question is left to train on for one of {consumers} workers: lower "
                    f"data.num_workers or data.limit_val"
                )
            epoch, place = epoch + 1, 0

    def _read(self, batches: Iterator[dict[str, Any]], shard: int, window: int) -> dict[str, Any] | None:
        try:
            return next(batches, None)
        except Exception as error:
            where = f"{self.stream.name}, shard {shard}, window {window} of {SHUFFLE_WINDOW} rows"
            raise InputError(f"{where}: can't be read: {first_line(error)}") from error

    def _shuffled(self, questions: Sequence[_Question], seed: str) -> list[_Question]:
        generator, size = random.Random(seed), self.questions_per_page
        pages: dict[Hashable, list[_Question]] = {}
        for question in generator.sample(questions, len(questions)):
            pages.setdefault(question.page_id, []).append(question)
        runs = [page[i : i + size] for page in pages.values() for i in range(0, len(page), size)]
        return [question for run in generator.sample(runs, len(runs)) for question in run]
