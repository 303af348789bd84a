"""CSV and JSONL files whose image column holds paths, relative to the file.

What is special here: texts stay as they are written. pandas and Arrow, with which `datasets` reads such files, turn N/A
into nothing, a column of 1976-07-04 into times, and take the first column for row names where a comma in the first row
isn't quoted, all of it silently; Python's own readers don't, and know each row's line.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets

from idefics_lit.data.forms import Form
from idefics_lit.data.hub import HubDocVQA, stored_keys
from idefics_lit.data.images import locate
from idefics_lit.errors import InputError

KINDS = (".csv", ".jsonl")
SPLITS = ("train", "validation", "val", "test")
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


class TableDocVQA(HubDocVQA):
    """The questions of one file.

    Args:
        file: a CSV in UTF-8, with commas and a header, where several answers, pages or types are a JSON list in their
            cell; or a JSONL, an object a line.
        columns: see `idefics_lit.data.forms.Form`.
        language: see `idefics_lit.data.forms.Form`.

    Raises:
        InputError: when the file or a row of it isn't readable, or a column isn't there. A row without question, or
            whose image file is missing, is one of the `faults`; a page that can't be decoded raises when it is asked
            for.
    """

    def __init__(self, file: Path, columns: Mapping[str, str] | None = None, language: str = "en") -> None:
        try:
            read = list(_read_csv(file) if file.suffix.lower() == ".csv" else _read_jsonl(file))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: not a readable text file in UTF-8 ({error}): save it as one") from error
        if not read:
            raise InputError(f"{file}: it has no rows: add some")
        self.lines = [line for line, _ in read]
        names = list(dict.fromkeys(name for _, row in read for name in row))
        form = Form(names, columns, language, str(file.parent), str(file))
        stored = {name: [row.get(name) for _, row in read] for name in names}
        for name in (name for part in LISTS for name in form.parts.get(part, ())):
            stored[name] = [_listed(value, file.suffix.lower() == ".csv") for value in stored[name]]
        try:
            dataset = datasets.Dataset.from_dict(stored, on_mixed_types="use_json")
        except Exception as error:
            raise InputError(f"{file}: can't be read: {error}") from error
        super().__init__(dataset, str(file), columns, language, str(file.parent))
        pages = zip(*(stored[name] for name in form.image_columns), strict=True)
        missing = [_missing([image for some in row for image in some or ()], file.parent) for row in pages]
        for index, (row, _) in enumerate(self.rows):
            if missing[row]:
                self.faults.setdefault(index, f"{self.where(index)}: {missing[row]}")

    def _name(self, row: int, turn: int | None = None) -> str:
        return f"{super()._name(row, turn)} (line {self.lines[row]})"

    def _stored_keys(self, images: datasets.Dataset) -> list[list[str]]:
        return list(map(stored_keys, images.with_format(None)))  # nothing to read for it: paths


def _read_csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with the line that it begins in."""
    with file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, strict=True)
        names, line = next(reader, []), reader.line_num + 1
        if len(names) == 1 and (divider := next((c for c in ";\t" if c in names[0]), None)):
            raise InputError(f"{file}: its columns are divided by {divider!r}: save it with commas")
        if len({*names}) < len(names):
            raise InputError(f"{file}: two columns have the same name, of {', '.join(names)}: rename one")
        try:
            for cells in reader:
                if cells and len(cells) != len(names):
                    raise InputError(
                        f"{file}, line {line}: {len(cells)} cells, but the header has {len(names)}: a text with a "
                        f"comma in it needs double quotes around it"
                    )
                if cells:
                    yield line, dict(zip(names, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{file}, line {line}: {error}: mend its double quotes") from error


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with its line."""
    with file.open(encoding="utf-8-sig") as opened:
        for line, text in enumerate(opened, start=1):
            try:
                row = json.loads(text) if text.strip() else {}
                json.dumps(row, ensure_ascii=False).encode()  # escapes of halves of characters are JSON, but no text
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}, line {line}: not a JSON object ({error}): mend it") from error
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {line}: {type(row).__name__} is not a JSON object: mend it")
            if row:
                yield line, row


def _listed(value: Any, is_cell: bool) -> list[Any] | None:  # noqa: ANN401
    """Return the texts that a row has, as a list; None where there is none."""
    if is_cell and value.strip()[:1] == "[":
        with suppress(ValueError, RecursionError):  # an answer may begin with a bracket
            value = json.loads(value, parse_int=str, parse_float=str)  # numbers as they are written
    if value is None or value == "":
        return None
    return value if isinstance(value, list) else [value]


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
