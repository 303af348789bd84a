"""The pages of an evaluation's answers as small pictures, the worst first, as many as there is room for."""

import base64
import io
import textwrap
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image, ImageDraw, ImageFont

from idefics_lit.data.example import Examples
from idefics_lit.errors import first_line

MOST_CARDS, MOST_PAGES, MOST_QUESTIONS = 48, 8, 24  # of them, and on each
ROOM = 3_000_000  # bytes of JPEG, which are 4 MB in HTML
TENSORBOARD = 8  # cards
EDGES = (1400, 1000, 700, 400)  # a page's longest, in pixels: the first for which there is room


@dataclass
class Card:
    """A question's page, or several, and the questions asked about it.

    Attributes:
        records: `Evaluation.records`, the lowest score first.
        pictures: JPEGs.
        missing: which pictures aren't there, and why.
    """

    records: list[dict[str, Any]]
    pictures: Sequence[bytes] = ()
    missing: str = ""

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, decoded."""
        return [Image.open(io.BytesIO(picture)) for picture in self.pictures]

    @property
    def addresses(self) -> list[str]:
        """The pictures as data URIs."""
        return [f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" for picture in self.pictures]


def group_by_page(records: Sequence[dict[str, Any]], examples: Examples) -> list[Card]:
    """Return a card without pictures for each page, the one with the lowest score first, then by the mean."""
    pages: dict[Hashable, list[dict[str, Any]]] = {}
    for record in records:
        pages.setdefault(examples.page_ids[record["place"]], []).append(record)
    cards = [Card(sorted(of_page, key=lambda record: record["score"])) for of_page in pages.values()]

    def badness(card: Card) -> tuple[float, float]:
        scores = [record["score"] for record in card.records]
        return scores[0], sum(scores) / len(scores)

    return sorted(cards, key=badness)


def show(cards: Sequence[Card], examples: Examples) -> list[Card]:
    """Return the first cards, as many as there is room for, with their pictures; no others are decoded."""
    shown: list[Card] = []
    left = ROOM
    for card in cards[:MOST_CARDS]:
        pictures: list[bytes] = []
        try:
            pages = examples[card.records[0]["place"]].images
            share = left // (min(len(cards), MOST_CARDS) - len(shown))
            pictures = _fit(pages[:MOST_PAGES], share)
            missing = f"and {len(pages) - MOST_PAGES} more pages" if len(pages) > MOST_PAGES else ""
        except Exception as error:
            missing = f"no picture: {first_line(error)}"
        if (size := sum(map(len, pictures))) > left:
            break
        left -= size
        shown.append(Card(card.records[:MOST_QUESTIONS], pictures, missing))
    return shown


def _fit(pages: Sequence[Image.Image], share: int) -> list[bytes]:
    """Return JPEGs that are ``share`` bytes together, or the smallest."""
    pages = [page.convert("L" if page.mode in ("1", "L") else "RGB") for page in pages]
    for edge in EDGES:
        for page in pages:
            page.thumbnail((edge, edge), reducing_gap=3)
        pictures = [_jpeg(page) for page in pages]
        if sum(map(len, pictures)) <= share:
            break
    return pictures


def _jpeg(page: Image.Image) -> bytes:
    file = io.BytesIO()
    page.save(file, "JPEG", quality=60, optimize=True)
    return file.getvalue()


def log_table(logger: WandbLogger, name: str, cards: Sequence[Card], step: int) -> None:
    """Log a table of the questions on some cards to Weights & Biases, each with its page."""
    import wandb  # only where it is used: its import takes a second

    columns = ["page", "question", "prediction", "references", "score", "question_types"]
    rows: list[list[Any]] = []
    for card in cards:
        page = wandb.Image(_sheet(card.images), file_type="jpg") if card.pictures else None
        for record in card.records:
            references, types = (" | ".join(record[name]) for name in ("references", "question_types"))
            rows.append([page, record["question"], record["prediction"], references, record["score"], types])
    logger.log_table(name, columns, rows, step=step)


def log_pictures(logger: TensorBoardLogger, name: str, cards: Sequence[Card], step: int) -> None:
    """Log the first cards to TensorBoard, each a picture with its worst question and answer written below."""
    for number, card in enumerate([card for card in cards if card.pictures][:TENSORBOARD], start=1):
        record = card.records[0]
        lines = (
            f"{record['question']}   score {record['score']:.2f}",
            f"answered: {record['prediction']}",
            f"expected: {' | '.join(record['references'])}",
        )
        sheet = _sheet(card.images, "\n".join(textwrap.fill(line[:300], 70) for line in lines))
        logger.experiment.add_image(f"{name}/{number}", np.asarray(sheet), step, dataformats="HWC")


def _sheet(images: Sequence[Image.Image], text: str = "") -> Image.Image:
    """A question's pages side by side, with a text below."""
    width, height = sum(image.width for image in images), max(image.height for image in images)
    font = ImageFont.load_default(max(width / 40, 11))
    below = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)[3] + 16 if text else 0
    sheet = Image.new("RGB", (width, height + int(below)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    ImageDraw.Draw(sheet).multiline_text((8, height + 4), text, "black", font)
    return sheet
