"""The pages of an evaluation as small JPEGs with their questions, lowest scores first, limited in number and size."""

import base64
import io
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from idefics_lit.data.example import Examples
from idefics_lit.errors import first_line
from idefics_lit.evaluation.answer import Answer, mean_anls

MAX_CARDS, MAX_PAGES_PER_CARD, MAX_QUESTIONS_PER_CARD = 48, 8, 24
MAX_JPEG_BYTES = 3_000_000  # of all cards; 4 MB in HTML, as base64
LONGEST_EDGES = (1400, 1000, 700, 400)  # of a page in pixels, tried in this order until its JPEG is small enough


@dataclass
class Card:
    """A page, or the pages of a document, and the answers to the questions about it.

    Attributes:
        answers: the answers, the lowest score first.
        jpegs: the pages as JPEG files.
        note: which pages are missing, and why.
    """

    answers: list[Answer]
    jpegs: Sequence[bytes] = ()
    note: str = ""

    @property
    def images(self) -> list[Image.Image]:
        """The decoded pages."""
        return [Image.open(io.BytesIO(jpeg)) for jpeg in self.jpegs]

    @property
    def data_uris(self) -> list[str]:
        """The pages as data URIs."""
        return [f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" for jpeg in self.jpegs]


def group_by_page(answers: Iterable[Answer], examples: Examples) -> list[Card]:
    """Return a card without images for each page, ordered by the lowest score, then by the mean score.

    Args:
        answers: scored answers with an index; those of further data loaders are left out.
        examples: the split of the first data loader.
    """
    pages: dict[Hashable, list[Answer]] = {}
    for answer in answers:
        if answer.dataloader_idx:
            continue
        assert answer.index is not None
        pages.setdefault(examples.page_ids[answer.index], []).append(answer)

    def score(answer: Answer) -> Any:  # noqa: ANN401
        return answer.score

    cards = [Card(sorted(page_answers, key=score)) for page_answers in pages.values()]
    return sorted(cards, key=lambda card: (card.answers[0].score, mean_anls(card.answers)))


def add_images(cards: Sequence[Card], examples: Examples) -> list[Card]:
    """Return the first cards with their pages, as many as fit into the limits; further pages aren't decoded."""
    selected: list[Card] = []
    remaining_bytes = MAX_JPEG_BYTES
    for card in cards[:MAX_CARDS]:
        jpegs: list[bytes] = []
        index = card.answers[0].index
        assert index is not None
        try:
            pages = examples[index].images
            max_bytes = remaining_bytes // (min(len(cards), MAX_CARDS) - len(selected))
            jpegs = _encode(pages[:MAX_PAGES_PER_CARD], max_bytes)
            note = f"and {len(pages) - MAX_PAGES_PER_CARD} more pages" if len(pages) > MAX_PAGES_PER_CARD else ""
        except Exception as error:
            note = f"no image: {first_line(error)}"
        if (size := sum(map(len, jpegs))) > remaining_bytes:
            break
        remaining_bytes -= size
        selected.append(Card(card.answers[:MAX_QUESTIONS_PER_CARD], jpegs, note))
    return selected


def _encode(pages: Sequence[Image.Image], max_bytes: int) -> list[bytes]:
    """Return JPEGs of ``max_bytes`` together at most, or the smallest."""
    pages = [page.convert("L" if page.mode in ("1", "L") else "RGB") for page in pages]
    for edge in LONGEST_EDGES:
        for page in pages:
            page.thumbnail((edge, edge), reducing_gap=3)
        jpegs = [_jpeg(page) for page in pages]
        if sum(map(len, jpegs)) <= max_bytes:
            break
    return jpegs


def _jpeg(page: Image.Image) -> bytes:
    file = io.BytesIO()
    page.save(file, "JPEG", quality=60, optimize=True)
    return file.getvalue()
