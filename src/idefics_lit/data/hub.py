"""Data sets that `datasets` reads, from the Hub or a local folder, with the published column forms of DocVQA."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL.Image import Image

from idefics_lit.data.example import Example, Examples, as_texts
from idefics_lit.errors import InputError

# What each part of an example is called in nielsr/docvqa_1200_examples, lmms-lab/DocVQA, HuggingFaceM4/DocumentVQA and
# sets modelled on them; the first that is there is taken.
COLUMNS = {
    "question_id": ("questionId", "question_id", "id"),
    "question": ("question", "query"),
    "image": ("image", "images"),
    "answers": ("answers", "answer"),
    "question_types": ("question_types",),
}
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

    Raises:
        InputError: when a column isn't there. A row without question or image raises when it is asked for.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        name: str,
        columns: Mapping[str, str] | None = None,
        language: str = "en",
    ) -> None:
        self.name, self.language = name, language
        self.columns = match_columns(dataset.column_names, columns or {}, name)
        self.dataset = dataset.select_columns(sorted(set(self.columns.values())))
        answers = self.columns.get("answers")
        self.answers = [as_texts(a) for a in dataset[answers]] if answers else [[]] * len(dataset)
        if set(PAGE_COLUMNS) <= set(dataset.column_names):
            pages = zip(*(dataset[column] for column in PAGE_COLUMNS), strict=True)
            self.page_ids = [f"{document} page {page}" for document, page in pages]
        else:
            self.page_ids = _tell_pages_apart(self.dataset, self.columns["image"])

    def __len__(self) -> int:
        """Count the questions."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its pages, decoded."""
        try:
            row = self.dataset[index]
        except Exception as error:
            raise InputError(f"{self.where(index)}: the row can't be read: {error}") from error
        return read_example(row, self.columns, self.language, self.where(index), index)

    def where(self, index: int) -> str:
        """Name a question's row for error messages."""
        return f"{self.name}, row {index}"


def _tell_pages_apart(dataset: datasets.Dataset, column: str) -> list[str]:
    """Return a key of each row's images as they are stored; where that aren't images, every row's own number.

    `datasets` reads a set for it once, and keeps what it found beside a set that is on disk.
    """
    feature, encoded = dataset.features[column], datasets.Image(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)) and isinstance(feature.feature, datasets.Image):
        encoded = type(feature)(encoded)
    elif not isinstance(feature, datasets.Image):
        return [str(index) for index in range(len(dataset))]
    stored = dataset.select_columns(column).cast_column(column, encoded)
    options: dict[str, Any] = {"fn_kwargs": {"column": column}, "remove_columns": column, "desc": "Telling pages apart"}
    try:
        keys = stored.map(_key, **options)
    except OSError:  # a folder that can't be written
        keys = stored.map(_key, **options, keep_in_memory=True)
    return list(keys["key"])


def _key(row: Mapping[str, Any], column: str) -> dict[str, str]:
    digest = hashlib.blake2b(digest_size=16)
    for image in row[column] if isinstance(row[column], list) else [row[column]]:
        digest.update(image["bytes"] if image and image["bytes"] else str(image).encode())  # else a path, or nothing
    return {"key": digest.hexdigest()}


def read_example(
    row: Mapping[str, Any], columns: Mapping[str, str], language: str, where: str, number: int | str
) -> Example:
    """Make an example of a row.

    Args:
        row: the row by column; its images decoded or as they are stored.
        columns: the column of each part, from `match_columns`.
        language: which of the question's languages to take, where the column holds one text a language.
        where: names the row in error messages.
        number: the question's id where no column has one.

    Raises:
        InputError: when the row has no question or image, or an image can't be decoded.
    """
    parts = {part: row[column] for part, column in columns.items() if row[column] is not None}
    question = parts.get("question")
    if isinstance(question, Mapping):
        if language not in question:
            raise InputError(f"{where}: no {language!r} in {sorted(question)}: see data.language")
        question = question[language]
    parts["question"] = question
    for part in ("question_id", "question", "image"):
        if part in columns and parts.get(part) in (None, "", []):
            raise InputError(f"{where}: no {part} in column {columns[part]!r}: drop the row")
    return Example(
        question_id=parts.get("question_id", number),
        question=str(question),
        images=open_images(parts["image"], where),
        answers=as_texts(parts.get("answers")),
        question_types=as_texts(parts.get("question_types")),
        where=where,
    )


def open_images(stored: Any, where: str) -> list[Image]:  # noqa: ANN401
    """Return a row's image or images, decoded where they are stored as ``{"bytes": ..., "path": ...}``.

    Raises:
        InputError: names the row whose image can't be decoded.
    """
    images = stored if isinstance(stored, list) else [stored]
    try:
        return [datasets.Image().decode_example(i) if isinstance(i, Mapping) else i for i in images]
    except Exception as error:
        raise InputError(f"{where}: the row can't be read: {error}") from error


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
