"""An optimizer step has the same examples, whatever the batch size and the devices."""

import pytest
import torch
from lightning import Trainer
from PIL import Image

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Example, Examples
from idefics_lit.data.optimizer_step import split_step
from idefics_lit.data.subset import Subset
from idefics_lit.data.workload import largest_batch, workload
from idefics_lit.errors import InputError

CPU = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.mark.parametrize(
    ("total", "batch_size", "accumulated", "devices", "expected"),
    [
        (None, None, 1, 1, (16, 1)),
        (None, None, 1, 2, (8, 1)),
        (16, None, 1, 4, (4, 1)),
        (16, None, 4, 1, (4, 4)),
        (16, 2, 1, 1, (2, 8)),
        (16, 2, 1, 4, (2, 2)),
        (16, 4, 2, 2, (4, 2)),
        (None, 2, 1, 1, (2, 1)),  # as Lightning has it
        (None, 3, 5, 7, (3, 5)),
        (64, None, 1, 1, (64, 1)),
    ],
)
def test_batches_multiply_to_the_step(total, batch_size, accumulated, devices, expected):
    size, batches = split_step(total, batch_size, accumulated, devices)
    assert (size, batches) == expected
    assert batch_size is not None or size * batches * devices == (total or 16)


@pytest.mark.parametrize(
    ("total", "batch_size", "accumulated", "devices"),
    [(16, 3, 1, 1), (16, 8, 4, 1), (16, 8, 1, 4), (None, None, 1, 3), (16, None, 32, 1), (16, 32, 1, 1)],
)
def test_values_that_do_not_multiply_to_it_are_refused(total, batch_size, accumulated, devices):
    names = r"data\.global_batch_size 16 .*data\.batch_size .*trainer\.accumulate_grad_batches .*device"
    with pytest.raises(InputError, match=names):
        split_step(total, batch_size, accumulated, devices)


@pytest.fixture
def data(docvqa):
    def data(trainer, **options):
        module = DocVQADataModule(str(docvqa), "tiny", image_size=112, num_workers=0, **options)
        module.trainer = trainer
        module.setup("fit")
        return module

    return data


def test_a_smaller_batch_keeps_step_and_validation(data):
    trainer = Trainer(**CPU, max_steps=4)
    module = data(trainer, global_batch_size=16, val_every_n_steps=59)
    assert (module.batch_size, trainer.accumulate_grad_batches, trainer.val_check_interval) == (16, 1, 59)
    module.step.set_batch_size(4)
    assert (module.batch_size, trainer.accumulate_grad_batches, trainer.val_check_interval) == (4, 4, 236)
    assert trainer.check_val_every_n_epoch is None
    assert [len(batch.question_ids) for batch in module.train_dataloader()] == [4] * 6
    module.teardown("fit")
    own = (trainer.accumulate_grad_batches, trainer.val_check_interval, trainer.check_val_every_n_epoch)
    assert own == (1, 1.0, 1)


def test_a_second_fit_of_a_trainer_starts_from_its_own_options(data):
    trainer = Trainer(**CPU, max_steps=4)
    first = data(trainer)
    first.step.set_batch_size(2)
    first.setup("fit")
    assert (first.batch_size, trainer.accumulate_grad_batches) == (16, 1)


def test_given_sizes_leave_no_choice(data):
    assert data(Trainer(**CPU, max_steps=4), batch_size=2, global_batch_size=16).step.batch_sizes == [2]
    assert data(Trainer(**CPU, max_steps=4, accumulate_grad_batches=2)).step.batch_sizes == [8]
    assert data(Trainer(**CPU, max_steps=4)).step.batch_sizes == [16, 8, 4, 2, 1]


def test_two_validation_intervals_are_refused(data):
    for interval in (7, 1):  # 1 is every batch, and the default 1.0 every epoch
        message = rf"data\.val_every_n_steps 2 and trainer\.val_check_interval {interval}: give one"
        with pytest.raises(InputError, match=message):
            data(Trainer(**CPU, max_steps=4, val_check_interval=interval), val_every_n_steps=2)


def test_a_resumed_run_keeps_the_batch_size_unless_it_is_given(data):
    state = {"num_workers": 0, "batch_size": 4}
    resumed = data(trainer := Trainer(**CPU, max_steps=4))
    resumed.load_state_dict(state)
    assert (resumed.batch_size, trainer.accumulate_grad_batches) == (4, 4)
    assert resumed.state_dict() == state
    given = data(Trainer(**CPU, max_steps=4), batch_size=8)
    given.load_state_dict(state)
    assert given.batch_size == 8
    other_step = data(Trainer(**CPU, max_steps=4), global_batch_size=6)  # 4 doesn't divide it
    other_step.load_state_dict(state)
    assert other_step.batch_size == 6
    older = data(Trainer(**CPU, max_steps=4))
    older.load_state_dict({"num_workers": 0})  # of an earlier version
    assert older.batch_size == 16


@pytest.mark.parametrize("rows", [2, 4])
def test_the_largest_batch_is_larger_than_the_others(docvqa, rows):
    data = DocVQADataModule(str(docvqa), "tiny", image_size=112, num_workers=0, batch_size=8, questions_per_page=rows)
    data.setup("fit")
    largest, batches = largest_batch(data), list(data.train_dataloader())
    assert len(largest.question_ids) >= 8
    for name in ("input_ids", "pixel_values"):
        sizes = [getattr(batch, name).numel() for batch in batches]
        assert getattr(largest, name).numel() >= max(sizes)
    assert largest.input_ids.shape[0] == max(len(batch.input_ids) for batch in batches)
    assert largest.input_ids.shape[1] >= max(batch.input_ids.shape[1] for batch in batches)
    assert workload(data).questions_per_row == pytest.approx(
        24 / sum(len(batch.input_ids) for batch in batches), rel=0.5
    )


class Pages(Examples):
    """White pages, of which every eighth or so has seven questions, and one question has three pages."""

    def __init__(self):
        counts = [7, *[1] * 9] * 10
        self.page_ids = [(f"page {page}",) for page, count in enumerate(counts) for _ in range(count)]
        self.page_ids[37] = ("first", "second", "third")
        self.answers = [("1066",)] * len(self.page_ids)

    def __len__(self):
        return len(self.page_ids)

    def __getitem__(self, index):
        pages = [Image.new("RGB", (56, 56), "white") for _ in self.page_ids[index]]
        return Example(index, "What is the number of the year on this page?", pages, list(self.answers[index]))


@pytest.mark.parametrize("questions_per_page", [1, 8])
def test_no_batch_is_larger_than_the_one_that_is_tried(docvqa, questions_per_page):
    """Where pages have unequal numbers of questions, and a question that isn't sampled has the most pages."""
    options = {"image_size": 56, "num_workers": 0, "batch_size": 16, "questions_per_page": questions_per_page}
    data = DocVQADataModule(str(docvqa), "tiny", **options)
    data.setup("fit")
    examples = Pages()
    data.examples["train"] = Subset(examples, range(len(examples)))
    largest = largest_batch(data)
    assert len(largest.question_ids) >= 16 and largest.pixel_values.shape[1] == 3
    for batch in data.train_dataloader():
        for name in ("input_ids", "pixel_values"):
            assert getattr(largest, name).numel() >= getattr(batch, name).numel()
    assert workload(data).images_per_page == 3


def test_the_same_step_in_other_batches_gives_the_same_gradient(tiny, docvqa):
    """What `find_batch_size` relies on: a step of 8 in one batch and in four."""
    from idefics_lit.model.loading import LoRA
    from idefics_lit.training.module import Idefics2Module

    adapters = []
    for batch_size in (8, 2):
        torch.manual_seed(0)
        module = Idefics2Module(
            tiny, quantization="none", lora=LoRA(dropout=0.0), lr=1e-3, warmup_steps=0, max_new_tokens=2
        )
        options = {"image_size": 112, "num_workers": 0, "limit_val": 1, "global_batch_size": 8}
        data = DocVQADataModule(str(docvqa), tiny, batch_size=batch_size, **options)
        trainer = Trainer(**CPU, max_steps=2, limit_val_batches=0, gradient_clip_val=1.0)
        trainer.fit(module, data)
        adapters.append(module.state_dict())
        assert trainer.global_step == 2
    for name, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][name], atol=2e-5, rtol=1e-3)
