"""Open streamed data sets, which may be larger than the disk, and read the questions of their rows.

Images stay encoded until their question is requested.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.data.example import Example, Examples
from idefics_lit.data.sources import hub
from idefics_lit.data.sources.features import DatasetSplit
from idefics_lit.data.sources.official import find_official_splits
from idefics_lit.data.sources.stored_images import content_key
from idefics_lit.data.sources.tables import find_tables, find_text_files
from idefics_lit.data.sources.values import read_answers
from idefics_lit.errors import InputError, first_line


class Question(NamedTuple):
    """A question of a row, whose images are as they are stored; with a fault it raises when it is read."""

    row: Mapping[str, Any]
    turn: int | None
    number: str
    page_id: tuple[Hashable, ...]
    source: str
    fault: str = ""

    def check(self) -> None:
        """Raise if it has a fault."""
        if self.fault:
            raise InputError(self.fault)


class Stream(DatasetSplit):
    """One split of a streamed data set.

    Args:
        dataset: the split.
        name: names the split in error messages.
        options: see `idefics_lit.data.sources.features.DatasetSplit`.

    Raises:
        InputError: when a column doesn't exist. A row without a question or image raises when it is read.
    """

    def __init__(self, dataset: datasets.IterableDataset, name: str, **options: Any) -> None:  # noqa: ANN401
        super().__init__(dataset, name, **options)
        # First of all, because `datasets` decodes rows in advance, in threads.
        stored = dataset.decode(False).cast(self.features)
        self.dataset = stored.select_columns([*self.mapping.text_columns, *self.mapping.image_columns])

    def shard(self, index: int) -> datasets.IterableDataset:
        """Return the rows of one file."""
        return self.dataset.shard(self.dataset.num_shards, index)

    def questions(self, row: Mapping[str, Any], shard: int, number: int) -> list[Question]:
        """Return the questions of a row of a shard; a bad row has one question, which raises when it is read."""
        source = f"{self.name}, row {number}" + (f" of shard {shard}" if self.dataset.num_shards > 1 else "")
        row = self.convert(row)
        row_id = f"{shard}-{number}"
        page_id = self._page_id(row) or (row_id,)
        try:
            turns = self.mapping.turns(row, source)
        except InputError as error:
            return [Question(row, None, row_id, page_id, source, str(error))]
        sources = [source if turn is None else f"{source}, question {turn}" for turn in turns]
        return [Question(row, turn, row_id, page_id, name) for turn, name in zip(turns, sources, strict=True)]

    def _page_id(self, row: Mapping[str, Any]) -> tuple[Hashable, ...]:
        columns = (row[column] for column in self.mapping.image_columns)
        images = (image for value in columns for image in (value if isinstance(value, list) else [value]))
        keys = (content_key(image, self.mapping.folder) for image in images if image is not None)
        return (*keys, *self.mapping.page_ids(row))

    def open(self, question: Question, same_row: Example | None = None) -> Example:
        """Return a question with its decoded pages, which may be those of an example of the same row."""
        question.check()
        row, turn, number, page_id, source, _ = question
        example = self.mapping.example(row, turn, source, number, same_row.images if same_row else None)
        example.page_id = page_id
        return example

    def answers(self, question: Question) -> list[str]:
        """Return a question's answers, without decoding its pages."""
        question.check()
        return self.mapping.read(question.row, question.turn, question.source, question.number)["answers"]

    def first(self, limit: int) -> Examples:
        """Read the first questions, in the order of the files."""
        questions: list[Question] = []
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
    options = {"columns": columns, "language": language, "folder": folder}
    return {split: Stream(rows, f"{source} {split}", **options) for split, rows in splits.items()}


class _FirstQuestions(Examples):
    """The first questions of a stream, in memory, their images encoded."""

    def __init__(self, stream: Stream, questions: Sequence[Question]) -> None:
        self.stream, self.questions = stream, questions
        self.page_ids = [question.page_id for question in questions]
        self.answers, self.faults = read_answers(lambda i: stream.answers(questions[i]), len(questions))

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Example:
        return self.stream.open(self.questions[index])

    def source(self, index: int) -> str:
        return self.questions[index].source
