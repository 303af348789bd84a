"""Check arguments that are lists of strings."""

from collections.abc import Iterable, Mapping, Set

from idefics_lit.errors import InputError


def list_of_texts(value: object, what: str) -> list[str]:
    """Return strings as a list; a single string is a list of one, not a list of its characters.

    Args:
        value: a string or an ordered iterable of strings.
        what: names the value in error messages.

    Raises:
        InputError: the value or one of its items has another type.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, (bytes, bytearray, Mapping, Set)) or not isinstance(value, Iterable):
        raise InputError(f"{what}: {type(value).__name__} {value!r:.100} is not a list of strings: give one")
    texts = list(value)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{what}: {type(text).__name__} {text!r:.100} is not a string: give a list of strings")
    return texts
