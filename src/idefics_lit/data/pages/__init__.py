"""Generate synthetic document pages with questions; each page is a pure function of its arguments.

A family's function writes on a `Sheet`, which prevents overlapping text and ambiguous questions. The sheet is drawn and
then degraded like a scan.
"""

import random
from collections.abc import Callable
from typing import Literal, NamedTuple

from idefics_lit.data.pages.fonts import pick_style
from idefics_lit.data.pages.form import write_form
from idefics_lit.data.pages.id_card import write_id_card
from idefics_lit.data.pages.invoice import write_invoice
from idefics_lit.data.pages.letter import write_letter
from idefics_lit.data.pages.page import Page, Question
from idefics_lit.data.pages.receipt import write_receipt
from idefics_lit.data.pages.scan import degrade, transform_point
from idefics_lit.data.pages.sheet import Sheet, glyphs
from idefics_lit.data.pages.table import write_table
from idefics_lit.data.pages.words import Words
from idefics_lit.errors import InputError

__all__ = ["FAMILIES", "MAX_QUESTIONS", "Family", "Page", "Question", "page_questions", "render_page"]

MAX_QUESTIONS = 10
"""The largest number of questions about a page; of more, which a large table has, a random sample is kept."""


class Family(NamedTuple):
    """A kind of document: its name, the function that writes it, the smallest and largest font size in pixels."""

    name: str
    write: Callable[[Sheet], None]
    smallest: int
    largest: int


_FAMILIES = {
    family.name: family
    for family in (
        Family("form", write_form, 12, 17),
        Family("table", write_table, 12, 15),
        Family("letter", write_letter, 12, 15),
        Family("receipt", write_receipt, 12, 13),
        Family("invoice", write_invoice, 11, 12),
        Family("id_card", write_id_card, 12, 14),
    )
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""Every family of documents. The shipped reader is trained on the first three only."""

Vocabulary = Literal["known", "unseen"]


def render_page(
    family: str | Family, seed: int, *, words: Vocabulary = "known", font: Vocabulary = "known", scan: bool = True
) -> Page:
    """Render a page; the same arguments give the same page, with the same versions of Pillow and matplotlib.

    Args:
        family: one of `FAMILIES`, or a `Family`.
        seed: any number; a different seed gives a different page.
        words: ``unseen`` draws names and things from held-out word lists only.
        font: ``unseen`` uses a held-out typeface.
        scan: degrade most pages like scans (rotated, blurred, noisy); if False, all are clean. The text is the same.

    Raises:
        InputError: when the family doesn't exist.
    """
    family = _get_family(family)
    sheet = _write(family, seed, words, font)
    image, transform = sheet.draw(), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    if scan:
        image, transform = degrade(image, random.Random(f"scan {family.name} {seed}"), sheet.desk)
    rows = sheet.rows()
    lines = [" ".join(text.text for text in row) for row in rows]
    centers = [(char, *transform_point(transform, x, y)) for row in rows for text in row for char, x, y in glyphs(text)]
    return Page(family.name, seed, image, sheet.questions, lines, centers)


def page_questions(family: str, seed: int) -> list[Question]:
    """Return the questions of `render_page` with this family and seed, several times faster, without drawing."""
    return _write(_get_family(family), seed, "known", "known").questions


def _get_family(family: str | Family) -> Family:
    if isinstance(family, Family):
        return family
    if family not in _FAMILIES:
        raise InputError(f"unknown family of pages {family!r}: choose from {', '.join(FAMILIES)}")
    return _FAMILIES[family]


def _write(family: Family, seed: int, words: Vocabulary, font: Vocabulary) -> Sheet:
    # Python hashes a string seed with SHA-512: the same everywhere, and families don't share pages.
    rng = random.Random(f"page {family.name} {seed}")
    sheet = Sheet(rng, Words(rng, words == "unseen"), pick_style(rng, font, family.smallest, family.largest))
    family.write(sheet)
    rng.shuffle(sheet.questions)
    del sheet.questions[MAX_QUESTIONS:]
    return sheet
