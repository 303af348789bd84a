"""Several questions on a page in one row: the page once, then each question with its answer.

Each question sees the page and itself alone, at the positions it would have in a row of its own, so that its logits are
those of a row of its own; a page's image tokens are read once instead of once a question.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED_LABEL = -100
MULTIPLE = 16  # rows' lengths are a multiple, without which attention with a mask copies its operands


class Segment(NamedTuple):
    """Token ids, and the label of each: itself, or `IGNORED_LABEL`."""

    ids: list[int]
    labels: list[int]


class PackedRow(NamedTuple):
    """What stands before the questions, image tokens included, and the questions with their answers."""

    page: Segment
    questions: list[Segment]


def pack(rows: Sequence[PackedRow], pad_token_id: int) -> dict[str, Tensor]:
    """Lay out R rows of T tokens, right-padded.

    Returns:
        ``input_ids`` and ``labels`` (R, T); ``attention_mask`` (R, T), 0 for padding; ``supervised_positions`` (L), the
        indices, among the R x T tokens, of those whose next token is supervised. Where a row has several
        questions, ``attention_mask`` is (R, 1, T, T) instead, True where a token sees another, and ``position_ids``
        (R, T) say where a token would stand in a row of its own.
    """
    columns = [_columns(row) for row in rows]
    ids, labels, positions, parts = (
        _padded(some, padding)
        for some, padding in zip(zip(*columns, strict=True), (pad_token_id, IGNORED_LABEL, 0, -1), strict=True)
    )
    # Found here: on a GPU, finding them would wait for it.
    supervised_positions = F.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1)).flatten().nonzero()[:, 0]
    common = {"input_ids": ids, "labels": labels, "supervised_positions": supervised_positions}
    if all(len(row.questions) == 1 for row in rows):
        return {**common, "attention_mask": (parts >= 0).long()}
    before = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    sees = before & ((parts[:, None] == 0) | (parts[:, None] == parts[:, :, None]))
    return {**common, "attention_mask": sees[:, None], "position_ids": positions}


def _padded(columns: Sequence[list[int]], padding: int) -> Tensor:
    padded = pad_sequence([torch.tensor(column) for column in columns], batch_first=True, padding_value=padding)
    return F.pad(padded, (0, -padded.shape[1] % MULTIPLE), value=padding)


def _columns(row: PackedRow) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, labels, positions, and to which part each token belongs: 0 for the page, 1 and up for the questions."""
    start = len(row.page.ids)
    ids, labels, positions, parts = list(row.page.ids), list(row.page.labels), list(range(start)), [0] * start
    for number, question in enumerate(row.questions, start=1):
        length = len(question.ids)
        ids += question.ids
        labels += question.labels
        positions += range(start, start + length)
        parts += [number] * length
    return ids, labels, positions, parts
