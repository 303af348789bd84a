"""Data sets that `datasets` reads, from the Hub or a local folder, with the published column forms of DocVQA."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

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


def is_saved(source: str) -> bool:
    """Tell whether it is a folder that ``save_to_disk`` wrote."""
    return any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_splits(source: str, subset: str | None = None) -> dict[str, datasets.Dataset]:
    """Return the splits of a Hub data set or of a local folder: a saved data set, parquet, images with metadata.

    Args:
        source: a Hub id such as ``lmms-lab/DocVQA``, or a folder.
        subset: the configuration to load where the data set has several.

    Raises:
        InputError: when `datasets` can't read it.
    """
    try:
        loaded = datasets.load_from_disk(source) if is_saved(source) else datasets.load_dataset(source, subset)
    except Exception as error:
        kind = "folder" if Path(source).exists() else "file or folder here, nor a data set that the Hub has,"
        raise InputError(f"data.source {source!r} is no {kind} that can be read: {error}") from error
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)


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
        self.columns = _match_columns(dataset.column_names, columns or {}, name)
        self.dataset = dataset.select_columns(sorted(set(self.columns.values())))
        answers = self.columns.get("answers")
        self.answers = [as_texts(a) for a in dataset[answers]] if answers else [[]] * len(dataset)
        # The official ids of a page, where they were kept; else every row counts as a page of its own.
        if {"ucsf_document_id", "ucsf_document_page_no"} <= set(dataset.column_names):
            pages = zip(dataset["ucsf_document_id"], dataset["ucsf_document_page_no"], strict=True)
            self.page_ids = [f"{document} page {page}" for document, page in pages]
        else:
            self.page_ids = [str(index) for index in range(len(dataset))]

    def __len__(self) -> int:
        """Count the questions."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its pages, decoded."""
        try:
            row = {part: value for part, value in self._row(index).items() if value is not None}
        except Exception as error:
            raise InputError(f"{self.where(index)}: the row can't be read: {error}") from error
        question = row.get("question")
        if isinstance(question, Mapping):
            if self.language not in question:
                raise InputError(f"{self.where(index)}: no {self.language!r} in {sorted(question)}: see data.language")
            question = question[self.language]
        row["question"] = question
        for part in ("question_id", "question", "image"):
            if part in self.columns and row.get(part) in (None, "", []):
                raise InputError(f"{self.where(index)}: no {part} in column {self.columns[part]!r}: drop the row")
        return Example(
            question_id=row.get("question_id", index),
            question=str(question),
            images=row["image"] if isinstance(row["image"], list) else [row["image"]],
            answers=list(self.answers[index]),
            question_types=as_texts(row.get("question_types")),
            where=self.where(index),
        )

    def where(self, index: int) -> str:
        """Name a question's row for error messages."""
        return f"{self.name}, row {index}"

    def _row(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        return {part: row[column] for part, column in self.columns.items()}


def _match_columns(names: Sequence[str], given: Mapping[str, str], where: str) -> dict[str, str]:
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
