"""The loaders' workers prepare the first batches while the model loads: what they read, and how runs end meanwhile."""

import multiprocessing
import time

import pytest
import torch
from lightning import Callback, Trainer
from PIL import Image

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.errors import InputError
from idefics_lit.model.loading import LoRA
from idefics_lit.training.module import Idefics2Module
from idefics_lit.training.options_in_effect import find_batch_size

CPU = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Module(Idefics2Module):
    """Calls ``while_loading`` while the model is loaded."""

    def prepare_base(self, model):
        self.while_loading()


class Marked(DocVQADataModule):
    """Writes a file for each split when a worker reads its first question."""

    def dataset(self, split):
        examples = super().dataset(split)

        class Marking(type(examples)):
            def __getitem__(dataset, index):
                (self.folder / split).touch()
                return super().__getitem__(index)

        examples.__class__ = Marking
        return examples


class Late(DocVQADataModule):
    """Starts no workers early."""

    def start_workers(self, split):
        pass


class Batches(Callback):
    """Remembers the questions of all batches."""

    def __init__(self):
        self.ids, self.losses = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.ids.append(batch.question_ids)
        self.losses.append(outputs["loss"].item())

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.ids.append(batch.question_ids)


@pytest.fixture
def data(docvqa, tiny):
    def data(kind=DocVQADataModule, **options):
        small = {"image_size": 112, "num_workers": 2, "limit_val": 3, "global_batch_size": 4, **options}
        return kind(small.pop("source", str(docvqa)), tiny, **small)

    return data


@pytest.fixture
def module(tiny):
    def module(kind=Module, while_loading=lambda: None):
        torch.manual_seed(0)
        ours = kind(tiny, quantization="none", lora=LoRA(dropout=0.1), warmup_steps=0, max_new_tokens=2)
        ours.while_loading = while_loading
        return ours

    return module


def wait_for(*paths):
    end = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, [path.name for path in paths if not path.exists()]
        time.sleep(0.01)


def test_workers_read_while_the_model_loads(module, data, tmp_path):
    pages = data(Marked)
    pages.folder = tmp_path
    ours = module(while_loading=lambda: wait_for(tmp_path / "train", tmp_path / "val"))
    Trainer(**CPU, max_steps=1).fit(ours, pages)
    assert not multiprocessing.active_children()


def test_a_validation_starts_its_workers_early(module, data, tmp_path):
    pages = data(Marked)
    pages.folder = tmp_path
    Trainer(**CPU).validate(module(while_loading=lambda: wait_for(tmp_path / "val")), pages)
    assert not (tmp_path / "train").exists()


def test_nothing_of_a_fit_changes(module, data):
    """Batches, losses with dropout, weights and random numbers are those of a fit whose workers start later."""
    found = []
    for kind in (DocVQADataModule, Late):
        batches, ours = Batches(), module()
        Trainer(**CPU, max_epochs=2, callbacks=batches).fit(ours, data(kind, limit_train=10))
        found.append((batches.ids, batches.losses, ours.state_dict(), torch.initial_seed()))
    (ids, losses, weights, seed), (late_ids, late_losses, late_weights, late_seed) = found
    assert len(losses) == 6
    assert (ids, losses, seed) == (late_ids, late_losses, late_seed)
    assert all(torch.equal(value, late_weights[name]) for name, value in weights.items())


def test_a_resumed_fit_reads_what_is_left(module, data, tmp_path):
    class Saving(Batches):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, resumed = Saving(), Batches()
    for callback, path in ((whole, None), (resumed, tmp_path / "middle.ckpt")):
        trainer = Trainer(**CPU, max_steps=5, limit_val_batches=0, callbacks=callback)
        trainer.fit(module(), data(limit_train=10), ckpt_path=path)
    assert (resumed.ids, resumed.losses) == (whole.ids[2:], whole.losses[2:]) and len(resumed.ids) == 3


def test_smaller_batches_after_the_trial_are_read(module, data):
    class SmallMemory(Module):
        def loss(self, batch):
            if len(batch.question_ids) > 2:
                raise torch.OutOfMemoryError
            return super().loss(batch)

        def on_fit_start(self):
            super().on_fit_start()
            find_batch_size(self, self.trainer)

    batches = Batches()
    Trainer(**CPU, max_steps=1, limit_val_batches=0, callbacks=batches).fit(module(SmallMemory), data())
    assert [len(ids) for ids in batches.ids] == [2, 2]


@pytest.mark.parametrize("broken", [False, True])
def test_an_error_of_the_weights_comes_before_one_of_a_page(module, data, tmp_path, broken):
    """Although workers have read the page before the weights are loaded."""
    Image.new("RGB", (30, 40)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("not an image")
    for split, name in (("train", "bad.png"), ("validation", "good.png")):
        (tmp_path / f"{split}.csv").write_text(f"question,answers,image\nIs it signed?,yes,{name}\n")

    def while_loading():
        if broken:
            raise InputError("the weights are broken")

    with pytest.raises(InputError, match="the weights are broken" if broken else r"bad\.png"):
        Trainer(**CPU, max_steps=1).fit(module(while_loading=while_loading), data(source=str(tmp_path)))
    assert not broken or not multiprocessing.active_children()


def test_ctrl_c_while_the_model_loads(module, data):
    def interrupt():
        assert len(multiprocessing.active_children()) == 4
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        Trainer(**CPU, max_steps=1).fit(module(while_loading=interrupt), data())
    assert not multiprocessing.active_children()


def test_no_workers_for_what_is_not_read(module, data):
    counts = []
    for options in ({"num_sanity_val_steps": 0}, {"limit_val_batches": 0}, {"overfit_batches": 1}):
        ours = module(while_loading=lambda: counts.append(len(multiprocessing.active_children())))
        Trainer(**CPU, max_steps=1, **options).fit(ours, data())
    pages = data()
    pages.trainer = Trainer(**CPU)
    pages.setup("fit")  # as `check` does
    assert counts == [2, 2, 0] and not multiprocessing.active_children()


def test_workers_start_on_the_cpu_whatever_the_default_device(data, module):
    """While the model is configured, Lightning makes its device the default one."""
    pages, seen = data(), Batches()

    def configure(hook=pages.start_workers):
        def call(split):
            with torch.device("meta"):
                hook(split)

        return call

    pages.start_workers = configure()
    Trainer(**CPU, max_steps=1, limit_val_batches=0, callbacks=[seen]).fit(module(), pages)
    assert len(seen.losses) == 1 and seen.losses[0] > 0
