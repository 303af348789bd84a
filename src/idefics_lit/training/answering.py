"""The images and questions of `Idefics2Module.answer`."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.documents import count_pages, read_page
from idefics_lit.data.example import Example
from idefics_lit.data.images import open_page
from idefics_lit.errors import InputError, first_line
from idefics_lit.utils.texts import list_of_texts

if TYPE_CHECKING:
    from idefics_lit.training.inference import InferenceModule

ImageSource: TypeAlias = Image.Image | str | PathLike[str]


def answer_questions(
    module: "InferenceModule",
    images: ImageSource | Sequence[ImageSource],
    questions: str | Sequence[str],
    batch_size: int,
    collate: Idefics2Collator,
) -> list[tuple[str, float]]:
    """Return the answers of `Idefics2Module.answer` with their confidence, with batches of a collator."""
    pairs = pair_questions(images, questions)
    module.configure_model()
    answers: list[tuple[str, float]] = []
    for start in range(0, len(pairs), batch_size):
        batch = collate(load_examples(pairs[start : start + batch_size]))
        answers += module.generate_with_confidence(module.transfer_batch_to_device(batch, module.model.device, 0))
    module.evaluator.free_memory()
    return answers


def pair_questions(
    images: ImageSource | Sequence[ImageSource], questions: str | Sequence[str]
) -> list[tuple[ImageSource, str]]:
    """Return an image and a question for each answer.

    One image is combined with every question, one question with every image; otherwise they are paired in order.

    Raises:
        InputError: there are no images or no questions, one is empty, or their numbers differ.
    """
    image_list = [images] if isinstance(images, (Image.Image, str, PathLike)) else list(images)
    question_list = list_of_texts(questions, "questions")
    if not image_list or not question_list or not all(question.strip() for question in question_list):
        raise InputError("images and questions: give at least one image and one question, and no empty question")
    count = max(len(image_list), len(question_list))
    if len(image_list) not in (1, count) or len(question_list) not in (1, count):
        raise InputError(
            f"{len(image_list)} images and {len(question_list)} questions: give as many questions as images, or one "
            f"image, or one question"
        )
    image_list *= count // len(image_list)
    question_list *= count // len(question_list)
    return list(zip(image_list, question_list, strict=True))


def load_examples(pairs: Sequence[tuple[ImageSource, str]]) -> list[Example]:
    """Return examples without answers; an image that occurs several times is opened once.

    Raises:
        InputError: an image can't be read.
    """
    keys = [id(image) if isinstance(image, Image.Image) else str(image) for image, _ in pairs]
    pages = {key: _open(image) for key, (image, _) in dict(zip(keys, pairs, strict=True)).items()}
    return [
        Example(number, question, [pages[key]], page_id=key)
        for number, (key, (_, question)) in enumerate(zip(keys, pairs, strict=True))
    ]


def _open(image: ImageSource) -> Image.Image:
    if isinstance(image, Image.Image):
        try:
            return open_page(image)
        except Exception as error:
            raise InputError(f"an image can't be read: {first_line(error)}") from error
    if not isinstance(image, (str, PathLike)):
        raise InputError(f"images: {type(image).__name__} {image!r:.100} is neither a PIL image nor a path")
    if (count := count_pages(str(image))) > 1:
        raise InputError(f"image {image}: it has {count} pages: save each as a file of its own")
    return read_page(str(image), 0)
