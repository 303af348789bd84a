"""Greedy decoding from the keys and values of a batch's prefill, which serves the loss and the answers.

Prompts that are answered leave the batch. With CUDA graphs, keys and values are in tensors with fixed addresses, and a
decode step, thousands of kernels, is one launch.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from idefics_lit.model.batch import Batch
from idefics_lit.model.cuda_graphs import CudaGraphRunner
from idefics_lit.model.forward import Backbone

# With CUDA graphs the shapes of states are few: rows and columns are padded to multiples, and the number of rows is
# divided by ROWS_DIVISOR when so few prompts are unfinished.
ROWS_MULTIPLE, COLUMNS_MULTIPLE, ROWS_DIVISOR = 16, 64, 4

# The tags of tiles are special tokens of some models and text of others.
IMAGE_TOKEN = re.compile(r"<(fake_token_around_image|image|global-img|row_\d+_col_\d+)>")

Layers = Sequence[tuple[Tensor, ...]]


def suppressed_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens of images and their tiles, which are never generated."""
    tokens = tokenizer.added_tokens_decoder.items()
    return [token_id for token_id, token in tokens if IMAGE_TOKEN.fullmatch(token.content)]


class PrefillCache:
    """Keys and values of R rows of T tokens; the text model's layers call `update`, as on transformers' caches.

    Attributes:
        layers: for each layer keys and values (R, heads, T, head size).
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, ...]] = []

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values."""
        self.layers.append((keys, values))
        return keys, values


class DecodeState:
    """B prompts and their answers in L columns; all answers start in the same column.

    Args:
        like: keys and values of each layer, of any rows; they give heads, head size, dtype and device.
        rows: B.
        columns: L.

    Attributes:
        ids: (B, L), token ids of the answers.
        attention_mask: (B, L), True for tokens whose keys and values are stored.
        positions: (B), position id of the next token to decode.
        log_probabilities: (B) in float32, sum of the log-probabilities of an answer's tokens so far.
        unfinished: (B), whether an answer has no end-of-sequence token yet.
        cache_position: (1), column of the next token to decode.
        layers: for each layer keys and values (B, heads, L, head size).
    """

    def __init__(self, like: Layers, rows: int, columns: int) -> None:
        device = like[0][0].device
        self.ids = torch.zeros(rows, columns, dtype=torch.long, device=device)
        self.attention_mask = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self.log_probabilities = torch.zeros(rows, device=device)
        self.unfinished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.cache_position = torch.zeros(1, dtype=torch.long, device=device)
        # Zeros and not uninitialized memory: a masked token has weight 0, and 0 times NaN is NaN.
        self.layers = [
            tuple(states.new_zeros(rows, states.shape[1], columns, states.shape[3]) for states in layer)
            for layer in like
        ]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> Any:  # noqa: ANN401
        """Store a layer's keys and values at ``cache_position``; return those of all columns."""
        for stored, new in zip(self.layers[layer], (keys, values), strict=True):
            stored.index_copy_(2, self.cache_position, new)
        return self.layers[layer]

    def load_prompts(
        self, prefilled: Layers, rows: Tensor, gather_index: Tensor, attention_mask: Tensor, pad_token_id: int
    ) -> None:
        """Load n prompts from the keys and values of a prefill.

        Args:
            prefilled: keys and values of each layer (R, heads, T, head size).
            rows: (n), the row of each prompt.
            gather_index: (n, T'), the columns of its tokens in that row.
            attention_mask: (n, T') bool, False for padding.
            pad_token_id: fills the answers.
        """
        count, length = gather_index.shape
        for stored_layer, layer in zip(self.layers, prefilled, strict=True):
            for stored, states in zip(stored_layer, layer, strict=True):
                stored[:count, :, :length] = states.transpose(1, 2)[rows[:, None], gather_index].transpose(1, 2)
                # The previous batch's states, if they are NaN, would make this batch NaN although they are masked.
                stored[:count, :, length:] = 0
        for tensor in (self.attention_mask, self.positions, self.log_probabilities, self.unfinished):
            tensor.zero_()
        self.ids.fill_(pad_token_id)
        self.attention_mask[:count, :length] = attention_mask
        self.positions[:count] = attention_mask.sum(1)
        self.unfinished[:count] = True
        self.cache_position.fill_(length)

    def keep_rows(self, source: "DecodeState", rows: Tensor) -> None:
        """Load n rows (n) of another state, all of them unfinished."""
        for name in ("ids", "attention_mask", "positions", "log_probabilities"):
            getattr(self, name).zero_()[: len(rows)] = getattr(source, name)[rows]
        for stored_layer, layer in zip(self.layers, source.layers, strict=True):
            for stored, states in zip(stored_layer, layer, strict=True):
                stored[: len(rows)] = states[rows]
        self.unfinished.zero_()[: len(rows)] = True
        self.cache_position.copy_(source.cache_position)


class GreedyDecoder:
    """Answer prompts greedily, until an end-of-sequence token.

    These are ``<end_of_utterance>``, the tokenizer's own, and those of the model's ``generation_config``. The special
    tokens of images and their tiles are never generated.

    Args:
        backbone: of a model in eval mode.
        processor: the model's processor.
        max_new_tokens: the maximum number of tokens of an answer.
        graphs: run decode steps as CUDA graphs; on a CPU the same fixed tensors are used without graphs.
    """

    def __init__(self, backbone: Backbone, processor: ProcessorMixin, max_new_tokens: int, *, graphs: bool) -> None:
        self.backbone, self.tokenizer = backbone, processor.tokenizer
        self.max_new_tokens, self.graphs = max_new_tokens, graphs
        device = backbone.lm_head.weight.device
        self.suppressed_token_ids = torch.tensor(suppressed_token_ids(self.tokenizer), device=device)
        ends = {self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids("<end_of_utterance>")}
        self.eos_token_ids = torch.tensor(sorted(ends | backbone.eos_token_ids), device=device)
        self._states: dict[int, tuple[DecodeState, CudaGraphRunner]] = {}  # by number of rows
        self._columns = 0

    def answer(self, batch: Batch, hidden: Tensor, cache: PrefillCache) -> tuple[list[list[int]], list[float]]:
        """Answer a batch's prompts.

        Args:
            batch: `Idefics2Collator`'s for evaluation.
            hidden: the last hidden states of the batch (R, T, width), from `Backbone.prefill`.
            cache: its keys and values.

        Returns:
            The token ids of the B answers, each with its end-of-sequence token if it has one; and the log-probability
            of each answer, the sum over these tokens. It is that of the distribution which tokens are chosen from: the
            probability of suppressed tokens is 0, and the other probabilities sum to 1.

        Raises:
            InputError: a prompt with its answer is longer than the text model's maximum.
        """
        assert batch.prompts is not None
        gather_index, mask = batch.prompts.gather_index, batch.prompts.attention_mask.bool()
        rows = torch.tensor(batch.question_rows, device=hidden.device)
        count, first = gather_index.shape
        last = first + self.max_new_tokens
        self.backbone.check_length(last)
        pad_token_id = self.tokenizer.pad_token_id
        answers = hidden.new_full((count, self.max_new_tokens), pad_token_id, dtype=torch.long)
        log_probabilities = hidden.new_zeros(count, dtype=torch.float32)
        state, run = self._state_for(cache.layers, self._rows_for(count), last)
        state.load_prompts(cache.layers, rows, gather_index, mask, pad_token_id)
        self._select_next_tokens(state, F.pad(hidden[rows, gather_index[:, -1]], (0, 0, 0, len(state.ids) - count)))
        questions = torch.arange(count, device=hidden.device)  # that the state's rows answer
        for _ in range(self.max_new_tokens - 1):
            unfinished = state.unfinished.nonzero()[:, 0]
            if not len(unfinished):
                break
            if (fewer := self._rows_for(len(unfinished))) < len(state.ids):
                answers[questions] = state.ids[: len(questions), first:last]
                log_probabilities[questions] = state.log_probabilities[: len(questions)]
                source, questions = state, questions[unfinished]
                state, run = self._state_for(source.layers, fewer, source.ids.shape[1])
                state.keep_rows(source, unfinished)
            run(partial(self._decode_step, state))
        answers[questions] = state.ids[: len(questions), first:last]
        log_probabilities[questions] = state.log_probabilities[: len(questions)]
        is_end = (answers[..., None] == self.eos_token_ids).any(-1).tolist()
        ids = [
            tokens[: ends.index(True) + 1 if True in ends else None]
            for tokens, ends in zip(answers.tolist(), is_end, strict=True)
        ]
        return ids, log_probabilities.nan_to_num(nan=-torch.inf).tolist()  # logits that are NaN choose nothing

    def _rows_for(self, prompts: int) -> int:
        """Return the number of rows of the state for so many unfinished prompts."""
        if not self.graphs:
            return prompts
        rows = max(self._states, default=0)
        if prompts > rows:
            return prompts + -prompts % ROWS_MULTIPLE
        while rows // ROWS_DIVISOR >= max(prompts, ROWS_MULTIPLE):
            rows //= ROWS_DIVISOR
        return rows

    def _state_for(self, like: Layers, rows: int, columns: int) -> tuple[DecodeState, CudaGraphRunner]:
        if not self.graphs:
            return DecodeState(like, rows, columns), CudaGraphRunner(graph=False)
        if columns > self._columns:
            self._columns = columns + -columns % COLUMNS_MULTIPLE
            self._states.clear()
        if rows not in self._states:
            runner = CudaGraphRunner(graph=like[0][0].is_cuda)
            self._states[rows] = DecodeState(like, rows, self._columns), runner
        return self._states[rows]

    def _decode_step(self, state: DecodeState) -> None:
        state.attention_mask.index_fill_(1, state.cache_position, True)
        tokens = state.ids.index_select(1, state.cache_position)[:, 0]
        hidden = self.backbone.decode_step(tokens, state.positions, state.attention_mask, state)
        state.positions.add_(1)
        state.cache_position.add_(1)
        self._select_next_tokens(state, hidden)

    def _select_next_tokens(self, state: DecodeState, hidden: Tensor) -> None:
        """Write the most likely token at ``cache_position``, or padding where an answer is finished."""
        logits = self.backbone.logits(hidden).float().index_fill(1, self.suppressed_token_ids, -torch.inf)
        tokens = logits.argmax(-1)
        log_probabilities = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        state.log_probabilities.add_(log_probabilities.where(state.unfinished, 0.0))
        tokens = tokens.where(state.unfinished, self.tokenizer.pad_token_id)
        state.ids.index_copy_(1, state.cache_position, tokens[:, None])
        state.unfinished.logical_and_((tokens[:, None] != self.eos_token_ids).all(1))
