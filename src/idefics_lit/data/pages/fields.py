"""The fields of forms: their labels, the nouns that name them in questions, and their values."""

import random
from collections.abc import Callable
from typing import NamedTuple

from idefics_lit.data.pages.sheet import Sheet
from idefics_lit.data.pages.words import Words


class Field(NamedTuple):
    """A field with a label and a value.

    Attributes:
        labels: its names in a document.
        nouns: its names in a question.
        value: draws a value.
        questions: complete questions about it.
    """

    labels: tuple[str, ...]
    nouns: tuple[str, ...]
    value: Callable[[Words], str]
    questions: tuple[str, ...] = ()

    def ask(self, sheet: Sheet, label: str, value: str) -> None:
        """Add a question about the value: with a noun, with its label, or a complete question."""
        rng = sheet.rng
        if self.questions and rng.random() < 0.3:
            question = rng.choice(self.questions)
        elif rng.random() < 0.15:
            question = rng.choice(BY_LABEL).format(label.strip(" :.-"))
        else:
            question = rng.choice(BY_NOUN).format(rng.choice(self.nouns))
        sheet.ask(question, value, "form")


def _field(labels: str, nouns: str, value: Callable[[Words], str], *questions: str) -> Field:
    return Field(tuple(labels.split("|")), tuple(nouns.split("|")), value, questions)


BY_NOUN = (
    *["What is the {}?"] * 6,
    "What is the {} mentioned in the document?",
    "What is the {} given in the form?",
    "What {} is given?",
    "Which {} is mentioned?",
    "Mention the {}.",
    "Find the {}.",
    "{}?",
)
BY_LABEL = (
    'What is written against "{}"?',
    'What is the value of "{}"?',
    'What is filled in for "{}"?',
)

FIELDS = (
    _field("Name|Full Name", "name|full name", Words.name),
    _field("Customer|Customer Name|Client", "customer name|customer|client", Words.name, "Who is the customer?"),
    _field("Patient|Patient Name", "patient name|patient", Words.name, "Who is the patient?"),
    _field("Contact|Contact Person", "contact person|contact", Words.name, "Who is the contact person?"),
    _field("Manager|Supervisor", "manager|supervisor", Words.name, "Who is the manager?"),
    _field("Approved By|Approval", "approver", Words.name, "Who approved it?", "By whom was it approved?"),
    _field("Prepared By|Author", "author", Words.name, "Who prepared the document?"),
    _field("Requested By|Requester", "requester", Words.name, "Who made the request?"),
    _field("Date", "date", Words.date, "When was the form dated?"),
    _field("Due Date|Payment Due", "due date|payment due date", Words.date, "When is the payment due?"),
    _field("Date of Birth|Birth Date|DOB", "date of birth|birth date", Words.date, "When was the person born?"),
    _field("Start Date|Starts On", "start date", Words.date, "When does it start?"),
    _field("End Date|Expiry Date", "end date|expiry date", Words.date, "When does it end?"),
    _field("Received|Date Received", "date received|received date", Words.date, "When was it received?"),
    _field("Invoice No|Invoice Number|Invoice #", "invoice number|invoice no", Words.code),
    _field("Order No|Order Number|PO Number", "order number|order no", Words.code),
    _field("Account No|Account Number|Acct No", "account number|account no", Words.number),
    _field("Reference|Ref No|Our Ref", "reference number|reference", Words.code),
    _field("Case No|File No|Case Number", "case number|file number", Words.code),
    _field("Serial No|Serial Number|S/N", "serial number", Words.code),
    _field("Employee ID|Staff ID|Badge No", "employee ID|badge number|staff ID", Words.number),
    _field("Policy No|Policy Number", "policy number", Words.code),
    _field("Room|Room No", "room|room number", Words.code, "Which room is it?"),
    _field("Phone|Telephone|Tel", "phone number|telephone number", Words.phone),
    _field("Fax|Fax No", "fax number|fax", Words.phone),
    _field("Email|E-mail", "email|email address", Words.email),
    _field("Address|Street", "street address|address", Words.street, "On which street is it?"),
    _field("City|Town", "city|town", Words.city, "In which city is it?"),
    _field("State", "state", Words.state, "In which state is it?"),
    _field("Zip|Zip Code|Postal Code", "zip code|postal code", Words.zip_code),
    _field("Country", "country", Words.country),
    _field("Nationality|Origin", "origin|nationality", Words.country),
    _field("Company|Company Name|Firm", "company|company name|firm", Words.company),
    _field("Vendor|Supplier", "vendor|supplier", Words.company, "Who is the supplier?"),
    _field("Brand|Manufacturer", "brand|manufacturer", Words.company, "Who is the manufacturer?"),
    _field("Department|Dept", "department", Words.department, "Which department is it?"),
    _field("Position|Job Title|Occupation", "position|job title|occupation", Words.position),
    _field("Subject|Re", "subject", Words.subject),
    _field("Project|Project Name", "project|project name", Words.subject),
    _field("Product|Item", "product|item", Words.item, "Which product is named?"),
    _field("Quantity|Qty", "quantity", Words.quantity, "How many were ordered?"),
    _field("Unit Price|Price", "unit price|price", Words.money, "How much does one cost?"),
    _field("Total|Total Amount|Amount Due", "total|total amount|amount due", Words.money, "How much is the total?"),
    _field("Tax|Sales Tax", "tax|sales tax", Words.money, "How much is the tax?"),
    _field("Balance|Account Balance", "balance|account balance", Words.money),
    _field("Budget", "budget", lambda words: words.money(1000), "How large is the budget?"),
    _field("Discount", "discount", Words.percent, "How large is the discount?"),
    _field("Interest|Interest Rate", "interest rate|rate of interest", Words.percent),
    _field("Weight|Net Weight", "weight|net weight", Words.weight, "How heavy is it?"),
    _field("Color|Colour", "color", Words.color, "What color is it?"),
    _field("Age", "age", Words.age, "How old is the person?"),
    _field("Hours|Hours Worked", "number of hours|hours worked", Words.hours, "How many hours are given?"),
    _field("Year|Fiscal Year", "year|fiscal year", Words.year, "Which year is it for?"),
    _field("Time", "time", Words.time, "At what time is it?"),
    _field("Page", "page|page number", Words.page_count),
    _field("Payment|Payment Method|Paid By", "payment method|mode of payment", Words.payment, "How is it paid?"),
    _field("Ship Via|Shipping", "shipping method|mode of shipping", Words.shipping, "How is it shipped?"),
    _field("Status", "status", Words.status),
    _field("Terms|Payment Terms", "terms|terms of payment", Words.terms),
)


def draw_fields(rng: random.Random, sheet: Sheet, count: int) -> list[Field]:
    """Return up to ``count`` random fields of which none answers a question about another."""
    chosen: list[Field] = []
    for field in rng.sample(FIELDS, len(FIELDS)):
        if len(chosen) == count:
            break
        if sheet.claim(*field.nouns, *field.labels):
            chosen.append(field)
    return chosen
