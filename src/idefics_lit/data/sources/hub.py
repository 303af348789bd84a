"""Data sets that `datasets` reads, from the Hub or a local folder, with published or named columns."""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.data.example import Example, Examples
from idefics_lit.data.sources.features import DatasetSplit
from idefics_lit.data.sources.stored_images import path_keys, stored_key
from idefics_lit.errors import InputError, first_line
from idefics_lit.utils.hub import prepare_hub

ROWS_AT_ONCE = 1000
# What is written as a list, or as a tuple, a set or an array of texts in Python.
BRACKETED = re.compile(r"""\s*(\[.*\]|array\(.*\)|\(['"].*\)|\{['"].*\})\s*""", re.DOTALL)


def is_saved(source: str) -> bool:
    """Return whether the source is a folder written by ``save_to_disk``."""
    return any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_splits(source: str, subset: str | None = None, *, streaming: bool = False) -> dict[str, Any]:
    """Load the splits of a Hub data set or of a local folder: a saved data set, parquet, images with metadata.

    Args:
        source: a Hub id such as ``lmms-lab/DocVQA``, or a folder.
        subset: the configuration to load if the data set has several.
        streaming: return an `IterableDataset` for each split, which reads nothing yet, instead of a `Dataset`.

    Raises:
        InputError: when `datasets` can't read the source.
    """
    prepare_hub(source)
    try:
        if is_saved(source):
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source, subset, streaming=streaming)
    except Exception as error:
        kind = "folder" if Path(source).exists() else "file or folder here, nor a data set that the Hub has,"
        raise InputError(f"data.source {source!r} is no {kind} that can be read: {error}") from error
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    if streaming and is_saved(source):
        return {split: rows.to_iterable_dataset() for split, rows in splits.items()}
    return splits


class HubDocVQA(DatasetSplit, Examples):
    """One split of a data set, memory-mapped.

    Args:
        dataset: the split.
        name: names the split in error messages.
        options: see `idefics_lit.data.sources.features.DatasetSplit`.

    Raises:
        InputError: when a column doesn't exist. A row without a question is one of the `faults`; a row without an
            image that can be decoded raises when its example is requested.
    """

    def __init__(self, dataset: datasets.Dataset, name: str, **options: Any) -> None:  # noqa: ANN401
        super().__init__(dataset, name, **options)
        self.dataset = dataset.with_format("arrow")  # rows as they are stored
        self.rows: list[tuple[int, int | None]] = []  # the row of each question, and its turn in the row
        self.answers: list[list[str]] = []
        self.identities: list[tuple[Any, ...]] = []  # the id and text of each question; empty for bad rows
        self.faults: dict[int, str] = {}
        texts = self.dataset.select_columns(self.mapping.text_columns)
        published_ids = [self._read_questions(row, values) for row, values in enumerate(self._read_rows(texts))]
        if bracketed := [i for i, answers in enumerate(self.answers) if any(map(BRACKETED.fullmatch, answers))]:
            rank_zero_warn(
                f"{name}: {len(bracketed)} questions have an answer in brackets, which is no list but one text. "
                f"The first: {self.source(bracketed[0])}: {', '.join(self.answers[bracketed[0]]):.100}"
            )
        image_keys = self._image_keys(self.dataset.select_columns(self.mapping.image_columns))
        self.page_ids: list[tuple[Hashable, ...]] = [(*image_keys[row], *published_ids[row]) for row, _ in self.rows]
        self.dataset = self.dataset.select_columns([*self.mapping.text_columns, *self.mapping.image_columns])

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its decoded pages."""
        if index in self.faults:
            raise InputError(self.faults[index])
        row, turn = self.rows[index]
        return self.mapping.example(self._row(self.dataset, row), turn, self.source(index), row)

    def source(self, index: int) -> str:
        """Return the name of a question's row, for error messages."""
        return self._row_name(*self.rows[index])

    def identity(self, index: int) -> object:
        """Return a question's id and text."""
        return self.identities[index]

    def _row_name(self, row: int, turn: int | None = None) -> str:
        return f"{self.name}, row {row}" + ("" if turn is None else f", question {turn}")

    def _row(self, dataset: datasets.Dataset, row: int) -> dict[str, Any]:
        try:
            return self._decode(dataset[row].to_pylist()[0])
        except Exception as error:
            raise InputError(f"{self._row_name(row)}: the row can't be read: {first_line(error)}") from error

    def _read_rows(self, dataset: datasets.Dataset) -> Iterator[dict[str, Any] | InputError]:
        """Yield the values of each row, or why it can't be read. Reading many rows at once is faster."""
        for start in range(0, len(dataset), ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, len(dataset)))
            try:
                values: list[dict[str, Any] | InputError] = [
                    self._decode(row) for row in dataset[rows.start : rows.stop].to_pylist()
                ]
            except Exception:  # find the row
                values = [self._row_or_error(dataset, row) for row in rows]
            yield from values

    def _row_or_error(self, dataset: datasets.Dataset, row: int) -> dict[str, Any] | InputError:
        try:
            return self._row(dataset, row)
        except InputError as error:
            return error

    def _decode(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        return self.convert(self.features.decode_example(stored))

    def _read_questions(self, row: int, values: dict[str, Any] | InputError) -> tuple[str, ...]:
        """Add a row's questions, with their answers; return the published ids of its pages."""
        try:
            if isinstance(values, InputError):
                raise values
            page_ids, turns = self.mapping.page_ids(values), self.mapping.turns(values, self._row_name(row))
        except InputError as error:
            self._add_question(row, None, fault=str(error))
            return ()
        for turn in turns:
            try:
                fields = self.mapping.read(values, turn, self._row_name(row, turn), row)
            except InputError as error:
                self._add_question(row, turn, fault=str(error))
            else:
                self._add_question(row, turn, fields["answers"], (fields["question_id"], fields["question"]))
        return page_ids

    def _add_question(
        self, row: int, turn: int | None, answers: Sequence[str] = (), identity: tuple[Any, ...] = (), fault: str = ""
    ) -> None:
        if fault:
            self.faults[len(self.rows)] = fault
        self.rows.append((row, turn))
        self.answers.append([*answers])
        self.identities.append(identity)

    def _image_keys(self, images: datasets.Dataset) -> list[tuple[Hashable, ...]]:
        """Return the keys of each row's images: of their content, or of the file of a path."""
        keys_of_rows = self._stored_keys(images)
        key_of_path = path_keys({key for keys in keys_of_rows for key in keys}, self.mapping.folder)
        return [
            tuple(key_of_path.get(key, key) for key in keys) or (f"row {row}",)  # no other row has this key
            for row, keys in enumerate(keys_of_rows)
        ]

    def _stored_keys(self, images: datasets.Dataset) -> list[list[str]]:
        """Return the keys of each row's images as they are stored.

        `datasets` reads all images for it once, and caches the keys of a data set that is on disk.
        """
        options: dict[str, Any] = {"remove_columns": images.column_names, "desc": "Hashing pages"}
        try:
            keys = images.map(_map_keys, **options)
        except OSError:  # the folder is read-only
            keys = images.map(_map_keys, **options, keep_in_memory=True)
        return list(keys.with_format(None)["keys"])


def stored_keys(columns: Mapping[str, Any]) -> list[str]:
    """Return a key of each image in a row's image columns, see `stored_key`."""
    images = (image for value in columns.values() for image in (value if isinstance(value, list) else [value]))
    return [key for key in map(stored_key, images) if key is not None]


def _map_keys(row: pa.Table) -> dict[str, list[str]]:
    try:
        (columns,) = row.to_pylist()
    except UnicodeDecodeError:  # a path that can't be opened later either
        columns = {}
    return {"keys": stored_keys(columns)}
