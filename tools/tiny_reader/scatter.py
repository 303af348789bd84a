"""Training pages of densely scattered strings, with questions about their neighbours.

They teach the reader to read every position of a page, small type and random strings, and to find the neighbour of a
text, which unseen layouts require.
"""

import string
from itertools import pairwise

from idefics_lit.data.pages import Family, Question
from idefics_lit.data.pages.fonts import Font
from idefics_lit.data.pages.page import HEIGHT, WIDTH
from idefics_lit.data.pages.sheet import MARGIN, Sheet, Text


def write_scatter(sheet: Sheet) -> None:
    """Write one to three columns of strings and pairs of strings on a sheet."""
    rng = sheet.rng
    edges = [MARGIN + 2, *sorted(rng.sample(range(140, 320, 20), rng.choice((0, 0, 0, 1, 1, 2)))), WIDTH - MARGIN - 2]
    for left, right in pairwise(edges):
        if right - left > 90:
            _column(sheet, left, right - 8)
    if len(edges) == 2 and rng.random() < 0.4:
        bottom = max((text.y for text in sheet.texts), default=HEIGHT) + 14
        sheet.paper_slip(edges[0] - 8, 0, edges[1] + 8, min(bottom, HEIGHT))


def _column(sheet: Sheet, left: float, right: float) -> None:
    rng, size = sheet.rng, sheet.style.body.size
    width = right - left
    if width > 250:  # sometimes a narrow column
        inset = rng.choice((0, rng.randint(0, int(width) - 220)))
        shift = rng.randint(0, inset)
        left, right = left + shift, right - (inset - shift)
    pitch = size + rng.choice((2, 2, 3, 4, 6, 9))
    y = rng.randint(8, 60) + size
    end = rng.choice((HEIGHT - MARGIN, rng.randint(int(y) + 40, HEIGHT - MARGIN)))
    lines: list[list[str]] = []
    while y < end:
        lines.append(_line(sheet, left, right, y))
        y += pitch * rng.choice((1, 1, 1, 1, 1, 1, 1.6))
    _ask(sheet, [line for line in lines if line])


def _line(sheet: Sheet, left: float, right: float, y: float) -> list[str]:
    """Write one string, or one at the left and one at the right, and return them."""
    rng, font = sheet.rng, _font(sheet)
    first, second = _string(sheet), _string(sheet)
    if rng.random() < 0.6:
        gap = Text.right(right, y, second, font) if rng.random() < 0.7 else None
        start = Text(left, y, first, font)
        other = gap or Text(start.box[2] + rng.randint(7, 40), y, second, font)
        if start.box[2] + 6 < other.x and other.box[2] <= right + 1 and sheet.put(start, other):
            return [first, second]
    text = rng.choice(
        (
            Text(left, y, first, font),
            Text.center((left + right) / 2, y, first, font),
            Text.right(right, y, first, font),
        )
    )
    return [first] if text.x >= left - 1 and text.box[2] <= right + 1 and sheet.put(text) else []


def _font(sheet: Sheet) -> Font:
    """Return the font of the body or, less often, of the label or the heading."""
    style = sheet.style
    return sheet.rng.choice((style.body, style.body, style.body, style.label, style.heading.at(style.body.size + 2)))


def _string(sheet: Sheet) -> str:
    """Return a value of any kind, or random characters."""
    rng, words = sheet.rng, sheet.words
    if rng.random() < 0.3:
        letters = rng.choice((string.ascii_lowercase, string.ascii_uppercase, string.ascii_letters, string.digits))
        if rng.random() < 0.2:
            letters = string.ascii_letters + string.digits + string.punctuation
        word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 12)))
        return word.capitalize() if rng.random() < 0.3 else word
    kinds = (
        words.invented,
        words.invented,
        words.name,
        words.company,
        words.street,
        words.city,
        words.item,
        words.money,
        words.money,
        words.date,
        words.time,
        words.code,
        words.number,
        words.phone,
        words.email,
        words.percent,
        words.quantity,
        words.subject,
        words.weight,
    )
    text = rng.choice(kinds)()
    style = rng.random()
    if style < 0.1:
        return text.upper()
    if style < 0.2:
        return f"{words.quantity()} {text}"
    if style < 0.25:
        return f"{text}{rng.choice((':', '.', ',', ' -', ' #', '*'))}"
    return text


def _ask(sheet: Sheet, lines: list[list[str]]) -> None:
    """Ask for the neighbours right of, left of, below and above a text that occurs once."""
    all_texts = [text.text for text in sheet.texts]

    def ask(relation: str, text: str, answer: str) -> None:
        if sum(text in other for other in all_texts) == 1 and '"' not in text:
            question = sheet.rng.choice(('What stands {} "{}"?', 'What is {} "{}"?', '{} "{}"?')).format(relation, text)
            sheet.questions.append(Question(question[:1].upper() + question[1:], [answer], "layout"))

    for line in lines:
        if len(line) == 2:
            ask("right of", line[0], line[1])
            ask("left of", line[1], line[0])
    for upper, lower in pairwise(lines):
        if sheet.rng.random() < 0.5:
            ask("below", upper[0], lower[0])
        else:
            ask("above", lower[0], upper[0])


SCATTER = Family("scatter", write_scatter, 11, 14)
