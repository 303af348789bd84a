"""Identity cards: an issuer, a photo, and a person's data with small captions, on a darker background."""

from collections.abc import Callable
from typing import NamedTuple

from idefics_lit.data.pages.page import HEIGHT, WIDTH
from idefics_lit.data.pages.sheet import Sheet, Text
from idefics_lit.data.pages.vocabulary import CARD_KINDS
from idefics_lit.data.pages.words import Words


class Fact(NamedTuple):
    """A caption of the card, the function that draws its value, and questions about it."""

    caption: str
    value: Callable[[Words], str]
    questions: tuple[str, ...]


FACTS = (
    Fact("Surname", Words.last, ("What is the holder's family name?", "What is the holder's last name?")),
    Fact("Given name", Words.first, ("What is the holder's given name?", "What is the holder's first name?")),
    Fact("Born", lambda words: words.date(1940, 2005), ("What is the holder's birthday?", "When was the holder born?")),
    Fact(
        "Valid until",
        lambda words: words.date(2006, 2039),
        ("How long is the card good?", "When does the card run out?"),
    ),
    Fact("Citizen of", Words.country, ("Which land is the holder a citizen of?", "Of what country is the holder?")),
    Fact("Lives in", Words.city, ("Where does the holder live?", "Where is the holder at home?")),
    Fact("Height", lambda words: f"{words.rng.randint(148, 199)} cm", ("How tall is the holder?",)),
    Fact("Eyes", Words.color, ("What color are the holder's eyes?",)),
    Fact("Works as", Words.position, ("What does the holder work as?", "What does the holder do for a living?")),
)


def write_id_card(sheet: Sheet) -> None:
    """Write an identity card on a sheet."""
    rng, body = sheet.rng, sheet.style.body
    width, height = rng.randint(370, 410), rng.randint(236, 270)
    left, top = rng.randint(12, WIDTH - 12 - width), rng.randint(12, HEIGHT - 12 - height)
    sheet.paper_slip(left, top, left + width, top + height)
    band = _title(sheet, left, top, width)
    photo_right = rng.random() < 0.35
    photo = left + (width - 112 if photo_right else 14)
    _photo(sheet, photo, band + 10)
    x, end = (left + 16, photo - 8) if photo_right else (photo + 112, left + width - 8)
    caption, capitals = sheet.style.label.at(11), rng.random() < 0.4
    y, pitch = band + 22, body.size + rng.randint(21, 25)
    for fact in rng.sample(FACTS, len(FACTS)):
        label, value = fact.caption.upper() if capitals else fact.caption, fact.value(sheet.words)
        if y + body.size + 12 > top + height or x + body.width(value) > end:
            continue
        if sheet.put(Text(x, y, label, caption), Text(x, y + body.size + 3, value, body)):
            sheet.ask(rng.choice(fact.questions), value, "form")
            y += pitch


def _title(sheet: Sheet, left: float, top: float, width: float) -> float:
    """Write issuer and kind of card on a band, and return its bottom."""
    rng, body = sheet.rng, sheet.style.body
    kind, issuer = rng.choice(CARD_KINDS), sheet.words.company()
    if rng.random() < 0.5:
        kind = kind.upper()
    height = 2 * body.size + 20
    dark = rng.random() < 0.3
    ink = sheet.paper if dark else sheet.ink
    sheet.box(left, top, left + width, top + height, fill=sheet.ink if dark else sheet.paper - 30, border=False)
    if sheet.put(Text(left + 14, top + body.size + 7, issuer, sheet.style.heading.at(body.size + 2), ink)):
        sheet.ask(rng.choice(("Who gave out the card?", "By whom was the card issued?")), issuer, "layout")
    if sheet.put(Text(left + 14, top + 2 * body.size + 13, kind, body, ink)):
        sheet.ask(rng.choice(("What sort of card is it?", "What kind of card is shown?")), kind, "layout")
    return top + height


def _photo(sheet: Sheet, x: float, y: float) -> None:
    """Draw head and shoulders in a frame, with the card's number below."""
    dark = sheet.paper - sheet.rng.randint(90, 150)
    sheet.box(x, y, x + 92, y + 112, fill=sheet.paper - 30)
    sheet.ellipse(x + 10, y + 72, x + 82, y + 150, dark)
    sheet.ellipse(x + 27, y + 20, x + 65, y + 72, dark)
    sheet.box(x - 1, y + 113, x + 93, y + 152, fill=sheet.paper, border=False)
    number = sheet.words.code()
    if sheet.put(Text.center(x + 46, y + 132, number, sheet.style.body)):
        question = sheet.rng.choice(("Which number stands below the photo?", "What is written under the picture?"))
        sheet.ask(question, number, "Image/Photo")
