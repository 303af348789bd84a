"""Pages that the package renders itself: documents with questions, each a pure function of its arguments.

A family's function writes on a `Sheet`, which sees to it that nothing collides and no question is ambiguous; the sheet
is drawn, then aged as a scanner would.
"""

import random
from collections.abc import Callable
from typing import Literal

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

__all__ = ["FAMILIES", "MOST_QUESTIONS", "Page", "Question", "page_questions", "render_page"]

MOST_QUESTIONS = 10
"""A page keeps at most so many questions, drawn at random: a large table has more than twice as many."""

# How to write a family, and the smallest and largest body text in pixels.
_WRITERS: dict[str, tuple[Callable[[Sheet], None], int, int]] = {
    "form": (write_form, 12, 17),
    "table": (write_table, 12, 15),
    "letter": (write_letter, 12, 15),
    "receipt": (write_receipt, 12, 13),
    "invoice": (write_invoice, 11, 12),
    "id_card": (write_id_card, 12, 14),
}

FAMILIES: tuple[str, ...] = tuple(_WRITERS)
"""Every family of documents. The shipped reader is trained on the first three; the others are new to it."""

Share = Literal["known", "unseen"]


def render_page(family: str, seed: int, *, words: Share = "known", font: Share = "known", scan: bool = True) -> Page:
    """Render a page; the same arguments give the same page, given the same Pillow and matplotlib.

    Args:
        family: one of `FAMILIES`.
        seed: any number; another one gives another page.
        words: ``unseen`` takes names and things from held-out word lists only.
        font: ``unseen`` sets the page in a held-out typeface.
        scan: whether most pages look scanned (a little askew, soft, noisy) or all are clean. The text is the same.

    Raises:
        InputError: there is no such family.
    """
    sheet = _write(family, seed, words, font)
    image, where = sheet.draw(), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    if scan:
        image, where = age(image, random.Random(f"scan {family} {seed}"), sheet.desk)
    rows = sheet.rows()
    lines = [" ".join(text.text for text in row) for row in rows]
    centres = [(char, *move(where, x, y)) for row in rows for text in row for char, x, y in glyphs(text)]
    return Page(family, seed, image, sheet.questions, lines, centres)


def page_questions(family: str, seed: int) -> list[Question]:
    """The questions of `render_page` with the same family and seed, without drawing, several times faster."""
    return _write(family, seed, "known", "known").questions


def _write(family: str, seed: int, words: Share, font: Share) -> Sheet:
    if family not in _WRITERS:
        raise InputError(f"unknown family of pages {family!r}: choose from {', '.join(FAMILIES)}")
    writer, smallest, largest = _WRITERS[family]
    # A string seeds through SHA-512: the same on every Python, and no two families share a page.
    rng = random.Random(f"page {family} {seed}")
    sheet = Sheet(rng, Words(rng, words == "unseen"), pick_style(rng, font, smallest, largest))
    writer(sheet)
    rng.shuffle(sheet.questions)
    del sheet.questions[MOST_QUESTIONS:]
    return sheet
