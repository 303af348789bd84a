"""What a rendered page is: an image, its text and the questions on it."""

from dataclasses import dataclass

from PIL.Image import Image

WIDTH, HEIGHT = 448, 336
"""Size of every page in pixels: multiples of 14, the vision tower's patch."""


@dataclass(frozen=True)
class Question:
    """A question that the page answers in exactly one place.

    Attributes:
        text: the question.
        answers: the accepted answers; the first one is what stands on the page, letter by letter.
        type: DocVQA's name for its kind: ``form``, ``table/list``, ``free_text``, ``layout`` or
            ``Image/Photo``.
    """

    text: str
    answers: list[str]
    type: str


@dataclass(frozen=True)
class Page:
    """A page as `render_page` makes it.

    Attributes:
        family: the family of documents it belongs to, such as ``form``.
        seed: the number it was made from.
        image: the page, mode "L", 448 x 336 pixels.
        questions: its questions in random order.
        lines: its lines of text from top to bottom; parts of one line are joined by a space.
        glyphs: (character, x, y) of every character that is not a space, in the order of ``lines``; x, y is the
            character's centre in pixels of ``image``, rotation by the scanner included.
    """

    family: str
    seed: int
    image: Image
    questions: list[Question]
    lines: list[str]
    glyphs: list[tuple[str, float, float]]
