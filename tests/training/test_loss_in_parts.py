"""A batch for which memory doesn't suffice in the middle of a fit: it is computed in parts, with the same gradients."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.errors import InputError
from idefics_lit.model.loading import LoRA
from idefics_lit.training.module import Idefics2Module
from idefics_lit.training.trained_weights import trained_parameters

ROWS = 4  # of a batch


class Graph:
    """Lives as long as the autograd graph whose hooks refer to it."""


class SmallMemory(Idefics2Module):
    """A module on a device with memory for ``room`` rows, from its third batch on."""

    room, stage, calls = ROWS, "forward", 0
    graphs: weakref.WeakSet

    def loss(self, batch):
        self.calls += 1
        self.check_memory(batch)
        return super().loss(batch)

    def encode_pages(self, batch):
        zero = torch.zeros((), requires_grad=True)
        torch.autograd.grad(zero * 1, zero)  # on a CPU, autograd frees what a failed run has left at its next run
        assert not getattr(self, "graphs", ())  # the earlier activations
        pages, graph = super().encode_pages(batch), Graph()
        self.graphs = weakref.WeakSet([graph])
        for page in pages:  # their gradients follow those of the text model
            page.register_hook(lambda gradient: self.check_memory(batch, graph))
        return pages

    def check_memory(self, batch, graph=None):
        if (graph is None) == (self.stage == "forward") and self.calls > 2 and len(batch.input_ids) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")


class Gradients(Callback):
    """The gradients after each batch, and the loss of each step."""

    def __init__(self):
        self.batches, self.losses = [], []

    def on_after_backward(self, trainer, module):
        self.batches.append({name: p.grad.clone() for name, p in trained_parameters(module).items()})

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.losses += [loss.item() for loss in (outputs["loss"], module.step_loss) if loss is not None]


@pytest.fixture(scope="module")
def examples():
    pages = SyntheticPages("train", 400)
    first = {pages.page_ids[i]: i for i in reversed(range(400))}
    return [pages[i] for i in sorted(first.values())[: 4 * ROWS]]


@pytest.fixture(scope="module")
def fit(tiny, examples):
    def fit(kind=SmallMemory, callbacks=(), module=None, **options):
        seed_everything(0)
        attributes = {name: options.pop(name) for name in ("room", "stage") if name in options}
        module = kind(tiny, quantization="none", lora=LoRA(dropout=0.0), lr=1e-3, warmup_steps=0, max_new_tokens=2)
        for name, value in attributes.items():
            setattr(module, name, value)
        options = {"max_steps": 2, "accumulate_grad_batches": 2, **options}
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[found := Gradients(), *callbacks], **options,
        )  # fmt: skip
        loader = DataLoader(examples, batch_size=ROWS, collate_fn=module.collator(train=True, image_size=112))
        trainer.fit(module, loader)
        return module, found

    return fit


@pytest.fixture(scope="module")
def expected(fit):
    """The gradients with enough memory."""
    return fit()[1]


def assert_same(one, two):
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize(("room", "parts"), [(3, 2), (1, 1)])
def test_a_batch_that_does_not_fit_has_the_same_gradients(fit, expected, stage, room, parts):
    """The first batch that fails begins an optimizer step, the next one ends it."""
    with pytest.warns(UserWarning, match=rf"parts of {parts} from now on, .*a smaller data\.batch_size") as lines:
        module, found = fit(room=room, stage=stage)
    assert sum("from now on" in str(line.message) for line in lines) == (2 if parts == 1 else 1)
    assert module.trainer.global_step == 2 and len(found.batches) == len(expected.batches) == 4
    for one, two in zip(found.batches, expected.batches, strict=True):
        assert_same(one, two)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def test_gradients_that_a_scaler_scales_are_the_same(fit):
    expected, found = (
        fit(room=room, stage="backward", max_steps=2, plugins=MixedPrecision("16-mixed", "cpu", scaler))[1]
        for room in (ROWS, 2)
        for scaler in [torch.amp.GradScaler("cpu", init_scale=1024.0)]
    )
    for one, two in zip(found.batches, expected.batches, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], rtol=0.05, atol=0.02 * float(two[name].abs().max()), msg=name)
    assert max(float(value.abs().max()) for value in found.batches[0].values()) > 1  # scaled


def test_a_row_that_does_not_fit_ends_the_fit_in_one_line(fit):
    with pytest.raises(InputError, match=r"a page with its questions: give --model\.gradient_checkpointing true"):
        fit(room=0)


class HookedMemory(SmallMemory):
    """A subclass that changes gradients when they are computed."""

    def on_fit_start(self):
        super().on_fit_start()
        for parameter in trained_parameters(self).values():
            parameter.register_hook(lambda gradient: 2 * gradient)


def test_hooks_on_parameters_are_called_once(fit, expected):
    _, found = fit(HookedMemory, max_steps=1)
    assert_same({name: 2 * value for name, value in expected.batches[0].items()}, found.batches[0])
    with pytest.raises(torch.OutOfMemoryError):  # a second computation would call them again
        fit(HookedMemory, room=2)


def fail_if_large(batch):
    if len(batch.input_ids) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")


class Rank1HasLittleMemory(Callback):
    """Make a batch of more than one row fail on the second rank, in its backward pass."""

    def on_fit_start(self, trainer, module):
        if trainer.global_rank == 1:
            encode_pages = module.encode_pages

            def encode_or_fail(batch):
                pages = encode_pages(batch)
                for page in pages:
                    page.register_hook(lambda gradient: fail_if_large(batch))
                return pages

            module.encode_pages = encode_or_fail


@pytest.mark.slow
def test_a_rank_that_computes_in_parts_reduces_the_same_gradients(run, tmp_path, tiny):
    command = f"""fit --model.pretrained {tiny} --data.source synthetic --data.limit_train 32 --data.limit_val 2
        --data.image_size 112 --data.num_workers 0 --data.questions_per_page 1 --data.global_batch_size 8
        --model.quantization none --model.lora.dropout 0 --model.lr 1e-4 --model.warmup_steps 0
        --model.max_new_tokens 2 --trainer.max_steps 4 --trainer.limit_val_batches 0 --trainer.accelerator cpu
        --trainer.precision 32-true --trainer.enable_progress_bar false""".split()
    (tmp_path / "two").mkdir()
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]
    ranks += ["--trainer.callbacks+=test_loss_in_parts.Rank1HasLittleMemory"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "idefics_lit", *command, *ranks],
        cwd=tmp_path / "two", capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("batches are computed in parts of 1 from now on") == 1
    run(*command, "--data.batch_size", "8")
    one, two = (
        torch.load(next((folder / "lightning_logs").rglob("*step=4.ckpt")), weights_only=True)["state_dict"]
        for folder in (tmp_path, tmp_path / "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=1e-5, msg=name)
