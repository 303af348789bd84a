"""What every source of data yields: one question about one or several page images."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
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
        images: the pages, decoded; most data sets have one page a question.
        answers: the accepted answers, or a text where there is one; empty where the data has none (a test split).
        question_types: the data's own types of question, such as ``table/list``; may be empty.
        answer_page: which of its pages, from 0, the answer is on, where the data says so.
        where: names the row for error messages, such as ``val_v1.0_withQT.json, row 3 (questionId 60007)``.
        epoch: the epoch in which training visits the example. With it the answer drawn is a function of
            (seed, epoch, question id) and so the same after a resume; without it torch's generator draws.
        page_id: the key of its pages; questions with the same one, and the same images, share a row of a batch.
        place: where it stands in its set, by which it is counted and its answer is written, whatever its id. A data
            module sets it; without one an example counts by its id, and again where its rank meets the id again.
        repeated: whether another rank has it too, to have as many as the others; it has no labels, and counts once.
    """

    question_id: int | str
    question: str
    images: list[Image]
    answers: list[str] = field(default_factory=list)
    question_types: list[str] = field(default_factory=list)
    answer_page: int | None = None
    where: str = ""
    epoch: int | None = None
    page_id: Hashable = None
    place: int | None = None
    repeated: bool = False

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Make lists of a single answer, type or image; the collator checks again what was set since.

        Raises:
            InputError: names the example that holds something else where texts or images should be.
        """
        name = self.where or f"question {self.question_id}"
        if not isinstance(self.question_id, str):
            try:
                self.question_id = index(self.question_id)
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
    """One split of a source. A page is decoded or drawn when an example is asked for, in the loader's worker.

    Attributes:
        page_ids: the keys of every question's pages, known without decoding them: the same for the same image or file,
            however it is called. Two questions that have a key in common are about one page.
        answers: the references of every question; an empty list where it has none.
        faults: what is wrong with the rows that are known to be bad without opening a page, by number, a line each.
    """

    page_ids: Sequence[tuple[Hashable, ...]]
    answers: Sequence[Sequence[str]]
    faults: Mapping[int, str] = MappingProxyType({})

    def __len__(self) -> int:
        """Count the questions."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        """Return a question with its pages, decoded."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """Name a question's row for error messages."""
        raise NotImplementedError


def as_text(value: object) -> str:
    """Return a stored text or number as text; what says nothing, such as None, NaN or white space, is "".

    Raises:
        ValueError: says what it holds that is no text: a list, an object, or a character that no UTF-8 file can hold.
    """
    if isinstance(value, (Mapping, list, tuple, bytes)):
        raise ValueError(f"holds {type(value).__name__} where a text should be")
    if value is None or value != value:
        return ""
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds {text[error.start]!r}, a character that is no text") from error
    return text if text.strip() else ""


def as_id(value: object) -> int | str:
    """Return a stored id: a whole number as it is, anything else as `as_text` does."""
    text = as_text(value)
    return value if type(value) is int else text


def as_texts(value: object) -> list[str]:
    """Return a column of texts as a list: none, one or several may be stored.

    Raises:
        ValueError: as `as_text` does.
    """
    texts = value if isinstance(value, (list, tuple)) else [value]
    return [text for text in map(as_text, texts) if text]


def as_page(value: object) -> int | None:
    """Return the number of a page, from 0, or None where there is none.

    Raises:
        ValueError: as `as_text` does; says what it holds that is no number.
    """
    text = as_text(value)
    try:
        number = float(text or -1)  # a column with gaps may be one of floats
    except ValueError:
        number = 0.5
    if not number.is_integer() or number < -1:  # -1 is a common way to write that there is none
        raise ValueError(f"holds {text!r:.100} where the number of a page should be")
    return int(number) if number >= 0 else None


def read_answers(read: Callable[[int], list[str]], count: int) -> tuple[list[list[str]], dict[int, str]]:
    """Return the answers of so many rows, and what is wrong with those that can't be read: they have none.

    Args:
        read: returns a row's answers; its `InputError` names the row.
        count: the number of rows.
    """
    answers: list[list[str]] = [[] for _ in range(count)]
    faults = {}
    for row in range(count):
        try:
            answers[row] = read(row)
        except InputError as error:
            faults[row] = str(error)
    return answers, faults
