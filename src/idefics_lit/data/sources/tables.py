"""CSV, TSV and JSON files whose image column holds paths, relative to the file.

What is special here: texts stay as they are written (`idefics_lit.data.sources.text_files`); rows are named by line.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import snapshot_download
from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.data.images import locate
from idefics_lit.data.sources.columns import ColumnMapping
from idefics_lit.data.sources.hub import HubDocVQA, stored_keys
from idefics_lit.data.sources.text_files import DIVIDERS, KINDS, open_cell, read_rows
from idefics_lit.errors import InputError

SPLITS = ("train", "validation", "val", "test")
PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".lz4")
LISTS = ("image", "answers", "question_types")  # the parts of which a row may have several


def find_tables(source: Path) -> dict[str, Path]:
    """Return the file of each split; none where there is no such file.

    Args:
        source: a folder that holds files such as ``train.csv`` and ``validation.jsonl``, or one such file.

    Raises:
        InputError: when two files hold one split.
    """
    if source.suffix.lower() in KINDS and source.is_file():
        return {_split(source) or "train": source}
    tables: dict[str, Path] = {}
    for file in sorted(source.glob("*")):
        split = _split(file) if file.suffix.lower() in KINDS and file.is_file() else None
        if split in tables:
            raise InputError(f"{source}: {tables[split].name} and {file.name} both hold split {split!r}: join them")
        if split:
            tables[split] = file
    return tables


def _split(file: Path) -> str | None:
    return next((split for split in SPLITS if file.name.lower().startswith(split)), None)


def find_nested_tables(source: str, subset: str | None = None) -> tuple[str, dict[str, list[Path]]]:
    """Return the folder, and each split's files, where they are such as ``data/train.csv`` or ``train/metadata.jsonl``.

    Args:
        source: a folder, or a Hub id, whose folder is downloaded where it holds such files.
        subset: the configuration where there are several.

    Returns:
        No files where there is something else, such as parquet, or nothing that can be read.
    """
    files = find_text_files(source, subset)
    folder = source
    if not Path(source).exists() and files != {}:
        try:
            folder = snapshot_download(source, repo_type="dataset", local_files_only=files is None)
        except Exception as error:
            if files is None:
                return source, {}
            raise InputError(f"data.source {source!r} can't be downloaded: {error}") from error
        files = find_text_files(folder, subset)
    return folder, {split: list(map(Path, some)) for split, some in (files or {}).items()}


def find_text_files(source: str, subset: str | None = None) -> dict[str, list[str]] | None:
    """Return the CSV, TSV and JSON files of each split, which `datasets` tells by the names of files and folders.

    Returns:
        None where `datasets` can't read the source, as without a network; no files where it holds something else.

    Raises:
        InputError: some are packed.
    """
    try:
        builder = datasets.load_dataset_builder(source, subset)
        files = _text_files(builder)
        # One that has more images than tables.
        if not files and builder.name == "imagefolder" and Path(source).exists() and not _packed(builder):
            files = _text_files(datasets.load_dataset_builder("csv", data_dir=source))
    except InputError:
        raise
    except Exception:  # `load_splits` says why
        return None
    return files


def _text_files(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    files: Mapping[Any, list[str]] = builder.config.data_files or {}
    parquet = any(Path(file).name == "metadata.parquet" for some in files.values() for file in some)
    if parquet or builder.name not in ("csv", "json", "imagefolder"):
        return {}
    if packed := _packed(builder):
        if builder.name != "imagefolder":
            raise InputError(f"{packed}: `datasets` would unpack it and change texts such as 0.10: unpack it first")
        rank_zero_warn(f"{packed}: texts in it are read by `datasets`, which may change some, such as 0.10: unpack it")
    texts = {
        str(split): [f for f in some if Path(f).suffix.lower() in (*KINDS, ".json")] for split, some in files.items()
    }
    return {split: some for split, some in texts.items() if some}


def _packed(builder: datasets.DatasetBuilder) -> str | None:
    files = (file for some in (builder.config.data_files or {}).values() for file in some)
    return next((file for file in files if Path(file).suffix.lower() in PACKED), None)


class TableDocVQA(HubDocVQA):
    """The questions of one file, or of several.

    Args:
        files: a CSV in UTF-8, with commas and a header, or a TSV, where several answers, pages or types are a list in
            their cell, in JSON's or Python's notation; a JSONL, an object a line; a JSON, a list of objects.
        columns: see `idefics_lit.data.sources.columns.ColumnMapping`.
        language: see `idefics_lit.data.sources.columns.ColumnMapping`.
        folder: which images' paths may not lead out of; the file's own unless given. A path is relative to its file,
            or else to this folder.

    Raises:
        InputError: when a file or a row of it isn't readable, or a column isn't there. A row without question, or
            whose image file is missing, is one of the `faults`; a page that can't be decoded raises when it is asked
            for.
    """

    def __init__(
        self,
        files: Path | Sequence[Path],
        columns: Mapping[str, str] | None = None,
        language: str = "en",
        folder: Path | None = None,
    ) -> None:
        files = [files] if isinstance(files, Path) else files
        folder = folder or files[0].parent
        name = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        read = [(file, number, *row) for file in files for number, row in enumerate(read_rows(file))]
        if not read:
            raise InputError(f"{name}: it has no rows: add some")
        self.places = [(file, number, line) for file, number, line, _ in read]
        names = list(dict.fromkeys(column for *_, row in read for column in row))
        form = ColumnMapping(names, columns, language, str(folder), name)
        stored = {column: [row.get(column) for *_, row in read] for column in (*form.text_columns, *form.image_columns)}
        self._open_cells(form, stored, name)
        for column in form.image_columns:
            images = zip(self.places, stored[column], strict=True)
            stored[column] = [_from_folder(value, file.parent, folder) for (file, *_), value in images]
        pages = list(zip(*(stored[column] for column in form.image_columns), strict=True))
        super().__init__(_as_dataset(stored, form, name), name, columns, language, str(folder))
        missing = [_missing([image for some in row for image in some or ()], folder) for row in pages]
        for index, (row, _) in enumerate(self.rows):
            if missing[row]:
                self.faults.setdefault(index, f"{self.source(index)}: {missing[row]}")

    def _open_cells(self, form: ColumnMapping, stored: dict[str, list[Any]], name: str) -> None:
        """Put in their place the lists, and the questions in several languages, that cells spell."""
        kinds = {
            **dict.fromkeys(form.parts["question"], dict),
            **{c: list for p in LISTS for c in form.parts.get(p, ())},
        }
        in_python = []
        for column, kind in kinds.items():
            for row, (file, _, line) in enumerate(self.places):
                if (cell := stored[column][row]) and file.suffix.lower() in DIVIDERS:
                    stored[column][row], is_python = open_cell(cell, kind)
                    in_python += [f"line {line}, column {column!r}: {cell:.100}"] if is_python else []
        if in_python:
            rank_zero_warn(
                f"{name}: {len(in_python)} cells in Python's notation are read as the lists or objects that they "
                f"spell. The first: {in_python[0]}"
            )

    def _row(self, dataset: datasets.Dataset, row: int) -> dict[str, Any]:
        texts = self.mapping.text_columns
        return {name: json.loads(v) if name in texts else v for name, v in super()._row(dataset, row).items()}

    def _name(self, row: int, turn: int | None = None) -> str:
        file, number, line = self.places[row]
        place = f"{file}, row {number}" + ("" if turn is None else f", question {turn}")
        return place if line is None else f"{place} (line {line})"

    def _stored_keys(self, images: datasets.Dataset) -> list[list[str]]:
        return list(map(stored_keys, images.with_format(None)))  # nothing to read for it: paths


def _as_dataset(stored: Mapping[str, list[Any]], form: ColumnMapping, name: str) -> datasets.Dataset:
    """Store texts as JSON: Arrow has one type a column, and would make 1976 beside 0.5 a 1976.0."""
    text = datasets.Value("string")
    features = {column: datasets.List(text) for column in form.image_columns} | dict.fromkeys(form.text_columns, text)
    columns: dict[str, list[Any]] = {
        column: [[i if isinstance(i, str) else None for i in some] if some else None for some in stored[column]]
        for column in form.image_columns
    }
    columns |= {column: [json.dumps(value) for value in stored[column]] for column in form.text_columns}
    try:
        return datasets.Dataset.from_dict(columns, datasets.Features(features))
    except Exception as error:
        raise InputError(f"{name}: can't be read: {error}") from error


def _from_folder(value: Any, own: Path, folder: Path) -> list[Any] | None:  # noqa: ANN401
    """Return the images that a row names, their paths relative to the data's folder and no more to the file's own."""
    images = [image["path"] if isinstance(image, dict) and "path" in image else image for image in _some(value)]
    if own != folder:
        nested = [
            os.path.normpath(os.path.join(os.path.relpath(own, folder), image)) if isinstance(image, str) else None
            for image in images
        ]
        images = [n if n and os.path.isfile(folder / n) else image for n, image in zip(nested, images, strict=True)]
    return images or None


def _some(value: Any) -> list[Any]:  # noqa: ANN401
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]


def _missing(images: list[Any], folder: Path) -> str:
    """Say what is wrong with the first image whose file isn't there, or nothing."""
    for image in images:
        try:
            place = locate(image, str(folder)) if isinstance(image, str) else None
        except Exception as error:
            return str(error)
        if isinstance(place, Path) and not os.path.isfile(place):
            return f"the image file {image!r:.100} is missing in {folder}"
    return ""
