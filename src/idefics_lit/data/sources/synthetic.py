"""A data set of generated pages: any number of pages, different ones for each split."""

import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL.Image import Image

from idefics_lit.data.example import Example, Examples
from idefics_lit.data.pages import MAX_QUESTIONS, Question, page_questions, render_page


class SyntheticPages(Examples):
    """Questions about pages that are rendered when an example is requested, in the loader's workers.

    Families alternate. The split and the seed decide the pages: no two splits share one.

    Args:
        split: any name, such as ``train``.
        pages: the number of pages.
        seed: a different seed gives different pages.
        families: see `idefics_lit.data.pages.FAMILIES`.

    Attributes:
        page_ids: the page of each question, as ((family, page seed),).
        answers: the accepted answers of each question.

    Raises:
        InputError: when a family doesn't exist.
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
        """Return the number of questions."""
        return len(self._items)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its page, an image of mode "L" and 448 x 336 pixels."""
        page, number = self._items[index]
        ((family, seed),) = self.page_ids[index]
        image, questions = _render(family, seed)
        question = questions[number]
        return Example(
            question_id=page * MAX_QUESTIONS + number,
            question=question.text,
            images=[image],
            answers=list(question.answers),
            question_types=[question.type],
            source=self.source(index),
        )

    def source(self, index: int) -> str:
        """Return the name of a question's page, for error messages."""
        page, number = self._items[index]
        return f"synthetic {self.split}, page {page} ({self.page_ids[index][0][0]}), question {number}"

    def identity(self, index: int) -> object:
        """Return the page and the number of the question, which decide its text."""
        return self.page_ids[index], self._items[index]


@lru_cache(maxsize=16)
def _render(family: str, seed: int) -> tuple[Image, list[Question]]:
    """Render a page, with a cache: the questions about a page mostly follow one another."""
    page = render_page(family, seed)
    return page.image, page.questions


def write_docvqa(dataset: SyntheticPages, folder: str | Path) -> Path:
    """Write a data set to disk in the official form of DocVQA's Task 1.

    Args:
        dataset: the data set.
        folder: is created; gets ``<split>_v1.0_withQT.json`` and the pages as ``documents/*.png``.

    Returns:
        The JSON file's path.
    """
    folder = Path(folder)
    (folder / "documents").mkdir(parents=True, exist_ok=True)
    rows = []
    for index, ((family, _),) in enumerate(dataset.page_ids):
        example = dataset[index]
        page = int(example.question_id) // MAX_QUESTIONS
        image = f"documents/{dataset.split}_{family}_{page}.png"
        if index == 0 or dataset.page_ids[index - 1] != dataset.page_ids[index]:
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
