"""Data sets that `datasets` reads, from the Hub or a local folder, with the published column forms of DocVQA."""

import re
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.data.example import Example, Examples
from idefics_lit.data.images import locate, stored_key, tell_files_apart
from idefics_lit.data.sources.columns import ColumnMapping
from idefics_lit.errors import InputError, first_line

# What is written as a list, or as a tuple, a set or an array of texts in Python.
BRACKETED = re.compile(r"""\s*(\[.*\]|array\(.*\)|\(['"].*\)|\{['"].*\})\s*""", re.DOTALL)


def is_saved(source: str) -> bool:
    """Tell whether it is a folder that ``save_to_disk`` wrote."""
    return any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_splits(source: str, subset: str | None = None, *, streaming: bool = False) -> dict[str, Any]:
    """Return the splits of a Hub data set or of a local folder: a saved data set, parquet, images with metadata.

    Args:
        source: a Hub id such as ``lmms-lab/DocVQA``, or a folder.
        subset: the configuration to load where the data set has several.
        streaming: give an `IterableDataset` a split, of which nothing is read yet, in place of a `Dataset`.

    Raises:
        InputError: when `datasets` can't read it.
    """
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


class HubDocVQA(Examples):
    """One split of a data set, memory-mapped, its columns recognised or named.

    Args:
        dataset: the split.
        name: names the split in error messages.
        columns: see `idefics_lit.data.sources.columns.ColumnMapping`.
        language: which of the question's languages to take, where the column holds one text a language.
        folder: the local folder that it is from; its images' paths may lead nowhere else.

    Raises:
        InputError: when a column isn't there. A row without question is one of the `faults`; one without an image that
            can be decoded raises when it is asked for.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        name: str,
        columns: Mapping[str, str] | None = None,
        language: str = "en",
        folder: str | None = None,
    ) -> None:
        self.name = name
        self.mapping = ColumnMapping(dataset.column_names, columns, language, folder, name)
        self.features, self.typed = undecoded(dataset.features), typed_texts(dataset.features, self.mapping, name)
        self.dataset = dataset.with_format("arrow")  # as it is stored
        self.rows: list[tuple[int, int | None]] = []  # where each question is: its row, which of the row's turns
        published: list[tuple[str, ...]] = []
        self.answers: list[list[str]] = []
        self.faults: dict[int, str] = {}
        texts = self.dataset.select_columns(self.mapping.text_columns)
        for row in range(len(dataset)):
            published.append(self._open(texts, row))
        if bracketed := [i for i, answers in enumerate(self.answers) if any(map(BRACKETED.fullmatch, answers))]:
            rank_zero_warn(
                f"{name}: {len(bracketed)} questions have an answer in brackets, which is no list but one text. "
                f"The first: {self.where(bracketed[0])}: {', '.join(self.answers[bracketed[0]]):.100}"
            )
        pages = self._tell_pages_apart(self.dataset.select_columns(self.mapping.image_columns), folder)
        self.page_ids: list[tuple[Hashable, ...]] = [(*pages[row], *published[row]) for row, _ in self.rows]
        self.dataset = self.dataset.select_columns([*self.mapping.text_columns, *self.mapping.image_columns])

    def __len__(self) -> int:
        """Count the questions."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its pages, decoded."""
        if index in self.faults:
            raise InputError(self.faults[index])
        row, turn = self.rows[index]
        return self.mapping.example(self._row(self.dataset, row), turn, self.where(index), row)

    def where(self, index: int) -> str:
        """Name a question's row for error messages."""
        return self._name(*self.rows[index])

    def _name(self, row: int, turn: int | None = None) -> str:
        return f"{self.name}, row {row}" + ("" if turn is None else f", question {turn}")

    def _row(self, dataset: datasets.Dataset, row: int) -> dict[str, Any]:
        try:
            stored = self.features.decode_example(dataset[row].to_pylist()[0])
            return {name: self.typed[name](value) if name in self.typed else value for name, value in stored.items()}
        except Exception as error:
            raise InputError(f"{self._name(row)}: the row can't be read: {first_line(error)}") from error

    def _open(self, texts: datasets.Dataset, row: int) -> tuple[str, ...]:
        """Find a row's questions and their answers; return the published ids of its pages."""
        try:
            content = self._row(texts, row)
            pages, turns = self.mapping.page_ids(content), self.mapping.turns(content, self._name(row))
        except InputError as error:
            self._add(row, None, [], str(error))
            return ()
        for turn in turns:
            try:
                answers = self.mapping.read(content, turn, self._name(row, turn), row)["answers"]
            except InputError as error:
                self._add(row, turn, [], str(error))
            else:
                self._add(row, turn, answers)
        return pages

    def _add(self, row: int, turn: int | None, answers: list[str], fault: str = "") -> None:
        if fault:
            self.faults[len(self.rows)] = fault
        self.rows.append((row, turn))
        self.answers.append(answers)

    def _tell_pages_apart(self, images: datasets.Dataset, folder: str | None) -> list[tuple[Hashable, ...]]:
        """Return the keys of each row's images: of their content, or of the file that a path leads to."""
        stored = self._stored_keys(images)
        places = {}
        for path in {key for keys in stored for key in keys}:
            with suppress(ValueError):  # a path that leads elsewhere is named when it is asked for
                places[path] = locate(path, folder)
        files = tell_files_apart(dict.fromkeys(place for place in places.values() if isinstance(place, Path)))
        known: dict[str, Hashable] = {path: files.get(place, path) for path, place in places.items()}
        return [
            tuple(known.get(key, key) for key in keys) or (f"row {row}",)  # a row without images is no other's page
            for row, keys in enumerate(stored)
        ]

    def _stored_keys(self, images: datasets.Dataset) -> list[list[str]]:
        """Return a key of each of a row's images as they are stored.

        `datasets` reads a set for it once, and keeps what it found beside a set that is on disk.
        """
        options: dict[str, Any] = {"remove_columns": images.column_names, "desc": "Telling pages apart"}
        try:
            keys = images.map(_keys, **options)
        except OSError:  # a folder that can't be written
            keys = images.map(_keys, **options, keep_in_memory=True)
        return list(keys.with_format(None)["keys"])


def typed_texts(features: datasets.Features, form: ColumnMapping, name: str) -> dict[str, Callable[[Any], Any]]:
    """Return how to read the columns that hold numbers or classes where texts should be.

    A class is its name. Numbers can't be as they were once written: a whole one is, a column with gaps being one of
    floats, and a float of 16 or 32 bits has as many digits as tell it from others.

    Args:
        features: the split's.
        form: which columns hold what.
        name: names the split in the warning.
    """
    for part in ("question", "answers", "question_types"):
        for column in form.parts.get(part, ()):
            kind = _value(features.get(column))
            if isinstance(kind, datasets.Value) and kind.dtype.startswith(("float", "decimal", "date", "time", "bool")):
                rank_zero_warn(
                    f"{name}: column {column!r} holds {kind.dtype} and no texts: what 1.0, 0.10 or a date was before "
                    f"isn't known any more. Store texts, to train on what the page says."
                )
    columns = {column: _reader(features.get(column)) for column in form.text_columns}
    return {column: read for column, read in columns.items() if read}


def _value(feature: Any) -> Any:  # noqa: ANN401
    return _value(feature.feature) if isinstance(feature, (datasets.List, datasets.LargeList)) else feature


def _reader(feature: Any) -> Callable[[Any], Any] | None:  # noqa: ANN401
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        inner = _reader(feature.feature)
        return inner and (lambda values: values if values is None else [inner(value) for value in values])
    if isinstance(feature, datasets.ClassLabel):
        return lambda number: None if number is None or number < 0 else feature.int2str(number)
    if isinstance(feature, datasets.Value) and feature.dtype.startswith("float"):
        precise = np.dtype(feature.dtype).type
        return lambda number: number if number is None or number != number else _number(float(number), precise)
    return None


def _number(number: float, precise: type[np.floating[Any]]) -> int | str:
    return int(number) if number.is_integer() else str(precise(number))


def undecoded(features: datasets.Features) -> datasets.Features:
    """Return the features of a data set whose files stay as they are stored.

    `datasets` would open whatever path or address a row names, and decode ahead of what is asked for.
    """

    def leave(feature: Any) -> Any:  # noqa: ANN401
        if isinstance(feature, dict):
            return {name: leave(inner) for name, inner in feature.items()}
        if isinstance(feature, (datasets.List, datasets.LargeList)):
            return replace(feature, feature=leave(feature.feature))
        decodes = hasattr(feature, "decode") and not isinstance(feature, datasets.Json)
        return replace(feature, decode=False) if decodes else feature

    return datasets.Features(leave(dict(features)))


def stored_keys(columns: Mapping[str, Any]) -> list[str]:
    """Return a key of each image in a row's image columns; see `idefics_lit.data.images.stored_key`."""
    images = (image for stored in columns.values() for image in (stored if isinstance(stored, list) else [stored]))
    return [key for key in map(stored_key, images) if key is not None]


def _keys(row: pa.Table) -> dict[str, list[str]]:
    try:
        (columns,) = row.to_pylist()
    except UnicodeDecodeError:  # a path that can't be read later either
        columns = {}
    return {"keys": stored_keys(columns)}
