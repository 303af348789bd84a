"""Forms: labelled values in a list, in two columns, on rules or in boxes."""

from idefics_lit.data.pages.blocks import footer, heading, label_and_value
from idefics_lit.data.pages.fields import draw_fields
from idefics_lit.data.pages.page import HEIGHT, WIDTH
from idefics_lit.data.pages.sheet import Sheet, Text
from idefics_lit.data.pages.vocabulary import FORM_TITLES


def write_form(sheet: Sheet) -> None:
    """Write a form on a sheet."""
    rng = sheet.rng
    top = heading(sheet, FORM_TITLES) if rng.random() < 0.75 else rng.randint(10, 24)
    rng.choice((_list, _list, _columns, _boxes))(sheet, top)
    sheet.shift_down()
    if rng.random() < 0.3:
        footer(sheet)
    if rng.random() < 0.2:
        sheet.box(3, 3, WIDTH - 4, HEIGHT - 4)


def _list(sheet: Sheet, top: float) -> None:
    """Write a label and a value per line; values follow their labels or are aligned, sometimes on a rule."""
    rng, size = sheet.rng, sheet.style.body.size
    pitch, left = size * rng.uniform(1.35, 1.95), rng.randint(10, 40)
    column = left + rng.randint(110, 175) if rng.random() < 0.4 else None
    separator, gap = rng.choice((":", ":", ":", " :", "", " -")), size * rng.choice((0.4, 0.4, 0.8, 1.5))
    ruled = rng.random() < 0.2
    y, count, written = top + size, rng.choice((2, 4, 5, 6, 7, 8, 9, 10)), 0
    # More fields than needed, because some don't fit.
    for field in draw_fields(rng, sheet, count + 8):
        if written < count and label_and_value(sheet, field, left, y, separator=separator, gap=gap, column=column):
            if ruled:
                sheet.line((column or left) - 2, y + 4, WIDTH - left, y + 4)
            written, y = written + 1, y + pitch


def _columns(sheet: Sheet, top: float) -> None:
    """Write two columns of labelled values."""
    rng = sheet.rng
    pitch, left, middle = (
        sheet.style.body.size * rng.uniform(1.5, 2.1),
        rng.randint(10, 20),
        WIDTH // 2 + rng.randint(0, 14),
    )
    if rng.random() < 0.4:
        sheet.line(middle - 6, top + 2, middle - 6, top + 5.2 * pitch)
    lines = {left: top + sheet.style.body.size, middle: top + sheet.style.body.size}
    for field in draw_fields(rng, sheet, rng.randint(5, 11)):
        x = rng.choice((left, middle))
        limit = middle - 10 if x == left else None
        if lines[x] < top + 5.2 * pitch and label_and_value(sheet, field, x, lines[x], limit=limit):
            lines[x] += pitch


def _boxes(sheet: Sheet, top: float) -> None:
    """Write a grid of boxes, each with a small label above its value."""
    rng, body = sheet.rng, sheet.style.body
    caption = sheet.style.label.at(11)
    across, height, left = rng.choice((2, 2, 3)), body.size + rng.randint(21, 28), rng.randint(10, 18)
    width = (WIDTH - 2 * left) / across
    down = min(rng.randint(2, 5), int((HEIGHT - 10 - top) / height))
    fields = iter(draw_fields(rng, sheet, 3 * across * down))
    for cell in range(across * down):
        x, y = left + cell % across * width, top + cell // across * height
        sheet.box(x, y, x + width, y + height)
        for field in fields:
            label, value = rng.choice(field.labels), field.value(sheet.words)
            if max(caption.width(label), body.width(value)) < width - 8 and sheet.put(
                Text(x + 4, y + 12, label, caption), Text(x + 4 + rng.randint(0, 2), y + height - 7, value, body)
            ):
                field.ask(sheet, label, value)
                break
