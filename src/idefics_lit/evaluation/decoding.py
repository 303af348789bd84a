"""Greedy answers, from what has been read already: a page and its questions are read once, for loss and answers.

What is special here: prompts that are answered leave the batch; and with CUDA graphs keys and values lie in tensors
that stay where they are, so that all that a token takes, thousands of kernels, is launched at once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ProcessorMixin

from idefics_lit.model.batch import Batch
from idefics_lit.model.cuda_graphs import CudaGraphRunner
from idefics_lit.model.forward import Idefics2Backbone

# With graphs, rows and columns are filled up to multiples, and rows leave when a quarter is still going: few shapes.
ROWS, COLUMNS, SHARE = 16, 64, 4

Layers = Sequence[tuple[Tensor, ...]]


class PrefillCache:
    """Keys and values of R rows, (R, heads, T, size), which it is handed layer by layer as transformers' caches are."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, ...]] = []

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Take a layer's."""
        self.layers.append((keys, values))
        return keys, values


class DecodeState:
    """B prompts and their answers in L columns; all answers begin in the same one.

    Args:
        like: keys and values of every layer, of other rows.
        rows: B.
        columns: L.

    Attributes:
        ids: (B, L), of the answers.
        sees: (B, L), which columns hold a token that has been read.
        positions: (B), where the next token to be read stands in a row of its own.
        going: (B), which answers have no end yet.
        column: (1), of the next token to be read.
        layers: keys and values of each, (B, heads, L, size).
    """

    def __init__(self, like: Layers, rows: int, columns: int) -> None:
        device = like[0][0].device
        self.ids = torch.zeros(rows, columns, dtype=torch.long, device=device)
        self.attention_mask = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self.unfinished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.cache_position = torch.zeros(1, dtype=torch.long, device=device)
        # Zeros: what isn't seen has no weight, but no weight times NaN is NaN.
        self.layers = [
            tuple(some.new_zeros(rows, some.shape[1], columns, some.shape[3]) for some in pair) for pair in like
        ]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> Any:  # noqa: ANN401
        """Take a layer's keys and values of the column; return all there are to attend to."""
        for kept, new in zip(self.layers[layer], (keys, values), strict=True):
            kept.index_copy_(2, self.cache_position, new)
        return self.layers[layer]

    def load_prompts(self, read: Layers, rows: Tensor, places: Tensor, sees: Tensor, padding: int) -> None:
        """Take n prompts: the row (n) and the columns (n, T) of each in what was read, which of them it has (n, T)."""
        count, length = places.shape
        for own, given in zip(self.layers, read, strict=True):
            for kept, of_rows in zip(own, given, strict=True):
                kept[:count, :, :length] = of_rows.transpose(1, 2)[rows[:, None], places].transpose(1, 2)
                # Another batch's answers were there: its NaN would be this one's, unseen as they are.
                kept[:count, :, length:] = 0
        for of_prompts in (self.attention_mask, self.positions, self.unfinished):
            of_prompts.zero_()
        self.ids.fill_(padding)
        self.attention_mask[:count, :length] = sees
        self.positions[:count] = sees.sum(1)
        self.unfinished[:count] = True
        self.cache_position.fill_(length)

    def keep_rows(self, other: "DecodeState", rows: Tensor) -> None:
        """Take n rows (n) of another one's as they are."""
        for own, given in (
            (getattr(self, name), getattr(other, name)) for name in ("ids", "attention_mask", "positions")
        ):
            own.zero_()[: len(rows)] = given[rows]
        for pair, others in zip(self.layers, other.layers, strict=True):
            for kept, given in zip(pair, others, strict=True):
                kept[: len(rows)] = given[rows]
        self.unfinished.zero_()[: len(rows)] = True
        self.cache_position.copy_(other.cache_position)


class GreedyDecoder:
    """Answer prompts greedily, until ``<end_of_utterance>``.

    Args:
        backbone: of a model in eval mode.
        processor: the model's.
        max_new_tokens: the longest answer.
        graphs: read the answers with CUDA graphs.
    """

    def __init__(
        self, backbone: Idefics2Backbone, processor: ProcessorMixin, max_new_tokens: int, *, graphs: bool
    ) -> None:
        self.backbone, self.tokenizer = backbone, processor.tokenizer
        self.max_new_tokens, self.graphs = max_new_tokens, graphs
        names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
        fake, image, end = self.tokenizer.convert_tokens_to_ids(names)
        device = backbone.head.weight.device
        self.suppressed_token_ids = torch.tensor([fake, image], device=device)
        self.eos_token_ids = torch.tensor([self.tokenizer.eos_token_id, end], device=device)
        self._kept: dict[
            int, tuple[DecodeState, CudaGraphRunner]
        ] = {}  # by rows, with the graph that goes on with them
        self._columns = 0

    def answer(self, batch: Batch, hidden: Tensor, memory: PrefillCache) -> list[list[int]]:
        """Answer a batch's prompts.

        Args:
            batch: `Idefics2Collator`'s for evaluation.
            hidden: `Idefics2Backbone.prefill`'s last hidden states of the batch (R, T, width).
            memory: what it remembered.

        Returns:
            B answers' token ids, with the one that ends it.

        Raises:
            InputError: when a prompt and its answer are longer than the text model takes.
        """
        assert batch.prompts is not None
        rows, places = torch.tensor(batch.question_rows, device=hidden.device), batch.prompts.gather_index
        count, first = places.shape
        self.backbone.check_length(first + self.max_new_tokens)
        padding = self.tokenizer.pad_token_id
        found = hidden.new_full((count, self.max_new_tokens), padding, dtype=torch.long)
        answers, step = self._state_for(memory.layers, self._rows(count), first + self.max_new_tokens)
        answers.load_prompts(memory.layers, rows, places, batch.prompts.attention_mask.bool(), padding)
        self._select_next_tokens(answers, F.pad(hidden[rows, places[:, -1]], (0, 0, 0, len(answers.ids) - count)))
        questions = torch.arange(count, device=hidden.device)  # what each row answers
        for _ in range(self.max_new_tokens - 1):
            going = answers.unfinished.nonzero()[:, 0]
            if not len(going):
                break
            if (fewer := self._rows(len(going))) < len(answers.ids):
                found[questions] = answers.ids[: len(questions), first : first + self.max_new_tokens]
                whole, questions = answers, questions[going]
                answers, step = self._state_for(whole.layers, fewer, whole.ids.shape[1])
                answers.keep_rows(whole, going)
            step(partial(self._decode_step, answers))
        found[questions] = answers.ids[: len(questions), first : first + self.max_new_tokens]
        ends = (found[..., None] == self.eos_token_ids).any(-1).tolist()
        return [
            ids[: end.index(True) + 1 if True in end else None] for ids, end in zip(found.tolist(), ends, strict=True)
        ]

    def _rows(self, going: int) -> int:
        """How many rows to go on with."""
        if not self.graphs:
            return going
        rows = max(self._kept, default=0)
        if going > rows:
            return going + -going % ROWS
        while rows // SHARE >= max(going, ROWS):
            rows //= SHARE
        return rows

    def _state_for(self, like: Layers, rows: int, columns: int) -> tuple[DecodeState, CudaGraphRunner]:
        if not self.graphs:
            return DecodeState(like, rows, columns), CudaGraphRunner(graph=False)
        if columns > self._columns:
            self._columns = columns + -columns % COLUMNS
            self._kept.clear()
        if rows not in self._kept:
            graph = like[0][0].is_cuda
            self._kept[rows] = DecodeState(like, rows, self._columns), CudaGraphRunner(graph=graph)
        return self._kept[rows]

    def _decode_step(self, answers: DecodeState) -> None:
        answers.attention_mask.index_fill_(1, answers.cache_position, True)
        tokens = answers.ids.index_select(1, answers.cache_position)[:, 0]
        hidden = self.backbone.decode_step(tokens, answers.positions, answers.attention_mask, answers)
        answers.positions.add_(1)
        answers.cache_position.add_(1)
        self._select_next_tokens(answers, hidden)

    def _select_next_tokens(self, answers: DecodeState, hidden: Tensor) -> None:
        """Take the likeliest token for the column; behind an answer's end padding."""
        tokens = self.backbone.logits(hidden).index_fill(1, self.suppressed_token_ids, -torch.inf).argmax(-1)
        tokens = tokens.where(answers.unfinished, self.tokenizer.pad_token_id)
        answers.ids.index_copy_(1, answers.cache_position, tokens[:, None])
        answers.unfinished.logical_and_((tokens[:, None] != self.eos_token_ids).all(1))
