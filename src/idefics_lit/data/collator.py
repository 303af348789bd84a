"""Collate examples into a batch: chat template, processor, labels.

Only the answer and its closing ``<end_of_utterance>`` are supervised. The prompt's length is computed with the
tokenizer. Nothing is ever truncated. Questions on one page are packed into one row, see `idefics_lit.model.packing`.
"""

import random
import re
from collections.abc import Callable, Collection, Hashable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.utils.rnn import pad_sequence

from idefics_lit.data.example import Example
from idefics_lit.data.image_tokens import image_token_ids, largest_page_tokens, page_spans, tokenize_prompts
from idefics_lit.data.page_keys import page_digest
from idefics_lit.data.pixels import PageProcessor, stack_images
from idefics_lit.data.prompts import PromptStyle, PromptTemplate
from idefics_lit.errors import InputError
from idefics_lit.model.batch import Batch, Prompts
from idefics_lit.model.packing import IGNORED_LABEL, PackedRow, Segment, pack
from idefics_lit.pretrained import has_tiles

if TYPE_CHECKING:
    from transformers import ProcessorMixin

DEFAULT_MAX_LENGTH = 2048  # tokens, unless a page takes more
TEXT_TOKENS = 1024  # beside a page, of its question and answer


class TokenizedExamples(NamedTuple):
    """Examples as token ids, before they are packed into rows.

    Attributes:
        row_members: for each row the indices of its examples.
        page_ids: for each row the token ids up to the end of its last page.
        prompt_ids: for each example the token ids of its prompt after the page.
        full_ids: for each example the token ids of its prompt and answer after the page.
        digests: for each example the digests of its images, see `idefics_lit.data.page_keys.page_digest`.
    """

    row_members: list[list[int]]
    page_ids: list[list[int]]
    prompt_ids: list[list[int]]
    full_ids: list[list[int]]
    digests: list[tuple[str, ...]]


class Idefics2Collator:
    """Collate examples into a `idefics_lit.model.batch.Batch`.

    Args:
        processor: the model's, from `idefics_lit.load_processor`; image splitting and image size are its own settings.
        train: draw one answer at random each time an example is collated. Otherwise use the first answer, and add the
            prompts that evaluation needs.
        prompt_style: "recipe" is "Answer briefly.", image, question; "idefics" is image, question, "Give a very brief
            answer.", the prompt that the model's authors evaluate with.
        train_on_prompt: supervise the prompt's text too, with one question a row. Padding and the tokens of pages are
            never supervised.
        max_length: the maximum number of tokens of a question with its pages and answer; by default 2048, or the tokens
            of the largest page and 1024 more if that is more.
        seed: the drawn answer depends on it, on the epoch and on the question's id.
        pixel_dtype: dtype of the pixels; the model's own dtype halves the copy to the GPU.
        cached_features: returns the cached features of an image by its key, or None; pages whose features are cached
            aren't processed. See `idefics_lit.model.feature_cache`.
    """

    def __init__(
        self,
        processor: "ProcessorMixin",
        *,
        train: bool,
        prompt_style: PromptStyle = "recipe",
        train_on_prompt: bool = False,
        max_length: int | None = None,
        seed: int = 0,
        pixel_dtype: torch.dtype = torch.float32,
        cached_features: Callable[[str], torch.Tensor | None] | None = None,
    ) -> None:
        self.processor = processor
        self.train = train
        self.prompt_style = prompt_style
        self.train_on_prompt = train_on_prompt
        self.max_length = max_length or max(DEFAULT_MAX_LENGTH, largest_page_tokens(processor) + TEXT_TOKENS)
        self.seed = seed
        self.pixel_dtype = pixel_dtype
        self.pages = PageProcessor(processor.image_processor, cached_features)
        tokenizer = processor.tokenizer
        self.special_tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.template = PromptTemplate(processor, prompt_style)
        self.image_token_ids = image_token_ids(processor)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Collate examples.

        Args:
            examples: the questions; those with the same ``page_id`` and the same images share a row.

        Raises:
            InputError: as `tokenize` does.
        """
        tokens = self.tokenize(examples)
        firsts = [members[0] for members in tokens.row_members]
        keys = [list(map(self.pages.image_keys, examples[i].images, tokens.digests[i])) for i in firsts]
        features = self.pages.load_features([page for row in keys for page in row])
        images = self.process_pages([examples[i] for i in firsts], keys, features)
        page_images = [[len(page) for page in row] for row in images]
        spans = [page_spans(self.processor, *row) for row in zip(tokens.page_ids, page_images, strict=True)]
        rows = [
            PackedRow(
                Segment(page, self._labels(examples[members[0]], page, len(page), of_pages)),
                # The prompt's ids are an exact prefix of the full text's ids, so its length says where the answer is.
                [
                    Segment(ids, self._labels(examples[i], ids, len(tokens.prompt_ids[i])))
                    for i, ids in ((i, tokens.full_ids[i]) for i in members)
                ],
            )
            for page, members, of_pages in zip(tokens.page_ids, tokens.row_members, spans, strict=True)
        ]
        pixel_values, pixel_attention_mask, sizes = stack_images(images, self.pixel_dtype)
        row_of = {i: row for row, members in enumerate(tokens.row_members) for i in members}
        return Batch(
            **vars(pack(rows, self.processor.tokenizer.pad_token_id)),
            question_ids=[example.question_id for example in examples],
            question_rows=[row_of[i] for i in range(len(examples))],
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            image_sizes=sizes,
            image_keys=[[key for page in row for key in page] for row in keys],
            page_images=page_images,
            page_spans=spans,
            loaded_features=features,
            prompts=None if self.train else self._prompts(examples, tokens),
        )

    def prompt(self, example: Example) -> str:
        """Return the prompt, with one ``<image>`` for each page.

        Raises:
            InputError: the question holds one of the model's special tokens.
        """
        return self._text(example, None)

    def tokenize(self, examples: Sequence[Example]) -> TokenizedExamples:
        """Tokenize questions and answers.

        Raises:
            InputError: an example has no page or no answer to train on, holds a special token of the model or a value
                of a wrong type, or is longer than ``max_length``; the message names it.
        """
        for example in examples:
            example.check()
            if not example.images:
                raise InputError(f"{_name(example)}: it has no page: give at least one image")
        answers = [self._answer(example) for example in examples]
        prompts = [self._text(example, None) for example in examples]
        texts = [self._text(example, answer) for example, answer in zip(examples, answers, strict=True)]
        digests = _digests(examples)
        row_members = self._group(examples, digests)
        first = [members[0] for members in row_members]
        # The chat template of Idefics3-8B begins with the token that its tokenizer adds too.
        bos = self.processor.tokenizer.bos_token
        options = {"add_special_tokens": not (bos and prompts[0].startswith(bos))}
        sizes = [[image.size for image in examples[i].images] for i in first]
        rows = tokenize_prompts(self.processor, [prompts[i] for i in first], sizes, **options)
        page_ids = [self._split(ids)[0] for ids in rows]
        # The tokenizer starts anew after a special token: the ids after a page don't depend on its number of tokens.
        prompt_ids, full_ids = self._ids_after_page(prompts, **options), self._ids_after_page(texts, **options)
        row_of = {i: row for row, members in enumerate(row_members) for i in members}
        for i, example in enumerate(examples):
            if (length := len(page_ids[row_of[i]]) + len(full_ids[i])) > self.max_length:
                raise InputError(
                    f"{_name(example)}: {length} tokens are more than {self.max_length}: shorten the question, or "
                    f"raise data.max_length"
                )
        return TokenizedExamples(row_members, page_ids, prompt_ids, full_ids, digests)

    def process_pages(
        self, examples: Sequence[Example], keys: Sequence[list[list[str]]] = (), cached: Collection[str] = ()
    ) -> list[list[list[torch.Tensor]]]:
        """Return for each example, and each of its pages, the images (3, H, W) that the vision tower sees.

        Args:
            examples: the examples.
            keys: for each example, and each of its pages, the keys of the images.
            cached: keys of images whose features are cached; those of their pages are (3, 0, 0).

        Raises:
            InputError: a page can't be processed; the message names the example.
        """
        rows = []
        for example, page_keys in zip_longest(examples, keys):
            try:
                rows.append(
                    [
                        self.pages.left_out(images) if images[0] in cached else self.pages.process(page)
                        for page, images in zip(example.images, page_keys or [[""]] * len(example.images), strict=True)
                    ]
                )
            except Exception as error:
                raise InputError(f"{_name(example)}: the processor can't process a page: {error}") from error
        return rows

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

    def _split(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Split token ids after the last page."""
        end = max((i for i, token in enumerate(ids, start=1) if token in self.image_token_ids), default=0)
        return ids[:end], ids[end:]

    def _ids_after_page(self, texts: Sequence[str], **options: bool) -> list[list[int]]:
        if not has_tiles(self.processor.image_processor):  # its processor puts a space between a page and a word
            texts = [re.sub(r"<image>(?=[^\s<])", "<image> ", text) for text in texts]
        return [self._split(ids)[1] for ids in self.processor.tokenizer(list(texts), **options).input_ids]

    def _labels(
        self, example: Example, ids: list[int], prompt_length: int, spans: Sequence[tuple[int, int]] = ()
    ) -> list[int]:
        """Return the ids as labels, masked where they are a page's or, without ``train_on_prompt``, the prompt's."""
        masked = len(ids) if example.is_padding else 0 if self.train_on_prompt else prompt_length
        labels = [IGNORED_LABEL] * masked + ids[masked:]
        for start, stop in spans:
            labels[start:stop] = [IGNORED_LABEL] * (stop - start)
        return labels

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
        question = example.question.strip()
        for text in (question, answer or ""):
            if any(token in text for token in self.special_tokens):
                raise InputError(f"{_name(example)}: {text!r} holds one of the model's special tokens: reword it")
        return self.template.text(len(example.images), question, answer if answer is None else answer.strip())


def _digests(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """Digest each image object once; the questions on a page mostly share theirs."""
    images = {id(image): image for example in examples for image in example.images}
    digests = {key: page_digest(image) for key, image in images.items()}
    return [tuple(digests[id(image)] for image in example.images) for example in examples]


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
