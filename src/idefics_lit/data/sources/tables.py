"""Find and open tables, that is CSV, TSV and JSON files whose image column holds paths relative to the file.

Texts stay exactly as they are written, see `idefics_lit.data.sources.text_files`; error messages name a row's line.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import snapshot_download
from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.data.sources.columns import ColumnMapping
from idefics_lit.data.sources.hub import HubDocVQA, stored_keys
from idefics_lit.data.sources.split_names import split_of_file
from idefics_lit.data.sources.stored_images import is_missing, locate_image
from idefics_lit.data.sources.text_files import DELIMITERS, TABLE_SUFFIXES, is_table, parse_cell, read_rows
from idefics_lit.errors import InputError
from idefics_lit.utils.hub import prepare_hub

COMPRESSED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".lz4")
LIST_FIELDS = ("image", "answers", "question_types")


def find_tables(source: Path) -> dict[str, Path]:
    """Return the file of each split; empty if there are no tables.

    Args:
        source: a folder that holds files such as ``train.csv`` and ``validation.jsonl``, or one such file. A single
            table is the training split, unless its name holds another.

    Raises:
        InputError: when two files hold one split, or no name of several tables holds a split.
    """
    if source.is_file():
        return {split_of_file(source) or "train": source} if is_table(source) else {}
    files = [file for file in sorted(source.glob("*")) if is_table(file)]
    tables: dict[str, Path] = {}
    for file in files:
        split = split_of_file(file)
        if split in tables:
            raise InputError(f"{source}: {tables[split].name} and {file.name} both hold split {split!r}: join them")
        if split:
            tables[split] = file
    has_metadata = any(file.stem == "metadata" for file in files)  # which `find_nested_tables` finds
    if tables or not files or has_metadata or any(map(_is_nested_table, source.glob("*/**/*"))):
        return tables
    if len(files) > 1:
        raise InputError(
            f"{source}: no split is named by {', '.join(file.name for file in files[:3])}: rename them to "
            f"train{files[0].suffix} and validation{files[0].suffix}, or move those of one split into a folder train"
        )
    return {"train": files[0]}


def _is_nested_table(file: Path) -> bool:
    is_json = file.suffix.lower() == ".json"  # without a split's name it may belong to one page
    return file.suffix.lower() in TABLE_SUFFIXES or (is_json and any(map(split_of_file, (file, file.parent))))


def find_nested_tables(source: str, subset: str | None = None) -> tuple[str, dict[str, list[Path]]]:
    """Find tables in subfolders, such as ``data/train.csv``, or next to images, such as ``train/metadata.jsonl``.

    Args:
        source: a folder, or the id of a Hub data set, which is downloaded if it consists of tables.
        subset: the configuration if there are several.

    Returns:
        The folder, and the files of each split; no files if the source isn't readable or holds something else, such as
        parquet.
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
    tables = {split: list(map(Path, paths)) for split, paths in (files or {}).items()}
    # `datasets` takes eval for a test split.
    if "test" in tables and all(_is_eval(file.relative_to(folder)) for file in tables["test"]):
        tables["eval"] = tables.pop("test")
    return folder, tables


def _is_eval(file: Path) -> bool:
    splits = {split_of_file(Path(part)) for part in file.parts}
    return "eval" in splits and "test" not in splits


def find_text_files(source: str, subset: str | None = None) -> dict[str, list[str]] | None:
    """Return the CSV, TSV and JSON files of each split; `datasets` finds splits by the names of files and folders.

    Returns:
        None if `datasets` can't read the source, as without a network; no files if the source holds something else.

    Raises:
        InputError: when files are compressed.
    """
    prepare_hub(source)
    try:
        builder = datasets.load_dataset_builder(source, subset)
        files = _text_files(builder)
        # `datasets` takes a folder with more images than tables for one without tables.
        if not files and builder.name == "imagefolder" and Path(source).exists() and not _compressed(builder):
            files = _text_files(datasets.load_dataset_builder("csv", data_dir=source))
    except InputError:
        raise
    except Exception:  # `load_splits` raises with the reason
        return None
    return files


def _text_files(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    files: Mapping[Any, list[str]] = builder.config.data_files or {}
    parquet = any(Path(file).name == "metadata.parquet" for paths in files.values() for file in paths)
    if parquet or builder.name not in ("csv", "json", "imagefolder"):
        return {}
    if compressed := _compressed(builder):
        if builder.name != "imagefolder":
            raise InputError(f"{compressed}: `datasets` would unpack it and change texts such as 0.10: unpack it first")
        rank_zero_warn(
            f"{compressed}: texts in it are read by `datasets`, which may change some, such as 0.10: unpack it"
        )
    texts = {
        str(split): [path for path in paths if Path(path).suffix.lower() in (*TABLE_SUFFIXES, ".json")]
        for split, paths in files.items()
    }
    return {split: paths for split, paths in texts.items() if paths}


def _compressed(builder: datasets.DatasetBuilder) -> str | None:
    files = (file for paths in (builder.config.data_files or {}).values() for file in paths)
    return next((file for file in files if Path(file).suffix.lower() in COMPRESSED), None)


class TableDocVQA(HubDocVQA):
    """The questions of one table, or of several.

    Args:
        files: a CSV or TSV with a header, in which a cell with several answers, pages or types spells a list in JSON's
            or Python's notation; a JSONL, with an object per line; a JSON list of objects.
        columns: see `idefics_lit.data.sources.columns.ColumnMapping`.
        language: see there.
        folder: the folder that image paths may not leave; by default the file's own. A path is relative to its file,
            or else to this folder.
        image_root: the folder that image paths are relative to and may not leave, instead.

    Raises:
        InputError: when a file or a row isn't readable, or a column doesn't exist. A row without a question, or whose
            image file is missing, is one of the `faults`; a page that can't be decoded raises when its example is
            requested.
    """

    def __init__(
        self,
        files: Path | Sequence[Path],
        columns: Mapping[str, str] | None = None,
        language: str = "en",
        folder: Path | None = None,
        image_root: Path | None = None,
    ) -> None:
        files = [files] if isinstance(files, Path) else files
        folder = image_root or folder or files[0].parent
        name = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        rows = [(file, number, *row) for file in files for number, row in enumerate(read_rows(file))]
        if not rows:
            raise InputError(f"{name}: it has no rows: add some")
        self.locations = [(file, number, line) for file, number, line, _ in rows]
        column_names = list(dict.fromkeys(column for *_, row in rows for column in row))
        mapping = ColumnMapping(column_names, columns, language, str(folder), name)
        needed = (*mapping.text_columns, *mapping.image_columns)
        values = {column: [row.get(column) for *_, row in rows] for column in needed}
        self._parse_cells(mapping, values, name)
        for column in mapping.image_columns:
            cells = zip(self.locations, values[column], strict=True)
            values[column] = [_image_paths(cell, image_root or file.parent, folder) for (file, *_), cell in cells]
        dataset = _to_dataset(values, mapping, name)
        super().__init__(dataset, name, columns=columns, language=language, folder=str(folder))
        images_of_rows = zip(*(values[column] for column in mapping.image_columns), strict=True)
        fault_of = cache(partial(_image_fault, folder=folder))  # many rows have the same image
        faults = [
            next(filter(None, (fault_of(i) for cell in cells for i in cell or () if isinstance(i, str))), "")
            for cells in images_of_rows
        ]
        for index, (row, _) in enumerate(self.rows):
            if faults[row]:
                self.faults.setdefault(index, f"{self.source(index)}: {faults[row]}")

    def _parse_cells(self, mapping: ColumnMapping, values: dict[str, list[Any]], name: str) -> None:
        """Replace cells that spell lists, or questions in several languages, by their values."""
        kinds: dict[str, type] = dict.fromkeys(mapping.fields["question"], dict)
        kinds |= {column: list for field in LIST_FIELDS for column in mapping.fields.get(field, ())}
        in_python = []
        for column, kind in kinds.items():
            for row, (file, _, line) in enumerate(self.locations):
                if (cell := values[column][row]) and file.suffix.lower() in DELIMITERS:
                    values[column][row], is_python = parse_cell(cell, kind)
                    in_python += [f"line {line}, column {column!r}: {cell:.100}"] if is_python else []
        if in_python:
            rank_zero_warn(
                f"{name}: {len(in_python)} cells in Python's notation are read as the lists or objects that they "
                f"spell. The first: {in_python[0]}"
            )

    def _decode(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        texts = self.mapping.text_columns
        return {name: json.loads(v) if name in texts else v for name, v in super()._decode(stored).items()}

    def _row_name(self, row: int, turn: int | None = None) -> str:
        file, number, line = self.locations[row]
        name = f"{file}, row {number}" + ("" if turn is None else f", question {turn}")
        return name if line is None else f"{name} (line {line})"

    def _stored_keys(self, images: datasets.Dataset) -> list[list[str]]:
        return list(map(stored_keys, images.with_format(None)))  # paths: there is no content to hash


def _to_dataset(values: Mapping[str, list[Any]], mapping: ColumnMapping, name: str) -> datasets.Dataset:
    """Store texts as JSON, because Arrow has one type per column and would turn 1976 next to 0.5 into 1976.0."""
    text = datasets.Value("string")
    images, texts = mapping.image_columns, mapping.text_columns
    features = {column: datasets.List(text) for column in images} | dict.fromkeys(texts, text)
    columns: dict[str, list[Any]] = {
        column: [
            [path if isinstance(path, str) else None for path in cell] if cell else None for cell in values[column]
        ]
        for column in images
    }
    columns |= {column: [json.dumps(value) for value in values[column]] for column in texts}
    try:
        return datasets.Dataset.from_dict(columns, datasets.Features(features))
    except Exception as error:
        raise InputError(f"{name}: can't be read: {error}") from error


def _image_paths(cell: Any, file_folder: Path, folder: Path) -> list[Any] | None:  # noqa: ANN401
    """Return the image paths of a cell, relative to the data's folder instead of the file's."""
    images = [] if cell is None or cell == "" else cell if isinstance(cell, list) else [cell]
    images = [image["path"] if isinstance(image, dict) and "path" in image else image for image in images]
    if file_folder != folder:
        relative = os.path.relpath(file_folder, folder)
        nested = [os.path.normpath(os.path.join(relative, i)) if isinstance(i, str) else None for i in images]
        images = [n if n and not _image_fault(n, folder) else image for n, image in zip(nested, images, strict=True)]
    return images or None


def _image_fault(image: str, folder: Path) -> str:
    """Return what is wrong with an image path that leads to no file; empty if it leads to one."""
    try:
        file = locate_image(image, str(folder)).file
    except Exception as error:
        return str(error)
    if isinstance(file, Path) and not os.path.isfile(file):
        return f"the image file {image!r:.100} {is_missing(folder, [file])}"
    return ""
