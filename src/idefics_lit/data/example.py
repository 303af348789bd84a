"""The types that every data source yields: a question about page images, and a split of them."""

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from PIL.Image import Image
from torch.utils.data import Dataset

from idefics_lit.errors import InputError
from idefics_lit.utils.texts import list_of_texts


@dataclass
class Example:
    """One question about a document.

    Attributes:
        question_id: the data's own id, an int or a str.
        question: the question's text.
        images: the decoded pages; most data sets have one page per question.
        answers: the accepted answers, or a single string; empty if the data has none (a test split).
        question_types: the data's own types of question, such as ``table/list``; may be empty.
        answer_page: the index of the page with the answer, if the data has it.
        source: names the row in error messages, such as ``val_v1.0_withQT.json, row 3 (questionId 60007)``.
        epoch: the training epoch. With it the sampled answer is a function of (seed, epoch, question id), and so the
            same after a resume; without it torch's generator samples.
        page_id: the key of its pages. Questions with the same key and the same images share a row of a batch.
        index: its index in the split, which identifies it in metrics and predictions, whatever its id. A data module
            sets it; without one an example is identified by its id and how often its rank has met that id.
        is_padding: whether it only pads a rank's share; it has no labels and is scored once.

    Raises:
        InputError: as `check` does.
    """

    question_id: int | str
    question: str
    images: list[Image]
    answers: list[str] = field(default_factory=list)
    question_types: list[str] = field(default_factory=list)
    answer_page: int | None = None
    source: str = ""
    epoch: int | None = None
    page_id: Hashable = None
    index: int | None = None
    is_padding: bool = False

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check the types, and make lists of a single answer, type or image; the collator checks again.

        Raises:
            InputError: names the example that holds something other than strings or images.
        """
        name = self.source or f"question {self.question_id}"
        if not isinstance(self.question_id, str):
            try:
                self.question_id = operator.index(self.question_id)
            except TypeError as error:
                kind = type(self.question_id).__name__
                raise InputError(f"{name}: the id is {kind}: give an int or a text") from error
        if not isinstance(self.question, str):
            raise InputError(f"{name}: the question is {type(self.question).__name__}: give a text")
        self.answers = list_of_texts(self.answers, f"{name}: answers")
        self.question_types = list_of_texts(self.question_types, f"{name}: question_types")
        self.images = [self.images] if isinstance(self.images, Image) else list(self.images)
        if wrong := next((type(image).__name__ for image in self.images if not isinstance(image, Image)), None):
            raise InputError(f"{name}: images holds {wrong}: give decoded images, such as PIL.Image.open's")


class Examples(Dataset[Example]):
    """One split of a source. Pages are decoded or drawn when an example is requested, in the loader's worker.

    Attributes:
        page_ids: the keys of each question's pages, known without decoding them. The same image has the same key,
            whatever its file name; two questions with a key in common are about one page.
        answers: the references of each question; an empty list if it has none.
        faults: what is wrong with the rows that are known to be bad without opening a page: one line each, by index.
    """

    page_ids: Sequence[tuple[Hashable, ...]]
    answers: Sequence[Sequence[str]]
    faults: Mapping[int, str] = MappingProxyType({})

    def __len__(self) -> int:
        """Return the number of questions."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        """Return a question with its decoded pages."""
        raise NotImplementedError

    def source(self, index: int) -> str:
        """Return the name of a question's row, for error messages."""
        raise NotImplementedError

    def identity(self, index: int) -> object:
        """Return a question's id and text, by which a resumed run notices other data; None if they aren't known."""
        return None
