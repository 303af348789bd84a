"""Convert stored values to the texts, ids and page indices of an example."""

from collections.abc import Callable, Mapping
from typing import Any

from idefics_lit.errors import InputError


def as_text(value: object) -> str:
    """Return a stored text or number as text; None, NaN and white space are "".

    Raises:
        ValueError: names what isn't text: a list, an object, or a character that can't be encoded in UTF-8.
    """
    if isinstance(value, (Mapping, list, tuple, bytes)):
        raise ValueError(f"holds {type(value).__name__} where a text should be")
    if value is None or value != value:
        return ""
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds {text[error.start]!r}, a character that is no text") from error
    return text if text.strip() else ""


def as_id(value: object) -> int | str:
    """Return a stored id: an int unchanged, anything else as `as_text` does."""
    text = as_text(value)
    return value if type(value) is int else text


def as_texts(value: object) -> list[str]:
    """Return a stored text or list of texts as a list, without empty texts.

    Raises:
        ValueError: as `as_text` does.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    return [text for text in map(as_text, values) if text]


def as_page(value: object) -> int | None:
    """Return a stored page index, or None if the value is empty or -1.

    Raises:
        ValueError: as `as_text` does; also when the value isn't an integer from -1.
    """
    text = as_text(value)
    try:
        number = float(text or -1)  # Arrow stores an integer column with gaps as floats
    except ValueError:
        number = 0.5
    if not number.is_integer() or number < -1:  # -1 often means that there is none
        raise ValueError(f"holds {text!r:.100} where the number of a page should be")
    return int(number) if number >= 0 else None


def convert(value: object, function: Callable[[object], Any], name: str) -> Any:  # noqa: ANN401
    """Convert a stored value with one of the functions above.

    Args:
        value: the value.
        function: the conversion.
        name: the row and the column, for the error message.

    Raises:
        InputError: names the row and the column whose value can't be converted.
    """
    try:
        return function(value)
    except ValueError as error:
        raise InputError(f"{name} {error}: mend it or drop the row") from error


def read_answers(read: Callable[[int], list[str]], count: int) -> tuple[list[list[str]], dict[int, str]]:
    """Read the answers of every row.

    Args:
        read: returns a row's answers; its `InputError` names the row.
        count: the number of rows.

    Returns:
        The answers of each row, empty for bad rows, and the error messages of the bad rows, by index.
    """
    answers: list[list[str]] = [[] for _ in range(count)]
    faults = {}
    for row in range(count):
        try:
            answers[row] = read(row)
        except InputError as error:
            faults[row] = str(error)
    return answers, faults
