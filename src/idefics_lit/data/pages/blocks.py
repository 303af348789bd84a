"""Blocks that several families use: headings, labelled values, footers, wrapped text."""

from collections.abc import Sequence

from idefics_lit.data.pages.fields import Field
from idefics_lit.data.pages.fonts import Font
from idefics_lit.data.pages.page import HEIGHT, WIDTH
from idefics_lit.data.pages.sheet import MARGIN, Sheet, Text

TITLE_QUESTIONS = (
    "What is the title of the document?",
    "What is the title?",
    "What is the heading of the page?",
    "What is the heading?",
    "What is written at the top of the page?",
)


FOOTERS = (
    "Confidential",
    "Please print clearly",
    "Keep this copy for your records",
    "For office use only",
    "Not valid without a stamp",
    "See reverse side",
    "Printed on recycled paper",
)


def heading(sheet: Sheet, titles: Sequence[str]) -> float:
    """Write a title or a company's name at the top, with a question about it.

    Returns:
        The top of the free space below it, in pixels.
    """
    rng, words, font = sheet.rng, sheet.words, sheet.style.heading
    title = rng.choice(titles)
    text = rng.choice((title, title.upper(), f"{words.word('subject')} {title}", ""))
    if not text:
        text = words.company()
        sheet.claim("company", "company name", "firm")
    size = next((size for size in range(font.size, 11, -1) if font.at(size).width(text) < WIDTH - 60), 11)
    font = font.at(size)
    y = rng.randint(10, 20) + size
    left, right = rng.randint(12, 24), rng.randint(14, 30)
    heading = rng.choice(
        (Text(left, y, text, font), Text.center(WIDTH / 2, y, text, font), Text.right(WIDTH - right, y, text, font))
    )
    decoration = rng.random()
    if decoration < 0.1:
        heading = heading._replace(ink=sheet.paper)
        sheet.box(0, y - size - 5, WIDTH, y + 8, fill=sheet.ink, border=False)
    elif decoration < 0.45:
        sheet.line(MARGIN, y + 7, WIDTH - MARGIN, y + 7, rng.choice((1, 1, 2)))
    if not sheet.put(heading):
        return MARGIN
    sheet.claim("title", "heading")
    sheet.ask(rng.choice(TITLE_QUESTIONS), text, "layout")
    return y + rng.randint(12, 20)


def label_and_value(
    sheet: Sheet,
    field: Field,
    x: float,
    y: float,
    *,
    separator: str = ":",
    gap: float = 6,
    column: float | None = None,
    limit: float | None = None,
) -> bool:
    """Write a label and its value on one line, with a question about the value.

    Args:
        sheet: the sheet.
        field: the field.
        x: the left end of the label.
        y: the baseline.
        separator: the text after the label.
        gap: the pixels between label and value.
        column: the left end of the value, instead of ``gap``, if values are aligned in a column.
        limit: the largest right end of the value; by default the page's.

    Returns:
        Whether there is room for both.
    """
    body, bold = sheet.style.body, sheet.style.label
    label, value = sheet.rng.choice(field.labels), field.value(sheet.words)
    end = x + bold.width(label + separator)
    start = end + gap if column is None else column
    if start < end + 3 or (limit is not None and start + body.width(value) > limit):
        return False
    if not sheet.put(Text(x, y, label + separator, bold), Text(start, y, value, body)):
        return False
    field.ask(sheet, label, value)
    return True


def footer(sheet: Sheet) -> None:
    """Write a line at the bottom of the page if there is room, with a question about it."""
    rng, font = sheet.rng, sheet.style.body.at(11)
    text, y = rng.choice((*FOOTERS, f"Form {sheet.words.code()}")), HEIGHT - MARGIN - 4
    left, right = rng.randint(10, 20), rng.randint(10, 20)
    positions = (
        Text(left, y, text, font),
        Text.center(WIDTH / 2, y, text, font),
        Text.right(WIDTH - right, y, text, font),
    )
    if max(text.y for text in sheet.texts) < y - 16 and sheet.put(rng.choice(positions)):
        sheet.ask(rng.choice(("What is written at the bottom of the page?", "What is the last line?")), text, "layout")


def wrap(text: str, font: Font, width: float) -> list[str]:
    """Wrap text into lines of at most ``width`` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.width(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
