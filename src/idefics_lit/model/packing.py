"""Pack several questions about one page into one sequence: the page once, then each question with its answer.

A question attends to the page and to itself only, at the positions that it would have in a sequence of its own. Its
logits are therefore those of a sequence of its own, while the page's image tokens are processed once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from idefics_lit.model.batch import TokenRows

IGNORED_LABEL = -100  # ignore_index of torch's cross_entropy and of transformers' losses
LENGTH_MULTIPLE = 16  # of rows; with other lengths, attention with a mask copies its operands


class Segment(NamedTuple):
    """Token ids, and for each its label: the id itself or `IGNORED_LABEL`."""

    ids: list[int]
    labels: list[int]


class PackedRow(NamedTuple):
    """The tokens up to the last image token, and the questions with their answers."""

    page: Segment
    questions: list[Segment]


def pack(rows: Sequence[PackedRow], pad_token_id: int) -> TokenRows:
    """Lay out rows of tokens, right-padded to one length.

    ``position_ids`` and ``packed_attention_mask`` are set if any row holds several questions.
    """
    columns = zip(*map(_flatten, rows), strict=True)
    padding = (pad_token_id, IGNORED_LABEL, 0, -1)
    input_ids, labels, position_ids, segments = (
        _pad(column, value) for column, value in zip(columns, padding, strict=True)
    )
    tokens = TokenRows(
        input_ids=input_ids,
        labels=labels,
        attention_mask=(segments >= 0).long(),
        # Computed on the CPU: nonzero on a GPU synchronizes with it.
        supervised_positions=F.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1)).flatten().nonzero()[:, 0],
        page_tokens=min(len(row.page.ids) for row in rows),
    )
    if any(len(row.questions) > 1 for row in rows):
        causal = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
        same_question = (segments[:, None] == 0) | (segments[:, None] == segments[:, :, None])
        tokens.position_ids, tokens.packed_attention_mask = position_ids, (causal & same_question)[:, None]
    return tokens


def _pad(rows: Sequence[list[int]], value: int) -> Tensor:
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
    return F.pad(padded, (0, -padded.shape[1] % LENGTH_MULTIPLE), value=value)


def _flatten(row: PackedRow) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return ids, labels, positions, and the segment of each token: 0 for the page, 1 and up for the questions."""
    start = len(row.page.ids)
    ids, labels, positions, segments = list(row.page.ids), list(row.page.labels), list(range(start)), [0] * start
    for number, question in enumerate(row.questions, start=1):
        length = len(question.ids)
        ids += question.ids
        labels += question.labels
        positions += range(start, start + length)
        segments += [number] * length
    return ids, labels, positions, segments
