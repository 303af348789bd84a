"""The training program of the small reader: its packed forward equals transformers' forward, its targets are right."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "tiny_reader"))

from evaluate import SETS, render_held_out
from forward import PackedReader, largest_difference
from pages_store import COLUMNS, PageStore
from tasks import CHARACTERS, QUESTIONS, encode
from training_loss import new_reader

CPU = torch.device("cpu")
PAGES = render_held_out(SETS[0], range(2))


def test_packed_forward() -> None:
    """Questions packed after one page have the logits and token ids of single questions."""
    reader = PackedReader(new_reader(), slots=3)
    assert largest_difference(reader, PAGES[:2], CPU) <= 1e-4


@pytest.mark.parametrize("augment", [False, True])
def test_targets(augment: bool) -> None:
    """The page has an answer's next character at its target position, on augmented pages too."""
    store = PageStore.of(PAGES, CPU)
    first_reading = torch.full((len(PAGES), 1), QUESTIONS)
    batch = store.batch(torch.arange(len(PAGES)), first_reading, augment)
    placed = batch.row >= 0
    cell = (batch.row * COLUMNS * 3 + batch.column).clamp_min(0).flatten(1)
    stands = batch.cells.gather(1, cell).view_as(placed)[placed]
    class_of = torch.zeros(264, dtype=torch.long)
    class_of[encode("".join(map(chr, range(33, 127))))] = torch.arange(1, CHARACTERS)
    same = (class_of[batch.target[placed]] == stands).float()
    assert len(same) > 50 and same.mean() > 0.95  # two thin characters may share a cell
