"""The batch: what the collator returns and what the model and the evaluator read.

Shapes are given here and nowhere else: B questions, R rows, T tokens in a row, T' tokens in a prompt, N images in a
row, C channels, H and W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

BatchT = TypeVar("BatchT", bound="TokenRows")


@dataclass(kw_only=True)
class TokenRows:
    """R right-padded rows of T tokens; a row holds one page (or several pages read together) and its questions.

    Attributes:
        input_ids: (R, T).
        labels: (R, T), `idefics_lit.model.packing.IGNORED_LABEL` where a token is not supervised.
        attention_mask: (R, T), 1 for tokens and 0 for padding.
        supervised_positions: (L), indices into the R * T tokens of those whose next token is supervised.
        position_ids: (R, T) if a row packs several questions, otherwise None. A question's positions continue its
            page's, as in a row of its own.
        packed_attention_mask: (R, 1, T, T) bool if a row packs several questions, otherwise None. True where a query
            token may attend to a key token.
        page_tokens: the first tokens of which each row has nothing but its page: there the mask is causal.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    supervised_positions: Tensor
    position_ids: Tensor | None = None
    packed_attention_mask: Tensor | None = None
    page_tokens: int = 0

    def to(self: BatchT, device: torch.device | str, non_blocking: bool | None = None) -> BatchT:
        """Return a copy with all tensors on a device.

        Args:
            device: the target device.
            non_blocking: whether the CPU continues before the copy is done; by default only for copies to a GPU, as
                in Lightning.
        """
        if non_blocking is None:
            non_blocking = torch.device(device).type != "cpu"
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: BatchT) -> BatchT:
        """Return a copy with all tensors in pinned memory; the DataLoader calls it."""
        return _map_tensors(self, Tensor.pin_memory)


@dataclass(kw_only=True)
class Prompts:
    """The part of a batch that only evaluation needs: the B prompts and what their answers are compared with.

    Attributes:
        input_ids: (B, T'), left-padded.
        attention_mask: (B, T'), 1 for tokens and 0 for padding.
        gather_index: (B, T'), the column of each prompt token in its row of `Batch.input_ids`.
        questions: B texts.
        references: B lists of accepted answers; empty lists where the data has no answers.
        question_types: B lists.
        reference_pages: B indices of the page that the answer is on, None where the data does not say.
        indices: B indices into the split, None for examples without one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    gather_index: Tensor
    questions: list[str]
    references: list[list[str]]
    question_types: list[list[str]]
    reference_pages: list[int | None]
    indices: list[int | None]

    def select(self, questions: Sequence[int]) -> "Prompts":
        """Return the prompts of the given questions."""

        def pick(value: Any) -> Any:  # noqa: ANN401
            return value[list(questions)] if isinstance(value, Tensor) else [value[i] for i in questions]

        return Prompts(**{item.name: pick(getattr(self, item.name)) for item in fields(self)})


@dataclass(kw_only=True)
class Batch(TokenRows):
    """B questions in R rows, with the images of each row.

    Attributes:
        question_ids: B ids.
        question_rows: B indices of the row that holds each question.
        pixel_values: (R, N, C, H, W), zero-padded to the largest image and the largest number of images.
        pixel_attention_mask: (R, N, H, W) bool, True for pixels and False for padding.
        image_sizes: for each row the (height, width) in pixels of each image; (0, 0) for the images of a page that the
            loader left out, since its features are cached.
        image_keys: for each row a key of each image; images with different pixels have different keys.
        page_images: for each row the number of images of each page, in the order of the images. Image splitting makes
            several images of a page.
        page_spans: for each row the columns (start, stop) of each page's tokens in `input_ids`, from the special token
            that opens the page to the one that closes it. In Idefics2's prompt one token closes a page and opens the
            next one, so that their spans share it.
        loaded_features: by image key the cached features of pages that the loader left out; an empty tensor stands for
            features in the memory of the model's process.
        prompts: the part for evaluation; None in training.
        skipped: one line for each example that `SkippingCollator` left out.
    """

    question_ids: list[int | str]
    question_rows: list[int]
    pixel_values: Tensor
    pixel_attention_mask: Tensor
    image_sizes: list[list[tuple[int, int]]]
    image_keys: list[list[str]]
    page_images: list[list[int]]
    page_spans: list[list[tuple[int, int]]]
    loaded_features: dict[str, Tensor] = field(default_factory=dict)
    prompts: Prompts | None = None
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, skipped: Sequence[str]) -> "Batch":
        """Return a batch without questions, for when all examples were skipped."""
        tokens = torch.zeros(0, 0, dtype=torch.long)
        return cls(
            input_ids=tokens,
            labels=tokens,
            attention_mask=tokens,
            supervised_positions=tokens.flatten(),
            question_ids=[],
            question_rows=[],
            pixel_values=torch.zeros(0, 0, 3, 0, 0),
            pixel_attention_mask=torch.zeros(0, 0, 0, 0, dtype=torch.bool),
            image_sizes=[],
            image_keys=[],
            page_images=[],
            page_spans=[],
            skipped=list(skipped),
        )

    @property
    def is_empty(self) -> bool:
        """Whether the batch has no questions because all its examples were skipped."""
        return not self.question_ids

    def model_inputs(self) -> dict[str, Tensor]:
        """Return the arguments of the ``forward`` of transformers' model."""
        mask = self.attention_mask if self.packed_attention_mask is None else self.packed_attention_mask
        positions = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {
            "input_ids": self.input_ids,
            "attention_mask": mask,
            "labels": self.labels,
            "pixel_values": self.pixel_values,
            "pixel_attention_mask": self.pixel_attention_mask,
            **positions,
        }

    def rows(self, start: int, stop: int) -> "Batch":
        """Return rows ``start`` to ``stop`` with their questions as a batch."""
        width, positions = self.input_ids.shape[1], self.supervised_positions
        first, last = start * width, stop * width
        questions = [i for i, row in enumerate(self.question_rows) if start <= row < stop]

        def cut(value: Any) -> Any:  # noqa: ANN401
            return None if value is None else value[start:stop]

        return Batch(
            input_ids=cut(self.input_ids),
            labels=cut(self.labels),
            attention_mask=cut(self.attention_mask),
            supervised_positions=positions[(positions >= first) & (positions < last)] - first,
            position_ids=cut(self.position_ids),
            packed_attention_mask=cut(self.packed_attention_mask),
            page_tokens=self.page_tokens,
            question_ids=[self.question_ids[i] for i in questions],
            question_rows=[self.question_rows[i] - start for i in questions],
            pixel_values=cut(self.pixel_values),
            pixel_attention_mask=cut(self.pixel_attention_mask),
            image_sizes=cut(self.image_sizes),
            image_keys=cut(self.image_keys),
            page_images=cut(self.page_images),
            page_spans=cut(self.page_spans),
            loaded_features=self.loaded_features,
            prompts=self.prompts and self.prompts.select(questions),
        )


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return value
