"""Read the rows of CSV, TSV, JSONL and JSON files, with every text exactly as it is written.

`datasets` reads such files with pandas and Arrow, which silently turn N/A into null, 007 into 7, 1976 next to 0.5 into
1976.0 and a column of 1976-07-04 into timestamps, and use the first column as an index if a comma in the first row
isn't quoted. The standard library's readers don't, and they know each row's line.
"""

import ast
import codecs
import csv
import io
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from idefics_lit.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
TABLE_SUFFIXES = (*DELIMITERS, ".jsonl", ".ndjson")


def is_table(file: Path) -> bool:
    """Return whether a file is one of the tables that `read_rows` reads, which hidden files are not.

    A .json file is one if it holds a list, or several lines with an object each, unlike DocVQA's official files.

    Raises:
        InputError: when a .json file isn't readable text.
    """
    if file.name.startswith(".") or not file.is_file():
        return False
    if file.suffix.lower() != ".json":
        return file.suffix.lower() in TABLE_SUFFIXES
    text = read_text(file).lstrip()
    if text.startswith("["):
        return True
    first, _, others = text.partition("\n")
    try:
        return bool(others.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def read_text(file: Path) -> str:
    """Return a file's text, decoded from UTF-8 or from UTF-16 with a byte-order mark; line ends stay as they are.

    Raises:
        InputError: when the file can't be read, or has another encoding.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error}") from error
    has_mark = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not has_mark and b"\0" in content[:4]:
        raise InputError(f"{file}: UTF-16 without a byte-order mark: save it as UTF-8")
    try:
        return content.decode("utf-16" if has_mark else "utf-8-sig")
    except UnicodeDecodeError as error:
        # Nothing in the bytes tells Windows-1252 from the other encodings of 8 bits.
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f'{file}, line {line}: not UTF-8: save it as UTF-8, in Excel as "CSV UTF-8"; or convert it, from '
            f"Windows-1252 for example: iconv -f cp1252 -t utf-8 {file.name} > new && mv new {file.name}"
        ) from error


def read_rows(file: Path) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield the line number and the values by column of each row of a file.

    The line is None in a JSON list. In ``metadata.csv`` and ``metadata.jsonl``, ``file_name`` gives an image column, as
    in `datasets`.

    Raises:
        InputError: names the file, and the line of a row, that can't be read.
    """
    suffix = file.suffix.lower()
    read = _read_csv if suffix in DELIMITERS else _read_json if suffix == ".json" else _read_jsonl
    for line, row in read(file):
        yield line, _with_images(row) if file.stem == "metadata" else row


def _with_images(row: dict[str, Any]) -> dict[str, Any]:
    """Add image columns, named as in `datasets`: ``image`` for ``file_name``, ``scan`` for ``scan_file_name``."""
    images = {}
    for name, value in row.items():
        for suffix, image in (("file_name", "image"), ("file_names", "images")):
            if name == suffix or name.endswith(f"_{suffix}"):
                images[name.removesuffix(suffix).removesuffix("_") or image] = value
    return {**row, **images}


def _read_csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with the number of its first line."""
    text = read_text(file)
    delimiter = _find_delimiter(text.partition("\n")[0], file)
    limit = csv.field_size_limit(2**31 - 1)  # the text of a page may be longer than the default limit
    line = 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names, line = next(reader, []), reader.line_num + 1
        if len({*names}) < len(names):
            raise InputError(f"{file}: two columns have the same name, of {', '.join(names)}: rename one")
        for cells in reader:
            if cells and len(cells) != len(names):
                raise InputError(
                    f"{file}, line {line}: {len(cells)} cells, but the header has {len(names)}: a text with a "
                    f"{DELIMITER_NAMES[delimiter][:-1]} in it needs double quotes around it"
                )
            if cells:
                yield line, dict(zip(names, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file}, line {line}: {error}: mend its double quotes") from error
    finally:
        csv.field_size_limit(limit)


def _find_delimiter(header: str, file: Path) -> str:
    """Return the delimiter that the file's suffix stands for, or the only other one in a header without it."""
    default = DELIMITERS[file.suffix.lower()]
    others = [delimiter for delimiter in DELIMITER_NAMES if delimiter in header]
    if default in others or not others:
        return default
    if len(others) > 1:
        names = " and ".join(DELIMITER_NAMES[delimiter] for delimiter in others)
        raise InputError(f"{file}: its header has {names}: save it with {DELIMITER_NAMES[default]}")
    return others[0]


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with its line number."""
    for line, text in enumerate(io.StringIO(read_text(file), newline=None), start=1):
        if text.strip():
            yield line, _as_object(_parse(text, f"{file}, line {line}"), f"{file}, line {line}")


def _read_json(file: Path) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield the rows of a JSON list, or of a JSONL file that is named .json."""
    content = read_text(file)
    if not content.lstrip().startswith("["):
        yield from _read_jsonl(file)
        return
    for number, row in enumerate(_parse(content, str(file))):
        yield None, _as_object(row, f"{file}, row {number}")


def _parse(text: str, name: str) -> Any:  # noqa: ANN401
    try:
        content = read_json(text)
        json.dumps(content, ensure_ascii=False).encode()  # JSON allows escapes of single surrogates, UTF-8 doesn't
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not a JSON object ({error}): mend it") from error
    return content


def _as_object(row: Any, name: str) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(row, dict):
        raise InputError(f"{name}: {type(row).__name__} is not a JSON object: mend it")
    return row


def parse_cell(cell: str, kind: type) -> tuple[Any, bool]:
    """Parse a cell that spells a list or an object.

    Args:
        cell: the cell's text.
        kind: list or dict.

    Returns:
        The value, or the text if it spells none, and whether it is in Python's notation.
    """
    if cell.strip()[:1] == ("[" if kind is list else "{"):
        for read in (read_json, read_python):
            with suppress(ValueError, RecursionError):  # an answer may begin with a bracket
                if isinstance(value := read(cell), kind):
                    return value, read is read_python
    return cell, False


def read_json(text: str) -> Any:  # noqa: ANN401
    """Parse JSON, but keep numbers and booleans such as ``0.10``, ``1e3`` and ``true`` as the texts that are written.

    An integer is an int, as ids are, unless its text would change (``-0``) or it has more than 18 digits.

    Raises:
        ValueError: the text is not JSON, or an object has a key twice.
        RecursionError: the text is nested too deeply.
    """
    return _booleans_as_written(
        json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_float=str,
            parse_int=lambda digits: digits if digits == "-0" or len(digits) > 18 else int(digits),
            parse_constant=lambda name: None if name == "NaN" else name,
        )
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice in an object")
    return content


def _booleans_as_written(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return {key: _booleans_as_written(inner) for key, inner in value.items()}
    return list(map(_booleans_as_written, value)) if isinstance(value, list) else value


# A string literal, and the white space that NumPy writes instead of a comma between two of them.
PYTHON_STRING = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(\s*(?=['"]))?""", re.DOTALL)


def read_python(text: str) -> list[Any] | dict[str, Any] | None:
    """Parse a list or dict of texts in Python's or NumPy's notation.

    Numbers become texts as they are written, ``nan`` becomes None.

    Returns:
        The list or dict; None if the text is anything else.
    """
    if text.strip()[:1] not in ("[", "{"):
        return None
    if any(match[2] == "" for match in PYTHON_STRING.finditer(text)):  # 'don''t' is SQL's notation
        return None
    with_commas = PYTHON_STRING.sub(lambda match: match[1] + (", " if match[2] else ""), text.strip())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences
            content = ast.parse(with_commas, mode="eval").body
        if isinstance(content, ast.List):
            return [_literal_text(item, with_commas) for item in content.elts]
        if isinstance(content, ast.Dict):
            keys = [ast.literal_eval(key) for key in content.keys if key]
            values = [_literal_text(value, with_commas) for value in content.values]
            return dict(zip(keys, values, strict=True)) if all(isinstance(key, str) for key in keys) else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return None


def _literal_text(node: ast.expr, source: str) -> str | None:
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
