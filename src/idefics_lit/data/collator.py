"""From examples to a batch of Idefics2: chat template, processor, labels.

What is special here: only the answer and its closing ``<end_of_utterance>`` are trained on, the prompt's length is
taken from the tokeniser and not guessed, padding is masked by the attention mask, nothing is ever truncated, and
questions on one page share a row, see `idefics_lit.model.packing`.

Shapes: B questions, R rows, T tokens, N images a row, C channels, H and W pixels.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin

from idefics_lit.data.example import Example
from idefics_lit.data.images import page_digest
from idefics_lit.errors import InputError
from idefics_lit.model.packing import IGNORED_LABEL, PackedRow, Segment, pack

PromptStyle = Literal["recipe", "idefics"]


class Tokens(NamedTuple):
    """Examples tokenised and their pages processed, not yet in rows.

    Attributes:
        members: the examples' numbers, by row.
        images: the processor's, a row each.
        pages: the ids of each row's page, up to its last image token.
        asked: the ids of each example's question, behind its page.
        whole: the same with the answer.
        digests: of each example's images, see `idefics_lit.data.images.page_digest`.
    """

    members: list[list[int]]
    images: BatchFeature
    pages: list[list[int]]
    asked: list[list[int]]
    whole: list[list[int]]
    digests: list[tuple[str, ...]]


class Idefics2Collator:
    """Make a batch of examples.

    Args:
        processor: Idefics2's. Whether it splits images and to what size it scales them is its own setting.
        train: one answer drawn at random at each visit; otherwise the first answer, and the prompts apart for
            ``generate``.
        prompt_style: ``recipe`` is "Answer briefly.", image, question; ``idefics`` is image, question, "Give a very
            brief answer.", the prompt that the model's authors evaluate with.
        train_on_prompt: keep the prompt's text as labels too, and each question in a row of its own; padding and
            image tokens never are labels.
        max_length: the longest question, with its page and answer, that is accepted, in tokens.
        seed: with the epoch and the question's id it decides which answer is drawn.
        pixels: dtype of the pixels; the model's own makes the way to the GPU half as long.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        train: bool,
        prompt_style: PromptStyle = "recipe",
        train_on_prompt: bool = False,
        max_length: int = 2048,
        seed: int = 0,
        pixels: torch.dtype = torch.float32,
    ) -> None:
        self.processor = processor
        self.train = train
        self.prompt_style = prompt_style
        self.train_on_prompt = train_on_prompt
        self.max_length = max_length
        self.seed = seed
        self.pixels = pixels
        tokenizer = processor.tokenizer
        self.special_tokens = list(tokenizer.get_added_vocab())
        self.image_options = processor.image_processor.to_json_string().encode()
        self.image_token_ids: list[int] = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>"])

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate.

        Args:
            examples: B of them; those with the same ``page_id`` and the same images share a row.

        Returns:
            What transformers' Idefics2 takes: `pack`'s ``input_ids``, ``labels``, ``attention_mask`` and, where rows
            are shared, ``position_ids``; ``pixel_values`` (R, N, C, H, W); ``pixel_attention_mask`` (R, N, H, W) bool.
            Besides the list ``question_ids``, and of each row's images ``image_sizes``, height and width in pixels,
            and ``image_keys``, other ones for other pixels. Without ``train`` also ``prompt_input_ids`` and
            ``prompt_attention_mask`` (B, T'), left-padded; ``prompt_rows`` (B) and ``prompt_places`` (B, T'), the row
            and the columns that each prompt has in ``input_ids``; and the lists ``page_counts``, of each row,
            ``questions``, ``references``, ``question_types``, ``reference_pages``, of the answers where they are known,
            and ``places``, in the set; an example without answers has no labels there.

        Raises:
            InputError: as `tokens` does.
        """
        members, images, pages, asked, whole, digests = tokens = self.tokens(examples)
        rows = [
            PackedRow(
                Segment(page, self._labels(examples[row[0]], page, len(page))),
                # The template is an exact prefix: the answer is what the whole text has more than its prompt.
                [Segment(whole[i], self._labels(examples[i], whole[i], len(asked[i]))) for i in row],
            )
            for page, row in zip(pages, members, strict=True)
        ]
        mask = images["pixel_attention_mask"].bool()
        sizes = [[(int(image[:, 0].sum()), int(image[0].sum())) for image in row if image[0, 0]] for row in mask]
        collated: dict[str, Any] = {
            "question_ids": [example.question_id for example in examples],
            **pack(rows, self.processor.tokenizer.pad_token_id),
            "pixel_values": images["pixel_values"].to(self.pixels),
            "pixel_attention_mask": mask,
            "image_sizes": sizes,
            "image_keys": [
                [f"{key} {i}" for i in range(len(of_row))]
                for of_row, key in zip(sizes, (self._key(digests[row[0]]) for row in members), strict=True)
            ],
        }
        return collated if self.train else {**collated, **self._evaluation(examples, tokens)}

    def prompt(self, example: Example) -> str:
        """Return the text that the model is to answer, an ``<image>`` for each page.

        Raises:
            InputError: the question holds one of the model's special tokens.
        """
        return self._text(example, None)

    def tokens(self, examples: Sequence[Example]) -> Tokens:
        """Tokenise questions and answers and process each page once.

        Raises:
            InputError: names the example that has no answer to train on, holds one of the model's special tokens,
                has an image that can't be processed, something else in a text's place, or is longer than
                ``max_length``.
        """
        for example in examples:
            example.check()
        answers = [self._answer(example) for example in examples]
        prompts = [self._text(example, None) for example in examples]
        texts = [self._text(example, answer) for example, answer in zip(examples, answers, strict=True)]
        digests = _digests(examples)
        members = self._members(examples, digests)
        images = self._process([examples[row[0]] for row in members], [prompts[row[0]] for row in members])
        pages = [self._split(ids)[0] for ids in images["input_ids"].tolist()]
        # Behind an image the tokeniser starts anew: what follows doesn't depend on how often its token is repeated.
        asked, whole = (
            [self._split(ids)[1] for ids in self.processor.tokenizer(some).input_ids] for some in (prompts, texts)
        )
        row_of = {i: number for number, row in enumerate(members) for i in row}
        for i, example in enumerate(examples):
            length = len(pages[row_of[i]]) + len(whole[i])
            if length > self.max_length:
                raise InputError(
                    f"{_name(example)}: {length} tokens are more than {self.max_length}: shorten the question, or "
                    f"raise data.max_length"
                )
        return Tokens(members, images, pages, asked, whole, digests)

    def _evaluation(self, examples: Sequence[Example], tokens: Tokens) -> dict[str, Any]:
        """Where the prompts are, and what isn't tensors."""
        members, _, pages, asked, whole, _ = tokens
        found = {}
        for number, (page, row) in enumerate(zip(pages, members, strict=True)):
            start = len(page)
            for i in row:
                columns = torch.tensor([*range(len(page)), *range(start, start + len(asked[i]))])
                found[i] = number, page + asked[i], columns
                start += len(whole[i])
        rows, prompts, places = zip(*(found[i] for i in range(len(examples))), strict=True)
        padded = self.processor.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        return {
            "prompt_input_ids": padded["input_ids"],
            "prompt_attention_mask": padded["attention_mask"],
            "prompt_rows": torch.tensor(rows),
            "prompt_places": pad_sequence(list(places), batch_first=True, padding_side="left"),
            "page_counts": [len(examples[row[0]].images) for row in members],
            "questions": [example.question for example in examples],
            "references": [example.answers for example in examples],
            "question_types": [example.question_types for example in examples],
            "reference_pages": [_reference_page(example) for example in examples],
            "places": [example.place for example in examples],
        }

    def _members(self, examples: Sequence[Example], digests: Sequence[tuple[str, ...]]) -> list[list[int]]:
        """Group the examples' numbers by row.

        Ids alone don't do: those of a page's crops or of its augmented copies may agree.
        """
        rows: dict[Any, list[int]] = {}
        for i, example in enumerate(examples):
            # What follows a page is another text for each question: a page can't be trained to foretell them all.
            alone = example.page_id is None or self.train_on_prompt
            rows.setdefault((alone, i if alone else (example.page_id, digests[i])), []).append(i)
        return list(rows.values())

    def _key(self, digests: Sequence[str]) -> str:
        """What the pixels of a row's images depend on."""
        return hashlib.sha256(self.image_options + " ".join(digests).encode()).hexdigest()

    def _split(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Cut behind the last image token."""
        end = max((i for i, token in enumerate(ids, start=1) if token in self.image_token_ids), default=0)
        return ids[:end], ids[end:]

    def _labels(self, example: Example, ids: list[int], prompt: int) -> list[int]:
        """The labels of a piece: none for its ``prompt`` tokens unless they are trained on, none for image tokens."""
        ignored = len(ids) if example.repeated else 0 if self.train_on_prompt else prompt
        return [IGNORED_LABEL if i < ignored or token in self.image_token_ids else token for i, token in enumerate(ids)]

    def _answer(self, example: Example) -> str | None:
        if not self.train:
            return example.answers[0] if example.answers else None
        if not example.answers:
            raise InputError(f"{_name(example)}: no answer to train on: add one or drop the row")
        if example.epoch is None:  # torch seeds its generator in each worker and epoch
            return example.answers[int(torch.randint(len(example.answers), ()))]
        return random.Random(f"{self.seed} {example.epoch} {example.question_id}").choice(example.answers)

    def _text(self, example: Example, answer: str | None) -> str:
        """Fill the chat template; with an answer the assistant's turn is whole, without one it is opened."""
        images = [{"type": "image"} for _ in example.images]
        question = example.question.strip()
        for text in (question, answer or ""):
            if any(token in text for token in self.special_tokens):
                raise InputError(f"{_name(example)}: {text!r} holds one of the model's special tokens: reword it")
        if self.prompt_style == "recipe":
            content = [_text_part("Answer briefly."), *images, _text_part(question)]
        else:
            content = [*images, _text_part(f"{question}\nGive a very brief answer.")]
        messages: list[Any] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [_text_part(answer.strip())]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=answer is None)
        return str(text).strip()

    def _process(self, examples: Sequence[Example], texts: list[str]) -> BatchFeature:
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
            raise InputError(f"the processor refuses the batch of {names}: {error}") from error


def take_rows(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return some rows of a batch for evaluation, with their prompts, as a batch."""
    width = batch["input_ids"].shape[1]
    supervised_positions = batch["supervised_positions"]
    row_of = batch["prompt_rows"]
    asked = ((row_of >= start) & (row_of < stop)).nonzero()[:, 0]
    of_rows = ["input_ids", "labels", "attention_mask", "position_ids", "pixel_values", "pixel_attention_mask"]
    of_rows += ["image_sizes", "image_keys", "page_counts"]
    taken = {name: batch[name][start:stop] for name in of_rows if name in batch}
    taken["supervised_positions"] = (
        supervised_positions[(supervised_positions >= start * width) & (supervised_positions < stop * width)]
        - start * width
    )
    taken["prompt_rows"] = row_of[asked] - start
    for name in ("prompt_input_ids", "prompt_attention_mask", "prompt_places"):
        taken[name] = batch[name][asked]
    for name in ("question_ids", "questions", "references", "question_types", "reference_pages", "places"):
        taken[name] = [batch[name][i] for i in asked.tolist()]
    return taken


def _digests(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """Digest each image once; the questions on a page mostly have the same object."""
    images = {id(image): image for example in examples for image in example.images}
    found = {key: page_digest(image) for key, image in images.items()}
    return [tuple(found[id(image)] for image in example.images) for example in examples]


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _reference_page(example: Example) -> int | None:
    page = example.answer_page
    if page is not None and page >= len(example.images):
        rank_zero_warn(
            f"{_name(example)}: its answer is on page {page}, counted from 0, of {len(example.images)}: it is left out "
            f"of answer_page_accuracy"
        )
        return None
    return page


def _name(example: Example) -> str:
    return example.where or f"question {example.question_id}"
