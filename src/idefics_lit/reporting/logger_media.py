"""The answers in a run's loggers: a table in Weights & Biases, images in TensorBoard."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image, ImageDraw, ImageFont

from idefics_lit.reporting.page_gallery import Card

MAX_TENSORBOARD_IMAGES = 8
MAX_LINE_LENGTH = 300


def log_wandb_table(logger: WandbLogger, name: str, cards: Sequence[Card], step: int) -> None:
    """Log a table with a row for each answer and its page."""
    import wandb  # takes a second to import

    columns = ["page", "question", "prediction", "references", "score", "question_types"]
    rows: list[list[Any]] = []
    for card in cards:
        page = wandb.Image(_draw(card.images), file_type="jpg") if card.jpegs else None
        for answer in card.answers:
            references, question_types = " | ".join(answer.references), " | ".join(answer.question_types)
            rows.append([page, answer.question, answer.prediction, references, answer.score, question_types])
    logger.log_table(name, columns, rows, step=step)


def log_tensorboard_images(logger: TensorBoardLogger, name: str, cards: Sequence[Card], step: int) -> None:
    """Log the pages of the first cards, each with its lowest-scored answer written below."""
    with_images = [card for card in cards if card.jpegs]
    for number, card in enumerate(with_images[:MAX_TENSORBOARD_IMAGES], start=1):
        answer = card.answers[0]
        lines = (
            f"{answer.question}   score {answer.score:.2f}",
            f"answered: {answer.prediction}",
            f"expected: {' | '.join(answer.references)}",
        )
        image = _draw(card.images, "\n".join(textwrap.fill(line[:MAX_LINE_LENGTH], 70) for line in lines))
        logger.experiment.add_image(f"{name}/{number}", np.asarray(image), step, dataformats="HWC")


def _draw(pages: Sequence[Image.Image], text: str = "") -> Image.Image:
    """Return an image of the pages side by side, with the text below."""
    width, height = sum(page.width for page in pages), max(page.height for page in pages)
    font = ImageFont.load_default(max(width / 40, 11))
    text_height = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)[3] + 16 if text else 0
    image = Image.new("RGB", (width, height + int(text_height)), "white")
    x = 0
    for page in pages:
        image.paste(page, (x, 0))
        x += page.width
    ImageDraw.Draw(image).multiline_text((8, height + 4), text, "black", font)
    return image
