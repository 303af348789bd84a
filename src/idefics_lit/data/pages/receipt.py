"""Receipts: a narrow slip with the shop, the items, the sums and the payment."""

from idefics_lit.data.pages.page import HEIGHT, WIDTH
from idefics_lit.data.pages.sheet import Sheet, Text

THANKS = ("Thank you!", "Please come again", "Thanks for shopping", "Have a nice day!", "No refunds", "* * * * *")


class _Slip:
    """Write lines one below the other between the edges of the slip."""

    def __init__(self, sheet: Sheet) -> None:
        rng = sheet.rng
        self.sheet, self.pitch = sheet, sheet.style.body.size + rng.randint(2, 4)
        width = rng.randint(225, 300)
        self.left = rng.randint(16, WIDTH - 16 - width)
        self.right = self.left + width
        self.y = float(rng.randint(10, 16))

    def middle(self, text: str, large: bool = False) -> bool:
        font = self.sheet.style.heading if large else self.sheet.style.body
        font = font.at(min(font.size, self.sheet.style.body.size + 3))
        return self._write(Text.center((self.left + self.right) / 2, self.y + self.pitch, text, font))

    def pair(self, left: str, right: str, bold: bool = False) -> bool:
        font = self.sheet.style.label if bold else self.sheet.style.body
        y = self.y + self.pitch
        return self._write(Text(self.left, y, left, font), Text.right(self.right, y, right, font))

    def rule(self) -> None:
        """Draw a dashed line."""
        y = self.y + 0.55 * self.pitch
        for x in range(self.left, self.right, 8):
            self.sheet.line(x, y, min(x + 4, self.right), y)
        self.y += 0.5 * self.pitch

    def _write(self, *texts: Text) -> bool:
        ends = [text.box[2] for text in texts]
        fits = all(end <= self.right + 2 for end in ends) and texts[0].x >= self.left - 2
        if not fits or (len(texts) == 2 and ends[0] + 6 > texts[1].x) or not self.sheet.put(*texts):
            return False
        self.y += self.pitch
        return True


def write_receipt(sheet: Sheet) -> None:
    """Write a receipt on a sheet."""
    slip = _Slip(sheet)
    _shop(sheet, slip)
    _purchase(sheet, slip)
    slip.rule()
    subtotal = _items(sheet, slip)
    slip.rule()
    _sums(sheet, slip, subtotal)
    if sheet.rng.random() < 0.6:
        slip.y += 4
        slip.middle(sheet.rng.choice(THANKS))
    sheet.paper_slip(slip.left - 8, 0, slip.right + 8, min(slip.y + 14, HEIGHT))


def _shop(sheet: Sheet, slip: _Slip) -> None:
    rng, words = sheet.rng, sheet.words
    shop, street, phone = words.company(), words.street(), words.phone()
    if slip.middle(shop, large=True):
        sheet.ask(rng.choice(("Which shop is the receipt from?", "In which shop was it bought?")), shop, "layout")
    if slip.middle(street):
        sheet.ask(rng.choice(("On which street is the shop?", "At what address is the shop?")), street, "layout")
    if rng.random() < 0.4 and slip.middle(f"Tel {phone}"):
        sheet.ask("Under which number can the shop be called?", phone, "form")


def _purchase(sheet: Sheet, slip: _Slip) -> None:
    """Write the date, the cashier and the number."""
    rng, words = sheet.rng, sheet.words
    date, time, cashier, number = words.date(1990), words.time(), words.first(), words.number()
    if slip.pair(date, time):
        sheet.ask(rng.choice(("On what day was it bought?", "When did the customer buy it?")), date, "form")
        sheet.ask(rng.choice(("At what hour was it bought?", "At what time of day was it sold?")), time, "form")
    if slip.pair(rng.choice(("Cashier", "Served by", "Clerk", "Your cashier")), cashier):
        sheet.ask(rng.choice(("Who was at the till?", "Who served the customer?")), cashier, "form")
    if rng.random() < 0.6 and slip.pair(rng.choice(("Receipt", "Ticket", "Trans.", "Check #")), number):
        sheet.ask("Which number does the receipt carry?", number, "form")


def _items(sheet: Sheet, slip: _Slip) -> float:
    """Write two to five items, and return the sum of their amounts."""
    rng, words = sheet.rng, sheet.words
    counted, total = rng.random() < 0.4, 0.0
    bought: dict[str, str] = {}
    for _ in range(rng.randint(2, 5)):
        item, count, price = words.item(), rng.randint(1, 9), round(rng.uniform(0.5, 90), 2)
        amount = words.amount(count * price if counted else price)
        if item in bought or amount in bought.values():
            continue
        if slip.pair(f"{count} {item}" if counted else item, amount):
            bought[item] = amount
            total += count * price if counted else price
            question = rng.choice(("How much did the customer pay for {}?", "At what price was {} sold?"))
            sheet.ask(question.format(item), amount, "table/list")
            if counted:
                sheet.ask(f"How many pieces of {item} were bought?", str(count), "table/list")
    if len(bought) > 1:
        item = rng.choice(tuple(bought))
        sheet.ask(f"Which article was sold at {bought[item]}?", item, "table/list")
    return round(total, 2)


def _sums(sheet: Sheet, slip: _Slip, subtotal: float) -> None:
    """Write subtotal, tax and total, then cash and change or the means of payment."""
    rng, words = sheet.rng, sheet.words
    rate = rng.choice((4, 5, 6, 7, 8.25, 10))
    tax = round(subtotal * rate / 100, 2)
    total = subtotal + tax
    if slip.pair(rng.choice(("Subtotal", "SUBTOTAL", "Net")), words.amount(subtotal)):
        sheet.ask("How much was it before tax?", words.amount(subtotal), "form")
    if slip.pair(rng.choice(("Tax", "Sales tax", "VAT")) + f" {rate}%", words.amount(tax)):
        sheet.ask(rng.choice(("How much tax was charged?", "How much of it is tax?")), words.amount(tax), "form")
        sheet.ask("At which rate was it taxed?", f"{rate}%", "form")
    if slip.pair(rng.choice(("TOTAL", "Total", "AMOUNT")), words.amount(total), bold=True):
        sheet.ask(
            rng.choice(("How much was it with tax?", "How much did it come to in all?")), words.amount(total), "form"
        )
    if rng.random() < 0.5:
        cash = float(-(-total // 20) * 20)
        if slip.pair(rng.choice(("Cash", "CASH", "Tendered")), words.amount(cash)):
            sheet.ask("How much cash did the customer hand over?", words.amount(cash), "form")
        if slip.pair(rng.choice(("Change", "CHANGE")), words.amount(cash - total)):
            sheet.ask("How much money did the customer get back?", words.amount(cash - total), "form")
    else:
        method, digits = words.payment(), words.digits(4)
        if slip.pair("Paid by", f"{method} {digits}" if rng.random() < 0.5 else method):
            sheet.ask("By what means did the customer pay?", method, "form")
