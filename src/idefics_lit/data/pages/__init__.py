"""Pages that the package renders itself: documents with questions, each a pure function of its arguments.

A family's function writes on a `Sheet`, which sees to it that nothing collides and no question is ambiguous; the sheet
is drawn, then aged as a scanner would.
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
from idefics_lit.data.pages.scan import move
from idefics_lit.data.pages.scan import scan as age
from idefics_lit.data.pages.sheet import Sheet, glyphs
from idefics_lit.data.pages.table import write_table
from idefics_lit.data.pages.words import Words
from idefics_lit.errors import InputError

__all__ = ["FAMILIES", "MAX_QUESTIONS", "Family", "Page", "Question", "page_questions", "render_page"]

MAX_QUESTIONS = 10
"""A page keeps at most so many questions, drawn at random: a large table has more than twice as many."""


class Family(NamedTuple):
    """A kind of document: its name, what writes it on a sheet, the smallest and the largest body text in pixels."""

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
"""Every family of documents. The shipped reader is trained on the first three; the others are new to it."""

Share = Literal["known", "unseen"]


def render_page(
    family: str | Family, seed: int, *, words: Share = "known", font: Share = "known", scan: bool = True
) -> Page:
    """Render a page; the same arguments give the same page, given the same Pillow and matplotlib.

    Args:
        family: one of `FAMILIES`, or a family of your own.
        seed: any number; another one gives another page.
        words: ``unseen`` takes names and things from held-out word lists only.
        font: ``unseen`` sets the page in a held-out typeface.
        scan: whether most pages look scanned (a little askew, soft, noisy) or all are clean. The text is the same.

    Raises:
        InputError: there is no such family.
    """
    family = _find(family)
    sheet = _write(family, seed, words, font)
    image, where = sheet.draw(), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    if scan:
        image, where = age(image, random.Random(f"scan {family.name} {seed}"), sheet.desk)
    rows = sheet.rows()
    lines = [" ".join(text.text for text in row) for row in rows]
    centres = [(char, *move(where, x, y)) for row in rows for text in row for char, x, y in glyphs(text)]
    return Page(family.name, seed, image, sheet.questions, lines, centres)


def page_questions(family: str, seed: int) -> list[Question]:
    """The questions of `render_page` with the same family and seed, without drawing, several times faster."""
    return _write(_find(family), seed, "known", "known").questions


def _find(family: str | Family) -> Family:
    if isinstance(family, Family):
        return family
    if family not in _FAMILIES:
        raise InputError(f"unknown family of pages {family!r}: choose from {', '.join(FAMILIES)}")
    return _FAMILIES[family]


def _write(family: Family, seed: int, words: Share, font: Share) -> Sheet:
    # A string seeds through SHA-512: the same on every Python, and no two families share a page.
    rng = random.Random(f"page {family.name} {seed}")
    sheet = Sheet(rng, Words(rng, words == "unseen"), pick_style(rng, font, family.smallest, family.largest))
    family.write(sheet)
    rng.shuffle(sheet.questions)
    del sheet.questions[MAX_QUESTIONS:]
    return sheet
