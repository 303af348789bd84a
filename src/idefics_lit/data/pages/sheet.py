"""The sheet that a family of documents writes on: it refuses overlapping text and ambiguous questions."""

import random
from typing import NamedTuple

from PIL import Image, ImageDraw

from idefics_lit.data.pages.fonts import Font, Style, advances, load
from idefics_lit.data.pages.page import HEIGHT, WIDTH, Question
from idefics_lit.data.pages.vocabulary import HONORIFICS
from idefics_lit.data.pages.words import Words

MARGIN = 8
"""Pixels at each edge without text, so that a rotated page loses none."""


class Text(NamedTuple):
    """A string with its left end and baseline in pixels; ``ink`` overrides the page's grey value of text."""

    x: float
    y: float
    text: str
    font: Font
    ink: int | None = None

    @classmethod
    def right(cls, x: float, y: float, text: str, font: Font) -> "Text":
        """Return a right-aligned text that ends at ``x``."""
        return cls(x - font.width(text), y, text, font)

    @classmethod
    def center(cls, x: float, y: float, text: str, font: Font) -> "Text":
        """Return a text centered at ``x``."""
        return cls(x - font.width(text) / 2, y, text, font)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The bounding box: left, top, right, bottom in pixels."""
        return (
            self.x,
            self.y - 0.78 * self.font.size,
            self.x + self.font.width(self.text),
            self.y + 0.22 * self.font.size,
        )


class Shape(NamedTuple):
    """A line, rectangle or ellipse between two corners."""

    kind: str
    corners: tuple[float, float, float, float]
    fill: int | None
    outline: int | None
    width: int


class Sheet:
    """Collect the texts, shapes and questions of one page, then draw it.

    Args:
        rng: the page's random generator.
        words: draws the values of the page.
        style: the page's fonts.
    """

    def __init__(self, rng: random.Random, words: Words, style: Style) -> None:
        self.rng, self.words, self.style = rng, words, style
        self.desk = self.paper = rng.randint(226, 255)
        self.ink = rng.randint(0, 80)
        self.grey = rng.randint(self.ink, 150)
        self.texts: list[Text] = []
        self.shapes: list[Shape] = []
        self.questions: list[Question] = []
        self._claimed: list[frozenset[str]] = []
        self._boxes: list[tuple[float, float, float, float]] = []

    def put(self, *texts: Text) -> bool:
        """Write texts together; if one leaves the page or overlaps another, write none and return False."""
        boxes = [text.box for text in texts]
        if not all(_on_page(box) and not any(_overlap(box, other) for other in self._boxes) for box in boxes):
            return False
        self.texts += texts
        self._boxes += boxes
        return True

    def line(self, x0: float, y0: float, x1: float, y1: float, width: int = 1) -> None:
        """Add a line."""
        self.shapes.append(Shape("line", (x0, y0, x1, y1), self.grey, None, width))

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: int | None = None, border: bool = True) -> None:
        """Add a rectangle below the text."""
        self.shapes.append(Shape("rectangle", (x0, y0, x1, y1), fill, self.grey if border else None, 1))

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: int) -> None:
        """Add an ellipse below the text."""
        self.shapes.append(Shape("ellipse", (x0, y0, x1, y1), fill, None, 1))

    def paper_slip(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Shrink the paper to a slip on a darker background."""
        self.desk = self.paper - self.rng.randint(40, 120)
        self.shapes.insert(0, Shape("rectangle", (x0, y0, x1, y1), self.paper, None, 1))

    def claim(self, *nouns: str) -> bool:
        """Reserve nouns for one fact of the page.

        Returns:
            False if another fact of the page would answer a question about one of the nouns: "name" and "company name"
            exclude each other, "invoice date" and "due date" don't.
        """
        new = [frozenset(noun.lower().split()) for noun in nouns]
        if any(a <= b or b <= a for a in new for b in self._claimed):
            return False
        self._claimed += new
        return True

    def ask(self, question: str, value: str, kind: str) -> None:
        """Add a question about ``value``; answers are the value and the value without currency, percent or "Mr."."""
        bare = value.removesuffix("%")
        for prefix in ("USD ", "$", *(f"{title} " for title in HONORIFICS)):
            bare = bare.removeprefix(prefix)
        answers = [value] if bare == value else [value, bare]
        self.questions.append(Question(question[:1].upper() + question[1:], answers, kind))

    def shift_down(self) -> None:
        """Sometimes shift everything down into the free space at the bottom."""
        bottoms = [box[3] for box in self._boxes] + [shape.corners[3] + 1 for shape in self.shapes]
        free = int(HEIGHT - MARGIN - max(bottoms))
        if free < MARGIN or self.rng.random() < 0.4:
            return
        down = self.rng.randint(0, free)
        self.texts = [text._replace(y=text.y + down) for text in self.texts]
        for i, shape in enumerate(self.shapes):
            x0, y0, x1, y1 = shape.corners
            self.shapes[i] = shape._replace(corners=(x0, y0 + down, x1, y1 + down))

    def rows(self) -> list[list[Text]]:
        """Group the texts by line, that is by baselines within 3 pixels; each line from left to right."""
        rows: list[list[Text]] = []
        for text in sorted(self.texts, key=lambda text: (text.y, text.x)):
            if rows and text.y - rows[-1][0].y <= 3:
                rows[-1].append(text)
            else:
                rows.append([text])
        return [sorted(row, key=lambda text: text.x) for row in rows]

    def draw(self) -> Image.Image:
        """Return the clean page, an image of mode "L"."""
        image = Image.new("L", (WIDTH, HEIGHT), self.desk)
        pen = ImageDraw.Draw(image)
        for shape in self.shapes:
            corners = [round(value) for value in shape.corners]
            if shape.kind == "line":
                pen.line(corners, fill=shape.fill, width=shape.width)
            else:
                getattr(pen, shape.kind)(corners, fill=shape.fill, outline=shape.outline)
        for text in self.texts:
            ink = self.ink if text.ink is None else text.ink
            pen.text((round(text.x), round(text.y)), text.text, fill=ink, font=load(text.font), anchor="ls")
        return image


def glyphs(text: Text) -> list[tuple[str, float, float]]:
    """Return (character, x, y) of a text's visible characters, with their centers in pixels."""
    widths = [advances(text.font)[char] for char in text.text]
    # Kerning makes a text narrower than the sum of its characters' widths.
    scale = text.font.width(text.text) / sum(widths)
    x, y, centers = float(round(text.x)), text.y - 0.36 * text.font.size, []
    for char, width in zip(text.text, widths, strict=True):
        if char != " ":
            centers.append((char, x + scale * width / 2, y))
        x += scale * width
    return centers


def _on_page(box: tuple[float, float, float, float]) -> bool:
    return box[0] >= MARGIN and box[1] >= MARGIN and box[2] <= WIDTH - MARGIN and box[3] <= HEIGHT - MARGIN


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] + 2 and b[0] < a[2] + 2 and a[1] < b[3] and b[1] < a[3]
