"""Invoices: company, customer, dates, a table of items, sums."""

from idefics_lit.data.pages.page import HEIGHT, WIDTH
from idefics_lit.data.pages.sheet import MARGIN, Sheet, Text

EDGES = (0.46, 0.58, 0.78, 1.0)
"""Right edges of item, count, price and amount, as fractions of the table's width."""


def write_invoice(sheet: Sheet) -> None:
    """Write an invoice on a sheet."""
    rng = sheet.rng
    sheet.words.currency = sheet.words.currency.removeprefix("USD ")
    left, pitch = rng.randint(12, 22), sheet.style.body.size + rng.randint(4, 6)
    y = _head(sheet, left, pitch)
    y = _customer(sheet, left, y, pitch)
    y, subtotal = _items(sheet, left, y + 0.8 * pitch, pitch)
    _sums(sheet, left, y + 0.5 * pitch, pitch, subtotal)
    _note(sheet, left)


def _head(sheet: Sheet, left: float, pitch: float) -> float:
    """Write the company, the title, the number and the dates, and return the last baseline."""
    rng, words, body = sheet.rng, sheet.words, sheet.style.body
    company, street = words.company(), words.street()
    large, y = sheet.style.heading.at(body.size + 4), 12.0 + body.size
    title = rng.choice(("INVOICE", "Invoice", "BILL", "Tax Invoice"))
    sheet.put(Text.right(WIDTH - left, y, title, large))
    if sheet.put(Text(left, y, company, large.at(body.size + 2))):
        sheet.ask(rng.choice(("Who wrote the bill?", "Which firm sends the bill?")), company, "layout")
    if sheet.put(Text(left, y + pitch, street, body)):
        sheet.ask("On which street is the firm that sends the bill?", street, "layout")
    year = rng.randint(1990, 2028)
    facts = (
        (rng.choice(("No.", "Number", "#")), words.code(), "Which number does the bill have?"),
        (rng.choice(("Issued", "Dated")), words.date(year, year), "On what day was the bill written?"),
        (rng.choice(("Due", "Pay by")), words.date(year + 1, year + 1), "By what day must the bill be paid?"),
    )
    start = WIDTH - left - max(body.width(value) for _, value, _ in facts)
    for label, value, question in facts:
        y += pitch
        if sheet.put(Text.right(start - 8, y, label, sheet.style.label), Text(start, y, value, body)):
            sheet.ask(question, value, "form")
    return y


def _customer(sheet: Sheet, left: float, y: float, pitch: float) -> float:
    """Write the customer next to the dates, and return the last baseline."""
    rng, words, body = sheet.rng, sheet.words, sheet.style.body
    name, city = words.name(), f"{words.city()} {words.zip_code()}"
    y -= 0.4 * pitch
    if sheet.put(Text(left, y, rng.choice(("Bill to", "Billed to", "To")), sheet.style.label)):
        if sheet.put(Text(left, y + pitch, name, body)):
            sheet.ask(rng.choice(("Who has to pay the bill?", "Who is billed?")), name, "form")
        if sheet.put(Text(left, y + 2 * pitch, city, body)):
            sheet.ask("In which city does the customer live?", city.rsplit(" ", 1)[0], "form")
    return y + 2 * pitch


def _items(sheet: Sheet, left: float, y: float, pitch: float) -> tuple[float, float]:
    """Write the table of items, and return the last baseline and the sum."""
    rng, words, body = sheet.rng, sheet.words, sheet.style.body
    edges = [left + share * (WIDTH - 2 * left) for share in EDGES]

    def row(y: float, cells: tuple[str, str, str, str], bold: bool = False) -> bool:
        font = sheet.style.label if bold else body
        numbers = (Text.right(x - 4, y, cell, font) for x, cell in zip(edges[1:], cells[1:], strict=True))
        return sheet.put(Text(left + 4, y, cells[0], font), *numbers)

    y += pitch
    if rng.random() < 0.6:
        sheet.box(left, y - body.size - 1, WIDTH - left, y + 5, fill=sheet.paper - 36, border=False)
    row(y, (rng.choice(("Article", "Description")), "Pcs", "Each", "Amount"), bold=True)
    sheet.line(left, y + 5, WIDTH - left, y + 5)
    y += 4
    total, billed = 0.0, set[str]()
    for _ in range(rng.randint(2, 5)):
        item, count, price = words.item(), rng.randint(2, 40), round(rng.uniform(1, 150), 2)
        amount = round(count * price, 2)
        room = y + 5.5 * pitch < HEIGHT - MARGIN
        if (
            room
            and item not in billed
            and row(y + pitch, (item, str(count), words.amount(price), words.amount(amount)))
        ):
            y, total = y + pitch, total + amount
            billed.add(item)
            sheet.ask(f"How many pieces of {item} are billed?", str(count), "table/list")
            sheet.ask(f"How much does one {item} cost?", words.amount(price), "table/list")
            sheet.ask(f"How much is billed for {item} in all?", words.amount(amount), "table/list")
    sheet.line(left, y + 6, WIDTH - left, y + 6)
    return y, round(total, 2)


def _sums(sheet: Sheet, left: float, y: float, pitch: float, subtotal: float) -> None:
    rng, words, body, bold = sheet.rng, sheet.words, sheet.style.body, sheet.style.label
    rate = rng.choice((5, 7, 10, 19, 20))
    tax = round(subtotal * rate / 100, 2)
    sums = (
        (rng.choice(("Net", "Subtotal")), subtotal, "How much is billed before tax?"),
        (f"{rng.choice(('VAT', 'Tax'))} {rate}%", tax, "How much tax is on the bill?"),
        (rng.choice(("To pay", "TOTAL", "Total due")), subtotal + tax, "How much has to be paid in the end?"),
    )
    for label, amount, question in sums:
        y += pitch
        value = Text.right(WIDTH - left - 4, y, words.amount(amount), body)
        if sheet.put(Text(WIDTH - left - 190, y, label, bold), value):
            sheet.ask(question, words.amount(amount), "form")


def _note(sheet: Sheet, left: float) -> None:
    """Write the terms of payment at the bottom of the page."""
    rng, font = sheet.rng, sheet.style.body.at(11)
    account, fee = sheet.words.number(), sheet.words.percent()
    note = rng.choice((f"Pay to account {account}. Late fee: {fee}.", f"Account {account}, late fee {fee}."))
    if sheet.put(Text(left, HEIGHT - MARGIN - 4, note, font)):
        sheet.ask("To which account must the money go?", account, "free_text")
        sheet.ask(rng.choice(("How high is the late fee?", "What does it cost to pay late?")), fee, "free_text")
