"""The answers in a run's loggers: as a table, and the worst pages as images.

Weights & Biases, MLflow, Comet and TensorBoard hold both. Other loggers, such as CSVLogger, hold metrics only.
"""

import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image, ImageDraw, ImageFont

from idefics_lit.reporting.page_gallery import Card

MAX_IMAGES = 8
MAX_LINE_LENGTH = 300
COLUMNS = ("question", "prediction", "references", "score", "question_types")


def log_answers(logger: Logger, stage: str, cards: Sequence[Card], step: int) -> None:
    """Log a table with a row for each answer, and images of the pages of the first cards.

    Args:
        logger: any logger; those that hold no tables are left alone.
        stage: ``val`` or ``test``, the first part of the names.
        cards: the answers by page, lowest scores first.
        step: the optimizer step.
    """
    if isinstance(logger, WandbLogger):
        _log_wandb_table(logger, f"{stage}/answers", cards, step)
    elif isinstance(logger, MLFlowLogger):
        client, run_id = logger.experiment, logger.run_id
        client.log_text(run_id, _csv(cards), f"{stage}/answers.csv")
        for number, image in _worst_pages(cards):
            client.log_image(run_id, image, f"{stage}/worst/{number}.png")
    elif isinstance(logger, CometLogger):
        logger.experiment.log_table(f"{stage}_answers.csv", _rows(cards), list(COLUMNS))
        for number, image in _worst_pages(cards):
            logger.experiment.log_image(image, f"{stage}/worst/{number}", step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(f"{stage}/answers", _markdown(cards), step)
        for number, image in _worst_pages(cards):
            logger.experiment.add_image(f"{stage}/worst/{number}", np.asarray(image), step, dataformats="HWC")


def _log_wandb_table(logger: WandbLogger, name: str, cards: Sequence[Card], step: int) -> None:
    """Log a table whose rows hold their page."""
    import wandb  # takes a second to import

    rows: list[list[Any]] = []
    for card in cards:
        page = wandb.Image(_draw(card.images), file_type="jpg") if card.jpegs else None
        rows += [[page, *row] for row in _rows([card])]
    logger.log_table(name, ["page", *COLUMNS], rows, step=step)


def _rows(cards: Sequence[Card]) -> list[list[Any]]:
    """Return the values of `COLUMNS` for each answer."""
    return [
        [
            answer.question,
            answer.prediction,
            " | ".join(answer.references),
            answer.score,
            " | ".join(answer.question_types),
        ]
        for card in cards
        for answer in card.answers
    ]


def _csv(cards: Sequence[Card]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([COLUMNS, *_rows(cards)])
    return file.getvalue()


def _markdown(cards: Sequence[Card]) -> str:
    def line(values: Sequence[Any]) -> str:
        cells = (" ".join(str(value).split()) for value in values)
        return "| " + " | ".join(cell.replace("\\", r"\\").replace("|", r"\|") for cell in cells) + " |"

    return "\n".join([line(COLUMNS), "|---" * len(COLUMNS) + "|", *map(line, _rows(cards))])


def _worst_pages(cards: Sequence[Card]) -> Iterator[tuple[int, Image.Image]]:
    """Yield the pages of the first cards, counted from 1, each with its lowest-scored answer written below."""
    with_images = [card for card in cards if card.jpegs]
    for number, card in enumerate(with_images[:MAX_IMAGES], start=1):
        answer = card.answers[0]
        lines = (
            f"{answer.question}   score {answer.score:.2f}",
            f"answered: {answer.prediction}",
            f"expected: {' | '.join(answer.references)}",
        )
        yield number, _draw(card.images, "\n".join(textwrap.fill(line[:MAX_LINE_LENGTH], 70) for line in lines))


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
