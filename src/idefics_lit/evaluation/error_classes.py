"""Classes of answers, which say what to fix."""

from collections.abc import Iterable, Sequence

from idefics_lit.evaluation.answer import Answer
from idefics_lit.metrics import anls

# In the order in which they are tried; each answer is of the first class that fits.
RIGHT, OTHER_WORDS, SLIP = "right", "right in other words", "slip"
OTHER_FIELD, EMPTY, NONSENSE = "another field of the page", "empty", "nonsense"
DESCRIPTIONS = {
    RIGHT: "equals a reference",
    OTHER_WORDS: "contains all words of a reference, or is contained in it",
    SLIP: "a similarity of 0.5 or more",
    OTHER_FIELD: "equals a reference of another question about the page",
    EMPTY: "no text",
    NONSENSE: "anything else",
}


def error_classes(answers: Sequence[Answer]) -> list[str]:
    """Return the class of each answer, one of `DESCRIPTIONS`.

    Args:
        answers: all scored answers to the questions about one page, or about the same pages.
    """
    return [_class(answer, (other for other in answers if other is not answer)) for answer in answers]


def _class(answer: Answer, others: Iterable[Answer]) -> str:
    if answer.is_right:
        return RIGHT
    if not answer.prediction.strip():
        return EMPTY
    if any(_contain(answer.prediction, reference) for reference in answer.references):
        return OTHER_WORDS
    if answer.score:
        return SLIP
    if any(anls(answer.prediction, other.references) == 1 for other in others if other.references):
        return OTHER_FIELD
    return NONSENSE


def _contain(first: str, second: str) -> bool:
    """Return whether the words of one text follow one another in the other text."""
    short, long = sorted((f" {' '.join(text.lower().split())} " for text in (first, second)), key=len)
    return bool(short.strip()) and short in long
