"""Fonts shipped with Python packages, so that a page is the same on every machine.

DejaVu and STIX are files of matplotlib, which isn't imported. Aileron is Pillow's default font and held out: no page
with ``font="known"`` uses it.
"""

import importlib.util
import random
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFont

from idefics_lit.errors import InputError

REGULAR = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "DejaVuSans-Oblique", "DejaVuSerif-Italic")
BOLD = ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "STIXGeneralBol")
UNSEEN = "Aileron"


class Font(NamedTuple):
    """A typeface at a size in pixels."""

    face: str
    size: int

    def width(self, text: str) -> float:
        """Return the width of a text in pixels."""
        return _width(self, text)

    def at(self, size: int) -> "Font":
        """Return the typeface at another size."""
        return Font(self.face, size)


class Style(NamedTuple):
    """The fonts of one page: of body text, of labels, of headings."""

    body: Font
    label: Font
    heading: Font


def pick_style(rng: random.Random, font: str, smallest: int, largest: int) -> Style:
    """Draw the fonts of a page at random, with body text of ``smallest`` to ``largest`` pixels."""
    size = rng.randint(smallest, largest)
    if font == "unseen":
        body = label = heading = UNSEEN
    else:
        body, bold = rng.choice(REGULAR + REGULAR + BOLD), rng.choice(BOLD)
        label = rng.choice((body, body, bold))
        heading = rng.choice((label, bold, bold))
    return Style(Font(body, size), Font(label, size), Font(heading, min(size + rng.randint(1, 6), 20)))


@cache
def load(font: Font) -> ImageFont.FreeTypeFont:
    """Load a font with Pillow's basic layout engine; Raqm isn't on every machine and lays text out differently."""
    basic = ImageFont.Layout.BASIC
    if font.face == UNSEEN:
        return ImageFont.load_default(font.size).font_variant(layout_engine=basic)  # type: ignore[union-attr]
    return ImageFont.truetype(str(_folder() / f"{font.face}.ttf"), font.size, layout_engine=basic)


@lru_cache(maxsize=2**16)  # a page is laid out twice: for its questions, and when it is drawn
def _width(font: Font, text: str) -> float:
    return load(font).getlength(text)


@cache
def advances(font: Font) -> dict[str, float]:
    """Return the width in pixels of each printable ASCII character."""
    return {chr(code): font.width(chr(code)) for code in range(32, 127)}


@cache
def _folder() -> Path:
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("synthetic pages use the fonts that matplotlib ships: pip install matplotlib")
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
