"""A batch moves between devices, is pinned, and is cut by rows as one object."""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from lightning import LightningModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.model.batch import Batch
from idefics_lit.pretrained import load_processor

EXAMPLES = [
    Example(i, f"What is number {i}?", [Image.new("L", (112, 84), 255 - page)], [f"answer {i}"], page_id=page)
    for i, page in enumerate([0, 1, 0, 2, 1])
]
ROWS = [[0, 2], [1, 4], [3]]  # the examples of each page


@pytest.fixture(scope="module")
def processor(tiny):
    return load_processor(tiny, image_size=112)


@pytest.fixture(params=[True, False], ids=["train", "evaluation"])
def batch(request, processor):
    return Idefics2Collator(processor, train=request.param)(EXAMPLES)


def tensors(value):
    """All tensors of a batch and of its parts, by name."""
    found = {}
    for item in fields(value):
        part = getattr(value, item.name)
        if isinstance(part, Tensor):
            found[item.name] = part
        elif is_dataclass(part):
            found |= {f"{item.name}.{name}": tensor for name, tensor in tensors(part).items()}
    return found


def assert_equal(first, second):
    for item in fields(first):
        one, other = getattr(first, item.name), getattr(second, item.name)
        if is_dataclass(one):
            assert_equal(one, other)
        else:
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, item.name


def test_lightning_moves_every_tensor(batch):
    moved = LightningModule().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert {tensor.device.type for tensor in tensors(moved).values()} == {"meta"}
    assert tensors(moved).keys() == tensors(batch).keys()
    assert {tensor.device.type for tensor in tensors(batch).values()} == {"cpu"}
    assert (moved.question_ids, moved.image_sizes) == (batch.question_ids, batch.image_sizes)


def test_every_tensor_is_pinned(batch, monkeypatch):
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 1)
    assert_equal(batch.pin_memory(), add_one(batch))


def add_one(value):
    changed = {name: tensor + 1 for name, tensor in tensors(value).items() if "." not in name}
    if getattr(value, "prompts", None):
        changed["prompts"] = add_one(value.prompts)
    return replace(value, **changed)


@pytest.mark.gpu
def test_a_loader_pins_batches_and_lightning_moves_them(processor):
    collate = Idefics2Collator(processor, train=False)
    loader = DataLoader(EXAMPLES, batch_size=5, collate_fn=collate, pin_memory=True, num_workers=1)
    (pinned,) = loader
    assert all(tensor.is_pinned() for tensor in tensors(pinned).values())
    moved = LightningModule().transfer_batch_to_device(pinned, torch.device("cuda"), 0)
    assert all(tensor.is_cuda for tensor in tensors(moved).values())
    assert_equal(moved.to("cpu"), collate(EXAMPLES))
    assert Batch.empty(["row 3: bad"]).pin_memory().to("cuda").is_empty


def test_attention_mask_has_two_dimensions_packed_or_not(processor):
    packed = Idefics2Collator(processor, train=True)(EXAMPLES)
    alone = Idefics2Collator(processor, train=True)([replace(example, page_id=None) for example in EXAMPLES[:2]])
    for batch in (packed, alone):
        assert batch.attention_mask.shape == batch.input_ids.shape
    length = packed.input_ids.shape[1]
    assert packed.packed_attention_mask.shape == (3, 1, length, length)
    assert torch.equal(packed.packed_attention_mask.diagonal(dim1=2, dim2=3)[:, 0] & (packed.attention_mask == 1),
                       packed.attention_mask == 1)  # fmt: skip
    assert alone.packed_attention_mask is None and alone.position_ids is None
    assert packed.model_inputs()["attention_mask"] is packed.packed_attention_mask
    assert alone.model_inputs()["attention_mask"] is alone.attention_mask


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 3), (2, 3), (0, 3)])
def test_rows_are_a_batch_of_their_questions(batch, start, stop):
    cut = batch.rows(start, stop)
    members = sorted(i for row in ROWS[start:stop] for i in row)
    assert cut.question_ids == members
    assert [[cut.question_ids[i] for i, row in enumerate(cut.question_rows) if row == number]
            for number in range(stop - start)] == ROWS[start:stop]  # fmt: skip
    assert torch.equal(cut.input_ids, batch.input_ids[start:stop])
    assert torch.equal(cut.packed_attention_mask, batch.packed_attention_mask[start:stop])
    labels = cut.labels[cut.labels != -100]
    assert torch.equal(cut.labels.flatten()[cut.supervised_positions + 1], labels)
    assert cut.image_keys == batch.image_keys[start:stop]
    if batch.prompts:
        assert cut.prompts.questions == [EXAMPLES[i].question for i in members]
        assert cut.prompts.references == [EXAMPLES[i].answers for i in members]
        # gather_index finds each prompt's tokens in its row.
        for i, row in enumerate(cut.question_rows):
            real = cut.prompts.attention_mask[i].bool()
            assert torch.equal(cut.input_ids[row][cut.prompts.gather_index[i]][real], cut.prompts.input_ids[i][real])
    if (start, stop) == (0, 3):
        assert_equal(cut, batch)


def test_a_batch_of_skipped_examples_alone():
    batch = Batch.empty(["row 3: bad"])
    assert batch.is_empty and batch.skipped == ["row 3: bad"]
    assert batch.to("meta").is_empty
