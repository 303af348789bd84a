"""The program that trains the small reader: its packed forward is transformers' forward, its targets are in place."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "tiny_reader"))

from evaluate import SETS, anls, render_held_out
from forward import PackedReader, difference
from pages_store import COLUMNS, PageStore
from tasks import CHARACTERS, QUESTIONS, encode
from training_loss import new_reader

CPU = torch.device("cpu")
PAGES = render_held_out(SETS[0], range(2))


def test_packed_forward() -> None:
    """Questions packed behind one page have the logits and the ids of questions asked one by one."""
    reader = PackedReader(new_reader(), slots=3)
    assert difference(reader, PAGES[:2], CPU) <= 1e-4


@pytest.mark.parametrize("augment", [False, True])
def test_targets(augment: bool) -> None:
    """Where an answer's next character is said to stand, the page has that character, shifted pages included."""
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


def test_anls() -> None:
    """Case and spaces don't count, one half is kept, the nearest answer wins."""
    assert anls(" NEW  york", ["Boston", "New York"]) == 1
    assert anls("ab", ["abcd"]) == 0.5
    assert anls("a", ["abcd"]) == anls("", ["a"]) == 0
