"""Questions about the pages of image files and PDFs, answered on the screen."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL.Image import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.documents import count_pages, read_page
from idefics_lit.data.example import Example
from idefics_lit.errors import InputError
from idefics_lit.evaluation.answer import Answer
from idefics_lit.pretrained import load_processor
from idefics_lit.utils.texts import list_of_texts


class Asked(Dataset[Example]):
    """Every question about every page, a page's questions in a row; a page is decoded when it is asked for.

    Args:
        files: images and PDFs, or one; a PDF and a TIFF may have several pages.
        questions: what is asked, or one question.

    Attributes:
        pages: file and number, from 0, of each page.

    Raises:
        InputError: there is no file or no question, a question is empty, or a file isn't one that can be read.
    """

    def __init__(self, files: Sequence[str] | str, questions: Sequence[str] | str) -> None:
        files, questions = list_of_texts(files, "image"), list_of_texts(questions, "question")
        if not files:
            raise InputError("image is missing: give --image FILE, an image or a PDF")
        if not questions:
            raise InputError('question is missing: give --question "What is …?"')
        if not all(question.strip() for question in questions):
            raise InputError("question: one is empty, ask something")
        self.questions = questions
        self.counts = {file: count_pages(file) for file in files}
        self.pages = [(file, number) for file, count in self.counts.items() for number in range(count)]
        self._decoded: tuple[int, Image] | None = None  # the last page, kept for its other questions

    def __len__(self) -> int:
        """Count the answers there will be."""
        return len(self.pages) * len(self.questions)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its page, decoded."""
        page, number = divmod(index, len(self.questions))
        if self._decoded is None or self._decoded[0] != page:
            self._decoded = page, read_page(*self.pages[page])
        return Example(
            question_id=index,
            question=self.questions[number],
            images=[self._decoded[1]],
            source=f"question {self.questions[number]!r} about {self.name(page)}",
            page_id=page,
            index=index,
        )

    def loader(self, options: Mapping[str, Any], pixels: torch.dtype) -> DataLoader[Example]:
        """Return batches of a page each, whose questions share its row.

        Args:
            options: the data module's.
            pixels: the model's dtype.
        """
        return DataLoader(self, batch_size=len(self.questions), collate_fn=collator(options, pixels))

    def name(self, page: int) -> str:
        """Return what a page is called: its file, and its number where the file has several."""
        file, number = self.pages[page]
        return file if self.counts[file] == 1 else f"{file}, page {number + 1}"


def collator(options: Mapping[str, Any], pixels: torch.dtype) -> Idefics2Collator:
    """Return what makes batches of questions without answers.

    Args:
        options: the data module's.
        pixels: the model's dtype.
    """
    return Idefics2Collator(
        load_processor(
            options["pretrained"], image_splitting=options["image_splitting"], image_size=options["image_size"]
        ),
        train=False,
        prompt_style=options["prompt_style"],
        max_length=options["max_length"],
        pixel_dtype=pixels,
    )


class AnswerPrinter(Callback):
    """Print answers as they come, a page at a time.

    Args:
        asked: the questions, of which a batch holds one page's.
        as_json: a line ``{"image", "page", "question", "answer"}`` each, pages counted from 1, in place of a table.
    """

    def __init__(self, asked: Asked, *, as_json: bool) -> None:
        self.asked, self.as_json = asked, as_json

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: list[Answer], *_: object
    ) -> None:
        """Print a page's."""
        page = cast(int, outputs[0].index) // len(self.asked.questions)
        answers = [(answer.question, answer.prediction) for answer in outputs]
        if self.as_json:
            file, number = self.asked.pages[page]
            for question, answer in answers:
                line = {"image": file, "page": number + 1, "question": question, "answer": answer}
                print(json.dumps(line, ensure_ascii=False), flush=True)
            return
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
        for question, answer in answers:
            table.add_row(escape(question), f"[bold]{escape(answer)}[/bold]")
        console = Console(highlight=False)
        console.print(escape(self.asked.name(page)), soft_wrap=True)
        console.print(table)
