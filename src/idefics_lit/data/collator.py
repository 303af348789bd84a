"""Collate examples into a batch of Idefics2: chat template, processor, labels.

Only the answer and its closing ``<end_of_utterance>`` are supervised. The prompt's length is computed with the
tokenizer. Nothing is ever truncated. Questions on one page are packed into one row, see `idefics_lit.model.packing`.
"""

import hashlib
import random
import re
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.utils.rnn import pad_sequence

from idefics_lit.data.example import Example
from idefics_lit.data.page_keys import page_digest
from idefics_lit.errors import InputError
from idefics_lit.model.batch import Batch, Prompts
from idefics_lit.model.packing import IGNORED_LABEL, PackedRow, Segment, pack

if TYPE_CHECKING:
    from transformers import BatchFeature, ProcessorMixin

PromptStyle = Literal["recipe", "idefics"]
PLACEHOLDERS = ("\ue000", "\ue001")  # of question and answer: characters that Unicode leaves to programs
PROBE = "Aé  <&>\"'\\n\n{{ x }} {% 1"  # a template that changes texts, such as by escaping, changes it


class TokenizedExamples(NamedTuple):
    """Examples as token ids and their pages as pixels, before they are packed into rows.

    Attributes:
        row_members: for each row the indices of its examples.
        images: the image processor's output, one entry a row.
        page_ids: for each row the token ids up to its last image token.
        prompt_ids: for each example the token ids of its prompt after the page.
        full_ids: for each example the token ids of its prompt and answer after the page.
        digests: for each example the digests of its images, see `idefics_lit.data.page_keys.page_digest`.
    """

    row_members: list[list[int]]
    images: "BatchFeature"
    page_ids: list[list[int]]
    prompt_ids: list[list[int]]
    full_ids: list[list[int]]
    digests: list[tuple[str, ...]]


class Idefics2Collator:
    """Collate examples into a `idefics_lit.model.batch.Batch`.

    Args:
        processor: Idefics2's processor; image splitting and image size are its own settings.
        train: draw one answer at random each time an example is collated. Otherwise use the first answer, and add the
            prompts that evaluation needs.
        prompt_style: "recipe" is "Answer briefly.", image, question; "idefics" is image, question, "Give a very brief
            answer.", the prompt that the model's authors evaluate with.
        train_on_prompt: supervise the prompt's text too, with one question a row. Padding and image tokens are never
            supervised.
        max_length: the maximum number of tokens of a question with its page and answer.
        seed: the drawn answer depends on it, on the epoch and on the question's id.
        pixel_dtype: dtype of the pixels; the model's own dtype halves the copy to the GPU.
    """

    def __init__(
        self,
        processor: "ProcessorMixin",
        *,
        train: bool,
        prompt_style: PromptStyle = "recipe",
        train_on_prompt: bool = False,
        max_length: int = 2048,
        seed: int = 0,
        pixel_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.processor = processor
        self.train = train
        self.prompt_style = prompt_style
        self.train_on_prompt = train_on_prompt
        self.max_length = max_length
        self.seed = seed
        self.pixel_dtype = pixel_dtype
        tokenizer = processor.tokenizer
        self.special_tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.frames: dict[tuple[int, bool], str] = {}  # rendered templates, by number of images and lack of an answer
        self.image_options = processor.image_processor.to_json_string().encode()
        self.image_token_ids: list[int] = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>"])

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Collate examples.

        Args:
            examples: the questions; those with the same ``page_id`` and the same images share a row.

        Raises:
            InputError: as `tokenize` does.
        """
        tokens = self.tokenize(examples)
        rows = [
            PackedRow(
                Segment(page, self._labels(examples[members[0]], page, len(page))),
                # The prompt's ids are an exact prefix of the full text's ids, so its length says where the answer is.
                [
                    Segment(ids, self._labels(examples[i], ids, len(tokens.prompt_ids[i])))
                    for i, ids in ((i, tokens.full_ids[i]) for i in members)
                ],
            )
            for page, members in zip(tokens.page_ids, tokens.row_members, strict=True)
        ]
        mask = tokens.images["pixel_attention_mask"].bool()
        sizes = [[(int(image[:, 0].sum()), int(image[0].sum())) for image in row if image[0, 0]] for row in mask]
        page_keys = [self._page_key(tokens.digests[members[0]]) for members in tokens.row_members]
        row_of = {i: row for row, members in enumerate(tokens.row_members) for i in members}
        return Batch(
            **vars(pack(rows, self.processor.tokenizer.pad_token_id)),
            question_ids=[example.question_id for example in examples],
            question_rows=[row_of[i] for i in range(len(examples))],
            pixel_values=tokens.images["pixel_values"].to(self.pixel_dtype),
            pixel_attention_mask=mask,
            image_sizes=sizes,
            image_keys=[[f"{key} {i}" for i in range(len(row))] for row, key in zip(sizes, page_keys, strict=True)],
            page_counts=[len(examples[members[0]].images) for members in tokens.row_members],
            prompts=None if self.train else self._prompts(examples, tokens),
        )

    def prompt(self, example: Example) -> str:
        """Return the prompt, with one ``<image>`` for each page.

        Raises:
            InputError: the question holds one of the model's special tokens.
        """
        return self._text(example, None)

    def tokenize(self, examples: Sequence[Example]) -> TokenizedExamples:
        """Tokenize questions and answers, and process the images of each page once.

        Raises:
            InputError: an example has no answer to train on, holds a special token of the model, has an image that
                can't be processed or a value of a wrong type, or is longer than ``max_length``; the message names it.
        """
        for example in examples:
            example.check()
        answers = [self._answer(example) for example in examples]
        prompts = [self._text(example, None) for example in examples]
        texts = [self._text(example, answer) for example, answer in zip(examples, answers, strict=True)]
        digests = _digests(examples)
        row_members = self._group(examples, digests)
        first = [members[0] for members in row_members]
        images = self._process([examples[i] for i in first], [prompts[i] for i in first])
        page_ids = [self._split(ids)[0] for ids in images["input_ids"].tolist()]
        # The tokenizer starts anew after a special token: the ids after a page don't depend on its number of tokens.
        prompt_ids, full_ids = self._ids_after_page(prompts), self._ids_after_page(texts)
        row_of = {i: row for row, members in enumerate(row_members) for i in members}
        for i, example in enumerate(examples):
            if (length := len(page_ids[row_of[i]]) + len(full_ids[i])) > self.max_length:
                raise InputError(
                    f"{_name(example)}: {length} tokens are more than {self.max_length}: shorten the question, or "
                    f"raise data.max_length"
                )
        return TokenizedExamples(row_members, images, page_ids, prompt_ids, full_ids, digests)

    def _prompts(self, examples: Sequence[Example], tokens: TokenizedExamples) -> Prompts:
        ids: dict[int, list[int]] = {}
        columns: dict[int, torch.Tensor] = {}
        for page, members in zip(tokens.page_ids, tokens.row_members, strict=True):
            start = len(page)
            for i in members:
                ids[i] = page + tokens.prompt_ids[i]
                columns[i] = torch.tensor([*range(len(page)), *range(start, start + len(tokens.prompt_ids[i]))])
                start += len(tokens.full_ids[i])
        order = range(len(examples))
        padded = self.processor.tokenizer.pad(
            {"input_ids": [ids[i] for i in order]}, padding_side="left", return_tensors="pt"
        )
        return Prompts(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            gather_index=pad_sequence([columns[i] for i in order], batch_first=True, padding_side="left"),
            questions=[example.question for example in examples],
            references=[example.answers for example in examples],
            question_types=[example.question_types for example in examples],
            reference_pages=[_reference_page(example) for example in examples],
            indices=[example.index for example in examples],
        )

    def _group(self, examples: Sequence[Example], digests: Sequence[tuple[str, ...]]) -> list[list[int]]:
        """Return the indices of the examples of each row.

        Page ids are not enough: crops or augmented copies of a page may have the same id.
        """
        rows: dict[Hashable, list[int]] = {}
        for i, example in enumerate(examples):
            # With train_on_prompt the page's tokens are supervised too, and each question has another next token.
            alone = example.page_id is None or self.train_on_prompt
            rows.setdefault((alone, i if alone else (example.page_id, digests[i])), []).append(i)
        return list(rows.values())

    def _page_key(self, digests: Sequence[str]) -> str:
        """Return a key of the processed pixels: it depends on the images and the image processor's options."""
        return hashlib.sha256(self.image_options + " ".join(digests).encode()).hexdigest()

    def _split(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Split token ids after the last image token."""
        end = max((i for i, token in enumerate(ids, start=1) if token in self.image_token_ids), default=0)
        return ids[:end], ids[end:]

    def _ids_after_page(self, texts: Sequence[str]) -> list[list[int]]:
        if type(self.processor).__name__ == "Idefics2Processor":  # it puts a space between a page and a word
            texts = [re.sub(r"<image>(?=[^\s<])", "<image> ", text) for text in texts]
        return [self._split(ids)[1] for ids in self.processor.tokenizer(texts).input_ids]

    def _labels(self, example: Example, ids: list[int], prompt_length: int) -> list[int]:
        """Return the ids as labels, masked where they are an image's or, without ``train_on_prompt``, the prompt's."""
        masked = len(ids) if example.is_padding else 0 if self.train_on_prompt else prompt_length
        return [IGNORED_LABEL if i < masked or token in self.image_token_ids else token for i, token in enumerate(ids)]

    def _answer(self, example: Example) -> str | None:
        if not self.train:
            return example.answers[0] if example.answers else None
        if not example.answers:
            raise InputError(f"{_name(example)}: no answer to train on: add one or drop the row")
        if example.epoch is None:  # torch seeds its generator in each worker and epoch
            return example.answers[int(torch.randint(len(example.answers), ()))]
        return random.Random(f"{self.seed} {example.epoch} {example.question_id}").choice(example.answers)

    def _text(self, example: Example, answer: str | None) -> str:
        """Apply the chat template: the complete assistant's turn with an answer, its opening without."""
        images = [{"type": "image"} for _ in example.images]
        question = example.question.strip()
        for text in (question, answer or ""):
            if any(token in text for token in self.special_tokens):
                raise InputError(f"{_name(example)}: {text!r} holds one of the model's special tokens: reword it")
        answer = answer if answer is None else answer.strip()
        key = len(images), answer is None
        if key not in self.frames:
            self.frames[key] = self._render(images, *PLACEHOLDERS[: 1 if answer is None else 2])
            probe = None if answer is None else PROBE
            if self._fill(self.frames[key], PROBE, probe) != self._render(images, PROBE, probe):
                self.frames[key] = ""
        return self._fill(self.frames[key], question, answer) or self._render(images, question, answer)

    def _fill(self, frame: str, question: str, answer: str | None) -> str:
        """Put texts in the place of `PLACEHOLDERS`: rendering the template for each text is a hundred times slower."""
        before, _, rest = frame.partition(PLACEHOLDERS[0])
        between, _, after = rest.partition(PLACEHOLDERS[1])
        return f"{before}{question}{between}{answer or ''}{after}" if frame else ""

    def _render(self, images: list[dict[str, str]], question: str, answer: str | None = None) -> str:
        if self.prompt_style == "recipe":
            content = [_text_part("Answer briefly."), *images, _text_part(question)]
        else:
            content = [*images, _text_part(f"{question}\nGive a very brief answer.")]
        messages: list[Any] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [_text_part(answer)]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=answer is None)
        return str(text).strip()

    def _process(self, examples: Sequence[Example], texts: list[str]) -> "BatchFeature":
        try:
            return self.processor(
                text=texts,
                images=[example.images for example in examples],
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
        except Exception as error:
            names = ", ".join(_name(example) for example in examples)
            raise InputError(f"{names}: the processor can't process this batch: {error}") from error


def _digests(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """Digest each image object once; the questions on a page mostly share theirs."""
    images = {id(image): image for example in examples for image in example.images}
    digests = {key: page_digest(image) for key, image in images.items()}
    return [tuple(digests[id(image)] for image in example.images) for example in examples]


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _reference_page(example: Example) -> int | None:
    """Return the page that the answer is on, or None where it isn't among the example's pages."""
    page = example.answer_page
    if page is not None and page >= len(example.images):
        rank_zero_warn(
            f"{_name(example)}: its answer is on page {page}, counted from 0, but it has {len(example.images)}: it is "
            f"left out of answer_page_accuracy"
        )
        return None
    return page


def _name(example: Example) -> str:
    return example.source or f"question {example.question_id}"
