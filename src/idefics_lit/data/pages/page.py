"""The types of a synthetic page: its image, text and questions."""

from dataclasses import dataclass

from PIL.Image import Image

WIDTH, HEIGHT = 448, 336
"""The size of every page in pixels: multiples of 14, the vision encoder's patch size."""


@dataclass(frozen=True)
class Question:
    """A question whose answer is in exactly one place of the page.

    Attributes:
        text: the question.
        answers: the accepted answers; the first one is the exact text on the page.
        type: DocVQA's question type: ``form``, ``table/list``, ``free_text``, ``layout`` or ``Image/Photo``.
    """

    text: str
    answers: list[str]
    type: str


@dataclass(frozen=True)
class Page:
    """A page as returned by `render_page`.

    Attributes:
        family: the name of its family, such as ``form``.
        seed: its seed.
        image: the page, mode "L", 448 x 336 pixels.
        questions: its questions in random order.
        lines: its lines of text from top to bottom; the texts of a line are joined by a space.
        glyphs: (character, x, y) of every character but spaces, in the order of ``lines``; x, y is the character's
            center in pixels of ``image``, after the scan's rotation.
    """

    family: str
    seed: int
    image: Image
    questions: list[Question]
    lines: list[str]
    glyphs: list[tuple[str, float, float]]
