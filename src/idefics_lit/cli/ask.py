"""The command ``ask``: questions about the pages of image files and PDFs, answered on the screen."""

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
from idefics_lit.evaluation.confidence import confidence
from idefics_lit.pretrained import DTYPES, load_processor
from idefics_lit.utils.texts import list_of_texts


def ask(
    trainer: Trainer,
    module: LightningModule,
    data: Mapping[str, Any],
    *,
    images: Sequence[str] | str,
    questions: Sequence[str] | str,
    as_json: bool = False,
    min_confidence: float = 0.0,
    ckpt_path: str | None = None,
) -> None:
    """Ask every question about every page and print the answers.

    Args:
        trainer: gives device and precision.
        module: the model that answers.
        data: the data module's options, on which prompt and pages depend; no data is read.
        images: files of images and PDFs.
        questions: the questions.
        as_json: print JSON lines instead of tables.
        min_confidence: from 0 to 1; an answer with less confidence isn't given.
        ckpt_path: the checkpoint of the adapter; by default the model without one answers.

    Raises:
        InputError: a file can't be read, files or questions are missing, or min_confidence is out of range.
    """
    if not 0 <= min_confidence <= 1:
        raise InputError(f"min_confidence {min_confidence}: give a number from 0 to 1")
    pages = PageQuestions(images, questions)
    trainer.callbacks.append(AnswerPrinter(pages, as_json=as_json, min_confidence=min_confidence))  # type: ignore[attr-defined]
    # A batch holds the questions about one page, which are packed into one sequence.
    loader = DataLoader(
        pages,
        batch_size=len(pages.questions),
        collate_fn=prompt_collator(data, DTYPES.get(str(trainer.precision), torch.float32)),
    )
    trainer.predict(module, loader, return_predictions=False, ckpt_path=ckpt_path, weights_only=True)


class PageQuestions(Dataset[Example]):
    """All questions about all pages, page by page. A page is decoded when its first question is read.

    Args:
        files: one or more images and PDFs; PDFs and TIFFs may have several pages.
        questions: one or more questions.

    Attributes:
        pages: file and page number, from 0, of each page.

    Raises:
        InputError: there is no file or no question, a question is empty, or a file can't be read.
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
        self.page_counts = {file: count_pages(file) for file in files}
        self.pages = [(file, number) for file, count in self.page_counts.items() for number in range(count)]
        self._decoded: tuple[int, Image] | None = None  # the last page, for its other questions

    def __len__(self) -> int:
        """Return the number of pages times the number of questions."""
        return len(self.pages) * len(self.questions)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its decoded page."""
        page, question = divmod(index, len(self.questions))
        if self._decoded is None or self._decoded[0] != page:
            self._decoded = page, read_page(*self.pages[page])
        return Example(
            question_id=index,
            question=self.questions[question],
            images=[self._decoded[1]],
            source=f"question {self.questions[question]!r} about {self.page_name(page)}",
            page_id=page,
            index=index,
        )

    def page_name(self, page: int) -> str:
        """Return the file of a page, with the page number if the file has several pages."""
        file, number = self.pages[page]
        return file if self.page_counts[file] == 1 else f"{file}, page {number + 1}"


def prompt_collator(data: Mapping[str, Any], dtype: torch.dtype) -> Idefics2Collator:
    """Return a collator of questions without answers.

    Args:
        data: the data module's options.
        dtype: the model's dtype, for the pixels.
    """
    return Idefics2Collator(
        load_processor(data["pretrained"], image_splitting=data["image_splitting"], image_size=data["image_size"]),
        train=False,
        prompt_style=data["prompt_style"],
        max_length=data["max_length"],
        pixel_dtype=dtype,
    )


class AnswerPrinter(Callback):
    """Print the answers and their confidence page by page, and the temperature if one was fitted.

    Args:
        pages: the questions; a batch holds those about one page.
        as_json: print a line ``{"image", "page", "question", "answer", "confidence", "temperature"}`` per answer, pages
            counted from 1, instead of a table per page.
        min_confidence: below it the answer is null in JSON, and "not sure" in tables.
    """

    def __init__(self, pages: PageQuestions, *, as_json: bool, min_confidence: float) -> None:
        self.pages, self.as_json, self.min_confidence = pages, as_json, min_confidence

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,  # noqa: ANN401
        outputs: list[Answer],
        *_: object,
    ) -> None:
        """Print the answers about one page."""
        page = cast(int, outputs[0].index) // len(self.pages.questions)
        temperature = pl_module.temperature
        answers: list[tuple[str, str | None, float]] = []
        for answer in outputs:
            sure = confidence(answer.log_probability, temperature)
            answers.append((answer.question, answer.prediction if sure >= self.min_confidence else None, sure))
        if self.as_json:
            file, number = self.pages.pages[page]
            for question, text, sure in answers:
                line = {"image": file, "page": number + 1, "question": question, "answer": text}
                line |= {"confidence": round(sure, 4), "temperature": round(temperature, 4)}
                print(json.dumps(line, ensure_ascii=False), flush=True)
            return
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
        for question, text, sure in answers:
            shown = "[italic]not sure[/italic]" if text is None else f"[bold]{escape(text)}[/bold]"
            table.add_row(escape(question), shown, f"[dim]{sure:.0%}[/dim]")
        console = Console(highlight=False)
        console.print(escape(self.pages.page_name(page)), soft_wrap=True)
        console.print(table)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Name the temperature below the tables."""
        if not self.as_json and pl_module.temperature != 1:
            note = (
                f"confidence: the answer's probability, at the temperature {pl_module.temperature:.2f} of the training"
            )
            Console(highlight=False).print(f"[dim]{note}[/dim]", soft_wrap=True)
