"""Letters and memos: sender, date, addressee, sentences, signature."""

from collections import UserDict

from idefics_lit.data.pages.blocks import heading, wrap
from idefics_lit.data.pages.page import WIDTH
from idefics_lit.data.pages.sheet import Sheet, Text
from idefics_lit.data.pages.words import Words

# Sentences whose braces name methods of `Words`, and the questions about each, with answers.
SENTENCES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "The meeting will be held in {city} on {date}.",
        (("Where will the meeting be held?", "{city}"), ("When will the meeting be held?", "{date}")),
    ),
    (
        "We received your payment of {money} by {payment}.",
        (("How much was received?", "{money}"), ("How was the payment made?", "{payment}")),
    ),
    (
        "Your order {code} will leave our warehouse at {time}.",
        (("Which order will leave the warehouse?", "{code}"), ("When will the order leave?", "{time}")),
    ),
    (
        "Please contact {name} at {phone} with any questions.",
        (("Who should be contacted?", "{name}"), ("What number should be called?", "{phone}")),
    ),
    (
        "We need {quantity} units of {item} soon.",
        (("How many units are needed?", "{quantity}"), ("Which product is needed?", "{item}")),
    ),
    (
        "The {department} team approved the plan.",
        (("Which team approved the plan?", "{department}"),),
    ),
    (
        "Mr. {last} has joined us as {position}.",
        (("Who has joined?", "Mr. {last}"), ("As what did the new colleague join?", "{position}")),
    ),
    (
        "Our office moved to {street} last month.",
        (("Where did the office move to?", "{street}"),),
    ),
    (
        "The sample from {country} weighed {weight}.",
        (("Where did the sample come from?", "{country}"), ("How much did the sample weigh?", "{weight}")),
    ),
    (
        "Sales grew by {percent} in {year}.",
        (("By how much did sales grow?", "{percent}"), ("In which year did sales grow?", "{year}")),
    ),
    (
        "Your visit with Dr. {last} begins at {time}.",
        (("Which doctor is the visit with?", "Dr. {last}"), ("At what time does the visit begin?", "{time}")),
    ),
    (
        "The contract with {company} ends in {year}.",
        (("With whom is the contract?", "{company}"), ("When does the contract end?", "{year}")),
    ),
    (
        "The budget for {subject} is {money}.",
        (("What is the budget for?", "{subject}"), ("How large is the budget?", "{money}")),
    ),
    (
        "I will travel to {state} with {first} by {shipping}.",
        (("Where will the writer travel?", "{state}"), ("With whom will the writer travel?", "{first}")),
    ),
    (
        "The {color} folder is kept in room {code}.",
        (("What color is the folder?", "{color}"), ("In which room is the folder kept?", "{code}")),
    ),
)
FILLERS = (
    "Thank you for your letter.",
    "I hope this finds you well.",
    "We look forward to your reply.",
    "Please let us know what you think.",
    "A copy is enclosed.",
    "We regret the delay.",
)
MEMO_TITLES = ("Memo", "Memorandum", "Internal Memo", "Office Memo", "Note", "Interoffice Memo")


class _Values(UserDict[str, str]):
    """Values for the braces of a sentence, drawn at first use."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.words = words

    def __missing__(self, key: str) -> str:
        self[key] = getattr(self.words, key)()
        return self[key]


def write_letter(sheet: Sheet) -> None:
    """Write a letter or a memo on a sheet."""
    rng, size = sheet.rng, sheet.style.body.size
    left, pitch = rng.randint(12, 28), size * rng.uniform(1.3, 1.55)
    sender = sheet.words.name()
    if rng.random() < 0.45:
        y = _memo_head(sheet, left, pitch, sender)
        _body(sheet, left, y + 0.5 * pitch, pitch)
    else:
        y = _letter_head(sheet, left, pitch)
        y = _body(sheet, left, y, pitch)
        _signature(sheet, left, y + 0.4 * pitch, pitch, sender)
    sheet.shift_down()


def _memo_head(sheet: Sheet, left: float, pitch: float, sender: str) -> float:
    """Write to, from, date and subject, and return the last baseline."""
    rng, words = sheet.rng, sheet.words
    y = heading(sheet, MEMO_TITLES) if rng.random() < 0.7 else rng.randint(8, 16)
    entries = [
        ("To:", words.name(), ("Who is the memo to?", "To whom is the memo addressed?", "Who receives the memo?")),
        ("From:", sender, ("Who is the memo from?", "Who sent the memo?", "From whom is the memo?")),
        ("Date:", words.date(), ("What is the date of the memo?", "When was the memo written?")),
        (
            "Subject:",
            words.subject(),
            ("What is the subject of the memo?", "What is the memo about?", "What is the subject?"),
        ),
    ]
    aligned = rng.random() < 0.5
    for label, value, questions in rng.sample(entries, rng.randint(3, 4)):
        start = left + sheet.style.label.width("Subject:" if aligned else label) + 6
        y += pitch
        if sheet.put(Text(left, y, label, sheet.style.label), Text(start, y, value, sheet.style.body)):
            sheet.ask(rng.choice(questions), value, "form")
    if rng.random() < 0.4:
        sheet.line(left, y + 0.45 * pitch, WIDTH - left, y + 0.45 * pitch)
    return y


def _letter_head(sheet: Sheet, left: float, pitch: float) -> float:
    """Write sender, date and addressee, and return the last baseline."""
    rng, words, body = sheet.rng, sheet.words, sheet.style.body
    y = float(rng.randint(8, 14))
    if rng.random() < 0.65:
        company, font = words.company(), sheet.style.heading.at(body.size + 2)
        y += pitch + 2
        if sheet.put(rng.choice((Text(left, y, company, font), Text.center(WIDTH / 2, y, company, font)))):
            sheet.ask(
                rng.choice(("Which company is the letter from?", "What company is in the letterhead?")),
                company,
                "layout",
            )
        street, small = words.street(), body.at(body.size - 1)
        if rng.random() < 0.4 and sheet.put(Text(left, y + pitch, street, small)):
            y += pitch
            sheet.ask("What is the street address in the letterhead?", street, "layout")
    y += 1.2 * pitch
    date = words.date()
    if sheet.put(rng.choice((Text(left, y, date, body), Text.right(WIDTH - left, y, date, body)))):
        sheet.ask(rng.choice(("What is the date of the letter?", "When was the letter written?")), date, "layout")
    y += 1.3 * pitch
    addressee = words.name()
    if sheet.put(Text(left, y, f"Dear {addressee},", body)):
        questions = ("To whom is the letter addressed?", "Who is the letter addressed to?", "Who is the letter to?")
        sheet.ask(rng.choice(questions), addressee, "layout")
    return y + 0.25 * pitch


def _body(sheet: Sheet, left: float, y: float, pitch: float) -> float:
    """Write one to five sentences, sometimes with a filler, and return the last baseline."""
    rng, body = sheet.rng, sheet.style.body
    sentences: list[str] = []
    questions: list[tuple[str, str]] = []
    for sentence, about in rng.sample(SENTENCES, rng.randint(1, 5)):
        values = _Values(sheet.words)
        sentences.append(sentence.format_map(values))
        questions += [(question, answer.format_map(values)) for question, answer in about]
    if rng.random() < 0.5:
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(FILLERS))
    lines = wrap(" ".join(sentences), body, WIDTH - 2 * left)
    texts = [Text(left, y + (i + 1) * pitch, line, body) for i, line in enumerate(lines)]
    if not sheet.put(*texts):
        return y
    for question, value in questions:
        sheet.ask(question, value, "free_text")
    return texts[-1].y


def _signature(sheet: Sheet, left: float, y: float, pitch: float, sender: str) -> None:
    rng, body = sheet.rng, sheet.style.body
    x = left if rng.random() < 0.7 else WIDTH // 2
    closing = rng.choice(("Sincerely,", "Regards,", "Yours truly,", "Best wishes,", "Respectfully,"))
    if sheet.put(Text(x, y + pitch, closing, body), Text(x, y + 2.2 * pitch, sender, body)):
        sheet.ask(rng.choice(("Who signed the letter?", "Who wrote the letter?")), sender, "layout")
