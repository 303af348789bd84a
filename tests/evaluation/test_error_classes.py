"""The classes of answers."""

import pytest

from idefics_lit.evaluation.answer import Answer
from idefics_lit.evaluation.error_classes import DESCRIPTIONS, error_classes
from idefics_lit.metrics import anls


def answer(prediction, *references):
    return Answer(0, "What?", prediction, [*references], anls(prediction, [*references]), [], -1.0, 4)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("July  4, 1976", "july 4, 1976", "right"),
        ("on July 4, 1976", "July 4, 1976", "right in other words"),
        ("Smith", "Dr. Ann Smith", "right in other words"),
        ("1976", "19760", "slip"),  # part of a word isn't a word
        ("1", "10 July 1976", "nonsense"),
        ("Rosebury", "Roseberry", "slip"),
        ("Paris", "Rome", "another field of the page"),
        ("rome", "Paris", "nonsense"),
        ("", "Rome", "empty"),
        (" ", "Rome", "empty"),
        ("", "", "right"),
    ],
)
def test_each_answer_has_the_first_class_that_fits(prediction, reference, expected):
    others = [answer("x", "Paris", "city of Paris"), answer("Rome", "Bern")]
    assert error_classes([others[0], answer(prediction, reference), others[1]])[1] == expected
    assert expected in DESCRIPTIONS


def test_the_own_references_are_no_other_field():
    """Nor those of another page."""
    assert error_classes([answer("Paris", "Rome")]) == ["nonsense"]
