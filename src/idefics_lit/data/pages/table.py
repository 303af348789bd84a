"""Tables: rows and columns with or without rules, below a few labelled values."""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from idefics_lit.data.pages.blocks import footer, heading, label_and_value
from idefics_lit.data.pages.fields import draw_fields
from idefics_lit.data.pages.page import WIDTH
from idefics_lit.data.pages.sheet import Sheet, Text
from idefics_lit.data.pages.vocabulary import TABLE_TITLES
from idefics_lit.data.pages.words import Words

PAD = 6
"""Pixels between a cell's edge and its text."""


class Column(NamedTuple):
    """A column: its header, its noun in questions, its values, and whether they are right-aligned."""

    header: str
    noun: str
    value: Callable[[Words], str]
    right: bool = False


KEYS = {
    "thing": Column("Item", "item", Words.item),
    "product": Column("Product", "product", Words.item),
    "person": Column("Name", "person", Words.last),
    "employee": Column("Employee", "employee", Words.first),
    "place": Column("City", "city", Words.city),
    "land": Column("Country", "country", Words.country),
}
COLUMNS = {
    "thing": (
        Column("Qty", "quantity", Words.quantity, True),
        Column("Price", "price", Words.money, True),
        Column("Code", "code", Words.code),
        Column("Color", "color", Words.color),
        Column("Maker", "maker", Words.last),
        Column("Weight", "weight", Words.weight, True),
    ),
    "person": (
        Column("Age", "age", Words.age, True),
        Column("Phone", "phone number", Words.phone),
        Column("City", "city", Words.city),
        Column("Dept", "department", Words.department),
        Column("Hours", "number of hours", Words.hours, True),
        Column("Room", "room", Words.code),
        Column("Salary", "salary", Words.money, True),
    ),
    "place": (
        Column("Total", "total", Words.money, True),
        Column("Share", "share", Words.percent, True),
        Column("Manager", "manager", Words.last),
        Column("Stores", "number of stores", Words.quantity, True),
        Column("Founded", "year of founding", Words.year),
        Column("Phone", "phone number", Words.phone),
    ),
}
SAME_COLUMNS = {"product": "thing", "employee": "person", "land": "place"}
ONE_CELL = ("What is the {noun} of {key}?", "What is the {noun} for {key}?", "What {noun} is listed for {key}?")
WHICH_ROW = ("Which {noun} has the {other} {value}?", "Which {noun} is listed with the {other} {value}?")


def write_table(sheet: Sheet) -> None:
    """Write a table on a sheet."""
    rng, size = sheet.rng, sheet.style.body.size
    kind = rng.choice(tuple(KEYS))
    group = SAME_COLUMNS.get(kind, kind)
    columns = [KEYS[kind], *rng.sample(COLUMNS[group], rng.choice((1, 2, 2, 3)))]
    # Before other fields: a city above the table must not answer a question about one in it.
    sheet.claim(*(noun for column in columns for noun in (column.noun, column.header)))
    y = heading(sheet, TABLE_TITLES[group]) if rng.random() < 0.8 else rng.randint(10, 20)
    for field in draw_fields(rng, sheet, rng.choice((0, 0, 1, 2))):
        if label_and_value(sheet, field, 14, y + size):
            y += 1.5 * size
    rows = _draw_rows(sheet, columns)
    headers = [column.header for column in columns]
    if rng.random() < 0.2:
        headers = [header.upper() for header in headers]
    _ask(sheet, columns, headers, _grid(sheet, columns, headers, rows, y + 4))
    sheet.shift_down()
    if rng.random() < 0.3:
        footer(sheet)


def _draw_rows(sheet: Sheet, columns: list[Column]) -> list[list[str]]:
    """Return two to nine rows with different keys."""
    rows: dict[str, list[str]] = {}
    for _ in range(sheet.rng.randint(2, 9)):
        row = [column.value(sheet.words) for column in columns]
        rows.setdefault(row[0], row)
    return list(rows.values())


def _grid(
    sheet: Sheet, columns: list[Column], headers: list[str], rows: list[list[str]], top: float
) -> list[list[str]]:
    """Write the rows and columns that there is room for, and return the rows written."""
    rng, body, bold = sheet.rng, sheet.style.body, sheet.style.label
    pitch, left = body.size * rng.uniform(1.4, 1.9), rng.randint(10, 24)
    widths = [
        max(bold.width(header), *(body.width(row[i]) for row in rows)) + 2 * PAD for i, header in enumerate(headers)
    ]
    while sum(widths) > WIDTH - 2 * left:
        widths.pop()
    slack = (WIDTH - 2 * left - sum(widths)) / len(widths) * rng.choice((1, 1, rng.random()))
    edges = list(accumulate((width + slack for width in widths), initial=left))
    y = first = top + body.size + 2
    written: list[list[str]] = []
    for row in [headers, *rows]:
        font = bold if row is headers else body
        cells = zip(row, columns, edges, edges[1:], strict=False)
        if not sheet.put(
            *(
                Text.right(end - PAD, y, value, font) if column.right else Text(start + PAD, y, value, font)
                for value, column, start, end in cells
            )
        ):
            break
        written.append(row)
        y += pitch
    _rules(sheet, edges, [first + i * pitch for i in range(len(written))], pitch)
    return [row[: len(widths)] for row in written[1:]]


def _rules(sheet: Sheet, edges: list[float], baselines: list[float], pitch: float) -> None:
    """Draw rules below the header, between rows or around cells, or a grey header."""
    size = sheet.style.body.size
    below = (pitch - 0.7 * size) / 2
    top, bottom = baselines[0] + below - pitch, baselines[-1] + below
    style = sheet.rng.choice(("none", "header", "rows", "grid", "grey"))
    if style == "grey":
        sheet.box(edges[0], top, edges[-1], baselines[0] + below, fill=sheet.paper - 36, border=False)
    levels = {
        "none": [],
        "rows": [top, *(y + below for y in baselines)],
        "grid": [top, *(y + below for y in baselines)],
    }
    for y in levels.get(style, [baselines[0] + below, bottom]):
        sheet.line(edges[0], y, edges[-1], y)
    if style == "grid":
        for x in edges:
            sheet.line(x, top, x, bottom)


def _ask(sheet: Sheet, columns: list[Column], headers: list[str], rows: list[list[str]]) -> None:
    """Add questions about each cell by its row, sometimes a row by its cell, and the first or last entry."""
    rng, key = sheet.rng, columns[0]
    for row in rows:
        for column, value in zip(columns[1:], row[1:], strict=False):
            if rng.random() < 0.8:
                question = rng.choice(ONE_CELL).format(noun=column.noun, key=row[0])
                sheet.ask(question, value, "table/list")
            elif sum(value in other for other in rows) == 1:
                question = rng.choice(WHICH_ROW).format(noun=key.noun, other=column.noun, value=value)
                sheet.ask(question, row[0], "table/list")
    if len(rows) > 1 and rng.random() < 0.5:
        position, row = rng.choice((("first", rows[0]), ("last", rows[-1])))
        sheet.ask(f"What is the {position} {key.noun} in the table?", row[0], "table/list")
    if rng.random() < 0.25:
        position, header = rng.choice((("first", headers[0]), ("second", headers[1])))
        sheet.ask(f"What is the heading of the {position} column?", header, "table/list")
