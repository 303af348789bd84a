"""Lists of texts, as callers give them."""

from collections.abc import Iterable, Mapping, Set

from idefics_lit.errors import InputError


def list_of_texts(value: object, what: str) -> list[str]:
    """Return texts as a list; a single text is a list of one, not a list of its characters.

    Args:
        value: a text or an iterable of texts.
        what: names it in the error.

    Raises:
        InputError: the value is, or holds, something that is no text, or has no order.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, (bytes, bytearray, Mapping, Set)) or not isinstance(value, Iterable):
        raise InputError(f"{what}: {type(value).__name__} {value!r:.100} is no list of texts: give one")
    texts = list(value)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{what}: {type(text).__name__} {text!r:.100} is no text: give a list of texts")
    return texts
