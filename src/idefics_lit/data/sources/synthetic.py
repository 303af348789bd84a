"""Rendered pages as a data set: nothing to download, as many pages as wanted, different ones for each split."""

import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL.Image import Image

from idefics_lit.data.example import Example, Examples
from idefics_lit.data.pages import MOST_QUESTIONS, Question, page_questions, render_page


class SyntheticPages(Examples):
    """Questions on pages that are rendered when they are asked for, in the loader's workers.

    Families take turns. Split and seed decide the pages: no two splits share one.

    Args:
        split: any name, such as ``train``.
        pages: number of pages.
        seed: another seed gives other pages.
        families: see `idefics_lit.data.pages.FAMILIES`.

    Attributes:
        page_ids: the page of each question, as ((family, page seed),).
        answers: the accepted answers of each question.

    Raises:
        InputError: there is no such family.
    """

    page_ids: list[tuple[tuple[str, int]]]
    answers: list[list[str]]

    def __init__(
        self, split: str, pages: int, seed: int = 0, families: Sequence[str] = ("form", "table", "letter")
    ) -> None:
        self.split = split
        self.page_ids, self.answers = [], []
        self._items: list[tuple[int, int]] = []
        for index in range(pages):
            page = families[index % len(families)], random.Random(f"{split} {seed} {index}").getrandbits(63)
            for number, question in enumerate(page_questions(*page)):
                self.page_ids.append((page,))
                self.answers.append(question.answers)
                self._items.append((index, number))

    def __len__(self) -> int:
        """Count the questions."""
        return len(self._items)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its page, mode "L", 448 x 336 pixels."""
        page, number = self._items[index]
        ((family, seed),) = self.page_ids[index]
        image, questions = _render(family, seed)
        question = questions[number]
        return Example(
            question_id=page * MOST_QUESTIONS + number,
            question=question.text,
            images=[image],
            answers=list(question.answers),
            question_types=[question.type],
            source=self.source(index),
        )

    def source(self, index: int) -> str:
        """Name a question's page for error messages."""
        page, number = self._items[index]
        return f"synthetic {self.split}, page {page} ({self.page_ids[index][0][0]}), question {number}"


@lru_cache(maxsize=16)
def _render(family: str, seed: int) -> tuple[Image, list[Question]]:
    """A page, kept for a while: the questions of a page mostly come one after the other."""
    page = render_page(family, seed)
    return page.image, page.questions


def write_docvqa(dataset: SyntheticPages, folder: str | Path) -> Path:
    """Write a data set to disk in the official form of DocVQA's Task 1.

    Args:
        dataset: what to write.
        folder: gets ``<split>_v1.0_withQT.json`` and the pages as ``documents/*.png``; made if it isn't there.

    Returns:
        The JSON file's path.
    """
    folder = Path(folder)
    (folder / "documents").mkdir(parents=True, exist_ok=True)
    rows = []
    for item, ((family, _),) in enumerate(dataset.page_ids):
        example = dataset[item]
        page = int(example.question_id) // MOST_QUESTIONS
        image = f"documents/{dataset.split}_{family}_{page}.png"
        if item == 0 or dataset.page_ids[item - 1] != dataset.page_ids[item]:
            example.images[0].save(folder / image)
        rows.append(
            {
                "questionId": example.question_id,
                "question": example.question,
                "question_types": example.question_types,
                "image": image,
                "docId": page,
                "ucsf_document_id": f"{family}_{page}",
                "ucsf_document_page_no": "1",
                "answers": example.answers,
                "data_split": dataset.split,
            }
        )
    path = folder / f"{dataset.split}_v1.0_withQT.json"
    head = {"dataset_name": "idefics-lit synthetic pages", "dataset_version": "1.0", "dataset_split": dataset.split}
    path.write_text(json.dumps({**head, "data": rows}, indent=1), encoding="utf-8")
    return path
