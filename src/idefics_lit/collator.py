"""From examples to a batch of Idefics2: chat template, processor, labels.

What is special here: only the answer and its closing ``<end_of_utterance>`` are trained on, the prompt's length is
taken from the tokeniser and not guessed, padding is masked by the attention mask, and nothing is ever truncated.

Shapes: B batch, T tokens, N images an example, C channels, H and W pixels.
"""

import random
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import ProcessorMixin

from idefics_lit.data.example import Example
from idefics_lit.errors import InputError

IGNORED_LABEL = -100
PromptStyle = Literal["recipe", "idefics"]


class Idefics2Collator:
    """Make a batch of examples.

    Args:
        processor: Idefics2's. Whether it splits images and to what size it scales them is its own setting.
        train: right padding and one answer drawn at random at each visit; otherwise left padding, the first answer,
            and the prompts apart for ``generate``.
        prompt_style: ``recipe`` is "Answer briefly.", image, question; ``idefics`` is image, question, "Give a very
            brief answer.", the prompt that the model's authors evaluate with.
        train_on_prompt: keep the prompt's text as labels too; padding and image tokens never are.
        max_length: the longest sequence, in tokens, that is accepted.
        seed: with the epoch and the question's id it decides which answer is drawn.
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
    ) -> None:
        self.processor = processor
        self.train = train
        self.prompt_style = prompt_style
        self.train_on_prompt = train_on_prompt
        self.max_length = max_length
        self.seed = seed
        tokenizer = processor.tokenizer
        self.special_tokens = list(tokenizer.get_added_vocab())
        self.image_token_ids = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>"])

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate.

        Args:
            examples: B of them.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` (B, T) of prompt and answer; ``pixel_values`` (B, N, C, H, W)
            float32; ``pixel_attention_mask`` (B, N, H, W) bool. Without ``train`` also ``prompt_input_ids`` and
            ``prompt_attention_mask`` (B, T'), and the lists ``question_ids``, ``questions``, ``references`` and
            ``question_types``; an example without answers has no labels there.

        Raises:
            InputError: names the example that has no answer to train on, holds one of the model's special tokens,
                has an image that can't be processed, or is longer than ``max_length``.
        """
        answers = [self._answer(example) for example in examples]
        prompts = [self._text(example, None) for example in examples]
        texts = [self._text(example, answer) for example, answer in zip(examples, answers, strict=True)]
        tokenize = self.processor.tokenizer
        # The template is an exact prefix: the answer is what the whole text has more than its prompt.
        answer_lengths = [
            len(whole) - len(prompt)
            for whole, prompt in zip(tokenize(texts).input_ids, tokenize(prompts).input_ids, strict=True)
        ]
        batch = self._process(examples, texts)
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        for example, length in zip(examples, attention_mask.sum(dim=1).tolist(), strict=True):
            if length > self.max_length:
                raise InputError(
                    f"{_name(example)}: {length} tokens are more than {self.max_length}: shorten the question, or "
                    f"raise data.max_length"
                )
        labels = self._labels(input_ids, attention_mask, answer_lengths)
        collated: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "pixel_values": batch["pixel_values"],
            "pixel_attention_mask": batch["pixel_attention_mask"].bool(),
        }
        if not self.train:
            collated["prompt_input_ids"], collated["prompt_attention_mask"] = self._prompts(
                input_ids, attention_mask, answer_lengths
            )
            collated["question_ids"] = [example.question_id for example in examples]
            collated["questions"] = [example.question for example in examples]
            collated["references"] = [example.answers for example in examples]
            collated["question_types"] = [example.question_types for example in examples]
        return collated

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

    def _process(self, examples: Sequence[Example], texts: list[str]) -> dict[str, Tensor]:
        try:
            return self.processor(
                text=texts,
                images=[example.images for example in examples],
                padding=True,
                padding_side="right" if self.train else "left",
                return_tensors="pt",
            )
        except Exception as error:
            names = ", ".join(_name(example) for example in examples)
            raise InputError(f"the processor refuses the batch of {names}: {error}") from error

    def _labels(self, input_ids: Tensor, attention_mask: Tensor, answer_lengths: list[int]) -> Tensor:
        labels = input_ids.masked_fill(attention_mask == 0, IGNORED_LABEL)
        labels[torch.isin(input_ids, torch.tensor(self.image_token_ids))] = IGNORED_LABEL
        if not self.train_on_prompt:
            # The answer stands last among the tokens that count.
            position = attention_mask.cumsum(dim=1)
            prompt_length = position[:, -1:] - torch.tensor(answer_lengths)[:, None]
            labels[position <= prompt_length] = IGNORED_LABEL
        return labels

    def _prompts(self, input_ids: Tensor, attention_mask: Tensor, answer_lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Cut the answers off left-padded sequences and pad what is left of them again."""
        prompts = [
            ids[mask.bool()][: int(mask.sum()) - length]
            for ids, mask, length in zip(input_ids, attention_mask, answer_lengths, strict=True)
        ]
        padded = self.processor.tokenizer.pad(
            {"input_ids": [prompt.tolist() for prompt in prompts]}, padding_side="left", return_tensors="pt"
        )
        return padded["input_ids"], padded["attention_mask"]


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _name(example: Example) -> str:
    return example.where or f"question {example.question_id}"
