"""Draw the values on pages: names, places, things, dates, amounts, numbers.

Two thirds of the words are invented from syllables, so that a model can't guess words instead of reading them.
"""

import random
import zlib

from idefics_lit.data.pages.vocabulary import (
    COMPANY_FORMS,
    HONORIFICS,
    MONTHS,
    ONSETS,
    RHYMES,
    STREET_FORMS,
    VOWELS,
    WORD_LISTS,
)

INVENTED = 0.65
"""Fraction of invented words among the names and things of a page with known words."""


def is_unseen(word: str) -> bool:
    """Return whether a word is held out; it depends on the word alone, not on its list."""
    return zlib.crc32(word.encode()) % 4 == 0


KNOWN_LISTS = {kind: [word for word in words if not is_unseen(word)] for kind, words in WORD_LISTS.items()}
UNSEEN_LISTS = {kind: [word for word in words if is_unseen(word)] for kind, words in WORD_LISTS.items()}


class Words:
    """Draw the values of one page at random; its dates and amounts have one format.

    Args:
        rng: the page's random generator.
        unseen: draw words from the held-out lists only, and invent none.
    """

    def __init__(self, rng: random.Random, unseen: bool) -> None:
        self.rng, self.unseen = rng, unseen
        self.date_format = rng.randrange(7)
        self.currency = rng.choice(("$", "$", "$", "", "USD "))
        self.cents = rng.random() < 0.75

    def word(self, kind: str) -> str:
        """A word of a list such as ``city``, or an invented word."""
        if self.unseen:
            return self.rng.choice(UNSEEN_LISTS[kind])
        return self.invented() if self.rng.random() < INVENTED else self.rng.choice(KNOWN_LISTS[kind])

    def invented(self) -> str:
        """A pronounceable invented word of at most 11 letters."""
        syllables = self.rng.choice((2, 2, 2, 3))
        pick, word = self.rng.choice, ""
        for _ in range(syllables):
            onset = "" if not word and self.rng.random() < 0.15 else pick(ONSETS)
            syllable = onset + pick(VOWELS) + pick(RHYMES)
            word += syllable if len(word + syllable) <= 11 else ""
        return word.capitalize()

    def digits(self, minimum: int, maximum: int | None = None) -> str:
        """Digits that don't start with 0."""
        count = self.rng.randint(minimum, maximum or minimum)
        return self.rng.choice("123456789") + "".join(self.rng.choice("0123456789") for _ in range(count - 1))

    def letters(self, count: int) -> str:
        """Capital letters without I and O, which resemble digits."""
        return "".join(self.rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(count))

    def code(self) -> str:
        """A reference such as ``AB-1234``."""
        digits, letters = self.digits, self.letters
        forms = (
            lambda: digits(4, 7),
            lambda: f"{letters(2)}-{digits(4)}",
            lambda: letters(1) + digits(5),
            lambda: f"{digits(3)}-{digits(4)}",
            lambda: letters(3) + digits(3),
            lambda: digits(2) + letters(2) + digits(2),
        )
        return self.rng.choice(forms)()

    def number(self) -> str:
        """A plain number of four to seven digits."""
        return self.digits(4, 7)

    def zip_code(self) -> str:
        """Five digits."""
        return self.digits(5)

    def date(self, first: int = 1950, last: int = 2029) -> str:
        """A date from the year ``first`` to ``last``, in the page's date format."""
        year, month, day = self.rng.randint(first, last), self.rng.randint(1, 12), self.rng.randint(1, 28)
        name = MONTHS[month - 1]
        return (
            f"{month:02d}/{day:02d}/{year}",
            f"{name} {day}, {year}",
            f"{year}-{month:02d}-{day:02d}",
            f"{day} {name[:3]} {year}",
            f"{month}/{day}/{year % 100:02d}",
            f"{name[:3]} {day}, {year}",
            f"{day} {name} {year}",
        )[self.date_format]

    def year(self) -> str:
        """A year of four digits."""
        return str(self.rng.randint(1930, 2030))

    def time(self) -> str:
        """A time of day such as ``9:05 AM``."""
        return f"{self.rng.randint(1, 12)}:{self.rng.randint(0, 59):02d} {self.rng.choice(('AM', 'PM'))}"

    def money(self, minimum: float = 1, maximum: float = 99_999) -> str:
        """A log-uniform amount in the page's currency."""
        digits = self.rng.uniform(len(str(int(minimum))) - 1, len(str(int(maximum))))
        amount = min(max(10**digits, minimum), maximum)
        return self.currency + (f"{amount:,.2f}" if self.cents else f"{amount:,.0f}")

    def amount(self, value: float) -> str:
        """Format an amount in the page's currency, with cents."""
        return f"{self.currency}{value:,.2f}"

    def percent(self) -> str:
        """A percentage such as ``12.5%``."""
        return f"{self.rng.randint(1, 40)}{self.rng.choice(('', '.5', '.25'))}%"

    def quantity(self) -> str:
        """A count from 1 to 999."""
        return str(self.rng.choice((self.rng.randint(1, 20), self.rng.randint(1, 999))))

    def age(self) -> str:
        """An adult's age."""
        return str(self.rng.randint(18, 90))

    def hours(self) -> str:
        """Working hours, such as ``37.5``."""
        return f"{self.rng.randint(1, 80)}{self.rng.choice(('', '.5'))}"

    def weight(self) -> str:
        """A weight with its unit."""
        tenths = self.rng.choice(("", ".5", f".{self.digits(1)}"))
        return f"{self.rng.randint(1, 300)}{tenths} {self.rng.choice(('kg', 'lb'))}"

    def terms(self) -> str:
        """Terms of payment."""
        return self.rng.choice(("Due now", "COD", "Prepaid", *[f"Net {self.rng.randint(5, 90)}"] * 3))

    def page_count(self) -> str:
        """A page number such as ``3 of 12``."""
        total = self.rng.randint(1, 40)
        return f"{self.rng.randint(1, total)} of {total}"

    def phone(self) -> str:
        """A telephone number."""
        digits = self.digits
        forms = (
            lambda: f"{digits(3)}-{digits(4)}",
            lambda: f"({digits(3)}) {digits(3)}-{digits(4)}",
            lambda: f"{digits(3)}-{digits(3)}-{digits(4)}",
            lambda: f"+{digits(1)} {digits(3)} {digits(4)}",
        )
        return self.rng.choice(forms)()

    def email(self) -> str:
        """An address of at most about 20 letters."""
        return f"{self.word('first').lower()}@{self.word('company').lower()}.{self.rng.choice(('com', 'org', 'net'))}"

    def name(self) -> str:
        """A person's name in one of four formats."""
        first, last, form = self.word("first"), self.word("last"), self.rng.random()
        if form < 0.6:
            return f"{first} {last}"
        if form < 0.75:
            return f"{first[0]}. {last}"
        if form < 0.9:
            return f"{first} {self.letters(1)}. {last}"
        return f"{self.rng.choice(HONORIFICS)} {last}"

    def company(self) -> str:
        """A company's name of two or three words."""
        second = f" {self.word('company')}" if self.rng.random() < 0.2 else ""
        return f"{self.word('company')}{second} {self.rng.choice(COMPANY_FORMS)}"

    def street(self) -> str:
        """A house number and a street."""
        return f"{self.digits(1, 4)} {self.word('street')} {self.rng.choice(STREET_FORMS)}"

    def subject(self) -> str:
        """The subject of a letter, in one or two words."""
        subject = self.word("subject")
        return f"{subject} {self.word('subject')}" if self.rng.random() < 0.8 else subject

    def first(self) -> str:
        """A first name."""
        return self.word("first")

    def last(self) -> str:
        """A family name."""
        return self.word("last")

    def city(self) -> str:
        """A city."""
        return self.word("city")

    def state(self) -> str:
        """A state."""
        return self.word("state")

    def country(self) -> str:
        """A country."""
        return self.word("country")

    def item(self) -> str:
        """An article."""
        return self.word("item")

    def department(self) -> str:
        """A department of a company."""
        return self.word("department")

    def position(self) -> str:
        """A job."""
        return self.word("position")

    def color(self) -> str:
        """A colour."""
        return self.word("color")

    def payment(self) -> str:
        """A payment method."""
        return self.word("payment")

    def shipping(self) -> str:
        """A shipping method."""
        return self.word("shipping")

    def status(self) -> str:
        """A status such as ``Open``."""
        return self.word("status")
