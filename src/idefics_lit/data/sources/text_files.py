"""The rows of CSV, TSV, JSONL and JSON files, with every text as it is written.

What is special here: pandas and Arrow, with which `datasets` reads such files, turn N/A into nothing, 007 into 7, 1976
beside 0.5 into 1976.0, a column of 1976-07-04 into times, and take the first column for row names where a comma in the
first row isn't quoted, all of it silently. Python's own readers don't, and know each row's line.
"""

import ast
import csv
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from idefics_lit.errors import InputError

DIVIDERS = {".csv": ",", ".tsv": "\t"}
KINDS = (*DIVIDERS, ".jsonl", ".ndjson")


def read_rows(file: Path) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield each row of a file by column, with its line where it has one of its own.

    A row of ``metadata.csv`` or ``metadata.jsonl`` has the images that `datasets` makes of its ``file_name`` too.

    Raises:
        InputError: names the file, and the line of a row, that can't be read.
    """
    suffix = file.suffix.lower()
    read = _read_csv if suffix in DIVIDERS else _read_json if suffix == ".json" else _read_jsonl
    try:
        for line, row in read(file):
            yield line, _with_images(row) if file.stem == "metadata" else row
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable text file in UTF-8 ({error}): save it as one") from error


def _with_images(row: dict[str, Any]) -> dict[str, Any]:
    """Add the columns that `datasets` makes of paths: ``image`` of ``file_name``, ``scan`` of ``scan_file_name``."""
    images = {}
    for name, value in row.items():
        for end, image in (("file_name", "image"), ("file_names", "images")):
            if name == end or name.endswith(f"_{end}"):
                images[name.removesuffix(end).removesuffix("_") or image] = value
    return {**row, **images}


def _read_csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with the line that it begins in."""
    divider = DIVIDERS[file.suffix.lower()]
    known = {",": "commas", "\t": "tabs"}
    limit = csv.field_size_limit(2**31 - 1)  # the text of a page may be longer than Python's own limit
    line = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, delimiter=divider, strict=True)
            names, line = next(reader, []), reader.line_num + 1
            if len(names) == 1 and (other := next((c for c in ";\t," if c in names[0]), None)):
                raise InputError(f"{file}: its columns are divided by {other!r}: save it with {known[divider]}")
            if len({*names}) < len(names):
                raise InputError(f"{file}: two columns have the same name, of {', '.join(names)}: rename one")
            for cells in reader:
                if cells and len(cells) != len(names):
                    raise InputError(
                        f"{file}, line {line}: {len(cells)} cells, but the header has {len(names)}: a text with a "
                        f"{known[divider][:-1]} in it needs double quotes around it"
                    )
                if cells:
                    yield line, dict(zip(names, cells, strict=True))
                line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file}, line {line}: {error}: mend its double quotes") from error
    finally:
        csv.field_size_limit(limit)


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with its line."""
    with file.open(encoding="utf-8-sig") as opened:
        for line, text in enumerate(opened, start=1):
            if text.strip():
                yield line, _as_object(_parse(text, f"{file}, line {line}"), f"{file}, line {line}")


def _read_json(file: Path) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield the objects of a list, or each line's."""
    content = file.read_text(encoding="utf-8-sig")
    if not content.lstrip().startswith("["):
        yield from _read_jsonl(file)
        return
    for number, row in enumerate(_parse(content, str(file))):
        yield None, _as_object(row, f"{file}, row {number}")


def _parse(text: str, where: str) -> Any:  # noqa: ANN401
    try:
        content = read_json(text)
        json.dumps(content, ensure_ascii=False).encode()  # escapes of halves of characters are JSON, but no text
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a JSON object ({error}): mend it") from error
    return content


def _as_object(row: Any, where: str) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(row, dict):
        raise InputError(f"{where}: {type(row).__name__} is not a JSON object: mend it")
    return row


def open_cell(cell: str, kind: type) -> tuple[Any, bool]:
    """Return the list or object that a cell spells, and whether in Python's notation; else its text."""
    if cell.strip()[:1] == ("[" if kind is list else "{"):
        for read in (read_json, read_python):
            with suppress(ValueError, RecursionError):  # an answer may begin with a bracket
                if isinstance(found := read(cell), kind):
                    return found, read is read_python
    return cell, False


def read_json(text: str) -> Any:  # noqa: ANN401
    """Return what a JSON text holds, with ``0.10``, ``1e3``, ``true`` and the like as texts, as they are written.

    A whole number is an int, as ids are, unless more than 18 digits or ``-0`` make it another text.

    Raises:
        ValueError: it is not JSON, or an object has a key twice.
        RecursionError: it is nested too deeply.
    """
    return _as_written(
        json.loads(
            text,
            object_pairs_hook=_object,
            parse_float=str,
            parse_int=lambda digits: digits if digits == "-0" or len(digits) > 18 else int(digits),
            parse_constant=lambda name: None if name == "NaN" else name,
        )
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice in an object")
    return content


def _as_written(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return {key: _as_written(inner) for key, inner in value.items()}
    return list(map(_as_written, value)) if isinstance(value, list) else value


# A text in Python's notation, and the white space that alone divides it from the next one where NumPy wrote the list.
PYTHON_TEXT = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(\s*(?=['"]))?""", re.DOTALL)


def read_python(text: str) -> list[Any] | dict[str, Any] | None:
    """Return the list of texts, or the object of texts, that a text spells in Python's or NumPy's notation.

    Numbers in it are texts as they are written, ``nan`` is None.

    Returns:
        None: where it spells anything else.
    """
    if text.strip()[:1] not in ("[", "{"):
        return None
    if any(found[2] == "" for found in PYTHON_TEXT.finditer(text)):  # 'don''t' is another notation
        return None
    divided = PYTHON_TEXT.sub(lambda found: found[1] + (", " if found[2] else ""), text.strip())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes
            content = ast.parse(divided, mode="eval").body
        if isinstance(content, ast.List):
            return [_python_text(item, divided) for item in content.elts]
        if isinstance(content, ast.Dict):
            keys = [ast.literal_eval(key) for key in content.keys if key]
            values = [_python_text(value, divided) for value in content.values]
            return dict(zip(keys, values, strict=True)) if all(isinstance(key, str) for key in keys) else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return None


def _python_text(node: ast.expr, source: str) -> str | None:
    if isinstance(node, ast.Name) and node.id == "nan":
        return None
    if isinstance(node, ast.Call) and len(node.args) == 1 and ast.unparse(node.func).startswith("np."):
        node = node.args[0]  # np.str_('a')
    value = ast.literal_eval(node)
    if isinstance(value, (int, float)):
        return ast.get_source_segment(source, node)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} is no text")
    return value
