"""Greedy answers, from what has been read already: a page and its questions are read once, for loss and answers."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ProcessorMixin

from idefics_lit.forward import Idefics2Forward


class Memory:
    """Keys and values of every layer of the text model, which its attention hands over as to transformers' caches.

    First it takes those of R rows, (R, heads, T, size); from `recall` on those of B prompts and their answers, token by
    token, (B, heads, L, size).
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.column: int | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Take a layer's; return all it has to attend to."""
        if self.column is None:
            self.layers.append((keys, values))
        else:
            for kept, new in zip(self.layers[layer], (keys, values), strict=True):
                kept[:, :, self.column, None] = new
        return self.layers[layer]

    def recall(self, rows: Tensor, places: Tensor, room: int) -> None:
        """Go on with B prompts: row ``rows`` (B) and columns ``places`` (B, T') of each; and room for their answers."""
        self.column = places.shape[1] - 1
        for layer, pair in enumerate(self.layers):
            prompts = (kept.transpose(1, 2)[rows[:, None], places].transpose(1, 2) for kept in pair)
            keys, values = (F.pad(kept, (0, 0, 0, room)) for kept in prompts)
            self.layers[layer] = keys, values

    def keep(self, prompts: Tensor) -> None:
        """Forget all prompts but these."""
        for layer, (keys, values) in enumerate(self.layers):
            self.layers[layer] = keys[prompts], values[prompts]


def generate_answers(
    parts: Idefics2Forward,
    processor: ProcessorMixin,
    batch: Mapping[str, Any],
    hidden: Tensor,
    memory: Memory,
    max_new_tokens: int,
) -> list[str]:
    """Generate greedily until ``<end_of_utterance>``; a prompt that is answered leaves the batch.

    Args:
        parts: of a model in eval mode.
        processor: the model's.
        batch: `Idefics2Collator`'s for evaluation.
        hidden: `Idefics2Forward.read`'s last hidden states of the batch (R, T, width).
        memory: what it remembered.
        max_new_tokens: the longest answer.

    Returns:
        B texts, stripped.
    """
    tokenizer = processor.tokenizer
    fake, image, end = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    ends = torch.tensor([tokenizer.eos_token_id, end], device=hidden.device)
    rows, places = batch["prompt_rows"], batch["prompt_places"]
    sees = F.pad(batch["prompt_attention_mask"].bool(), (0, max_new_tokens))
    positions = batch["prompt_attention_mask"].sum(1)
    answers = torch.full((len(rows), max_new_tokens), tokenizer.pad_token_id, device=hidden.device)
    going = torch.arange(len(rows), device=hidden.device)
    last = hidden[rows, places[:, -1]]
    memory.recall(rows, places, max_new_tokens)
    for step in range(max_new_tokens):
        scores = parts.logits(last)
        scores[:, [fake, image]] = -torch.inf
        tokens = scores.argmax(-1)
        answers[going, step] = tokens
        unfinished = (~torch.isin(tokens, ends)).nonzero()[:, 0]
        if not len(unfinished) or step + 1 == max_new_tokens:
            break
        if len(unfinished) < len(going):
            going, tokens, positions, sees = (some[unfinished] for some in (going, tokens, positions, sees))
            memory.keep(unfinished)
        last = parts.read_on(tokens, positions, sees, memory)
        positions = positions + 1
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.strip() for text in texts]
