"""Data sets that `datasets` reads, from the Hub or a local folder, with the published column forms of DocVQA."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from idefics_lit.data.example import Example, Examples, as_id, as_text, as_texts, read_answers
from idefics_lit.data.images import open_stored
from idefics_lit.errors import InputError, first_line

# What each part of an example is called in nielsr/docvqa_1200_examples, lmms-lab/DocVQA, HuggingFaceM4/DocumentVQA and
# sets modelled on them; the first that is there is taken.
COLUMNS = {
    "question_id": ("questionId", "question_id", "id"),
    "question": ("question", "query"),
    "image": ("image", "images"),
    "answers": ("answers", "answer"),
    "question_types": ("question_types",),
}
READ = {"question_id": as_id, "question": as_text, "answers": as_texts, "question_types": as_texts}
PAGE_COLUMNS = ("ucsf_document_id", "ucsf_document_page_no")  # the official ids of a page, where they were kept


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
        columns: maps a part of an example (``question_id``, ``question``, ``image``, ``answers``, ``question_types``)
            to the column that holds it, where it isn't one of `COLUMNS`.
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
        self.name, self.language, self.folder = name, language, folder
        self.columns = match_columns(dataset.column_names, columns or {}, name)
        self.features = undecoded(dataset.features)
        self.dataset = dataset.with_format("arrow")  # as it is stored
        official = [column for column in PAGE_COLUMNS if column in dataset.column_names]
        texts = {column for part, column in self.columns.items() if part in READ}
        self.page_ids: list[str] = [f"row {row}" for row in range(len(dataset))]
        checked = self.dataset.select_columns(sorted({*texts, *official}))
        self.answers, self.faults = read_answers(lambda row: self._check(checked, row), len(dataset))
        if len(official) < len(PAGE_COLUMNS):
            self.page_ids = _tell_pages_apart(self.dataset.select_columns(self.columns["image"]))
        self.dataset = self.dataset.select_columns(sorted(set(self.columns.values())))

    def __len__(self) -> int:
        """Count the questions."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its pages, decoded."""
        if index in self.faults:
            raise InputError(self.faults[index])
        row = self._row(self.dataset, index)
        return read_example(row, self.columns, self.language, self.where(index), index, self.folder)

    def where(self, index: int) -> str:
        """Name a question's row for error messages."""
        return f"{self.name}, row {index}"

    def _row(self, dataset: datasets.Dataset, index: int) -> dict[str, Any]:
        try:
            return self.features.decode_example(dataset[index].to_pylist()[0])
        except Exception as error:
            raise InputError(f"{self.where(index)}: the row can't be read: {first_line(error)}") from error

    def _check(self, dataset: datasets.Dataset, index: int) -> list[str]:
        """Find out which page a row is about, where it says so, and return its answers."""
        row = self._row(dataset, index)
        self.page_ids[index] = page_id(row) or self.page_ids[index]
        return read_texts(row, self.columns, self.language, self.where(index), index)["answers"]


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


def page_id(row: Mapping[str, Any]) -> str | None:
    """Return the key of a row's page by its `PAGE_COLUMNS`, where they say which it is."""
    official = [row.get(column) for column in PAGE_COLUMNS]
    unknown = any(part in (None, "") or part != part for part in official)  # NaN is none either
    return None if unknown else " page ".join(map(str, official))


def _tell_pages_apart(images: datasets.Dataset) -> list[str]:
    """Return a key of each row's images as they are stored.

    `datasets` reads a set for it once, and keeps what it found beside a set that is on disk.
    """
    column = images.column_names[0]
    options: dict[str, Any] = {"fn_kwargs": {"column": column}, "remove_columns": column, "desc": "Telling pages apart"}
    try:
        keys = images.map(_key, **options)
    except OSError:  # a folder that can't be written
        keys = images.map(_key, **options, keep_in_memory=True)
    return list(keys.with_format(None)["key"])


def _key(row: pa.Table, column: str) -> dict[str, str]:
    digest = hashlib.blake2b(digest_size=16)
    try:
        stored = row[column].to_pylist()[0]
    except UnicodeDecodeError:  # a path that can't be read later either
        stored = None
    for image in stored if isinstance(stored, list) else [stored]:
        content = image.get("bytes") if isinstance(image, Mapping) else image
        digest.update(content if isinstance(content, bytes) else str(image).encode())  # else a path, or nothing
    return {"key": digest.hexdigest()}


def read_texts(
    row: Mapping[str, Any], columns: Mapping[str, str], language: str, where: str, number: int | str
) -> dict[str, Any]:
    """Return a row's id, question, answers and types; see `read_example`.

    Raises:
        InputError: when the row has no question or id, or something else where a text should be.
    """
    texts: dict[str, Any] = {"question_id": number, "answers": [], "question_types": []}
    for part, column in columns.items():
        if part not in READ:
            continue
        stored = row[column]
        if part == "question" and isinstance(stored, Mapping):
            if language not in stored:
                raise InputError(f"{where}: no {language!r} in {sorted(stored)}: see data.language")
            stored = stored[language]
        try:
            texts[part] = READ[part](stored)
        except ValueError as error:
            raise InputError(f"{where}: column {column!r} {error}: mend it or drop the row") from error
        if texts[part] == "":
            raise InputError(f"{where}: no {part} in column {column!r}: drop the row")
    return texts


def read_example(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    language: str,
    where: str,
    number: int | str,
    folder: str | None = None,
) -> Example:
    """Make an example of a row.

    Args:
        row: the row by column; its images decoded or as they are stored.
        columns: the column of each part, from `match_columns`.
        language: which of the question's languages to take, where the column holds one text a language.
        where: names the row in error messages.
        number: the question's id where no column has one.
        folder: see `HubDocVQA`.

    Raises:
        InputError: as `read_texts` does; also when the row has no image, or one that can't be decoded.
    """
    texts = read_texts(row, columns, language, where, number)
    stored = row[columns["image"]]
    images = stored if isinstance(stored, list) else [stored]
    if not images or None in images:
        raise InputError(f"{where}: no image in column {columns['image']!r}: drop the row")
    try:
        pages = [open_stored(image, folder) for image in images]
    except Exception as error:
        raise InputError(f"{where}: the row can't be read: {error}") from error
    return Example(**texts, images=pages, where=where)


def match_columns(names: Sequence[str], given: Mapping[str, str], where: str) -> dict[str, str]:
    """Return the column of each part of an example, among ``names``, that is ``given`` or one of `COLUMNS`.

    Raises:
        InputError: when there is no column for question or image, or a given one isn't there.
    """
    unknown = sorted(set(given) - set(COLUMNS))
    if unknown:
        raise InputError(f"data.columns names {unknown[0]!r}, but an example's parts are {', '.join(COLUMNS)}")
    for part, column in given.items():
        if column not in names:
            raise InputError(f"data.columns: {where} has no column {column!r} for {part}; it has {', '.join(names)}")
    found = {part: next((c for c in candidates if c in names), None) for part, candidates in COLUMNS.items()}
    columns = {part: column for part, column in {**found, **given}.items() if column}
    for part in ("question", "image"):
        if part not in columns:
            raise InputError(
                f"{where}: no column for {part} among {', '.join(names)}: name it, --data.columns '{{{part}: COLUMN}}'"
            )
    return columns
