"""A loss that isn't finite, weights that aren't, and repeated float16 overflow stop a run."""

import json

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from idefics_lit.errors import InputError
from idefics_lit.training.finite_checks import MAX_SKIPPED_STEPS, FiniteLossCheck, OverflowCheck
from idefics_lit.training.module import Idefics2Module
from idefics_lit.utils.host_copy import HostCopy


@pytest.fixture
def broken_after(monkeypatch):
    """Multiply the loss of every batch after the first few by a value."""

    def broken_after(batches, value):
        loss, count = Idefics2Module.loss, iter(range(10**6))

        def patched(module, batch):
            summed, tokens = loss(module, batch)
            return (summed if next(count) < batches else summed * value), tokens

        monkeypatch.setattr(Idefics2Module, "loss", patched)

    return broken_after


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_and_nothing_of_it_saved(
    run, short_fit, docvqa, broken_after, capfd, tmp_path, value
):
    broken_after(3, value)
    args = short_fit("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", 1)
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2
    error = capfd.readouterr().err.splitlines()[-1]
    named, loss = error.removeprefix("error: the loss of questions ").split(": ")[0].split(" is ")
    ids = [row["questionId"] for row in json.loads((docvqa / "train.json").read_text())["data"]][:10]
    assert len(named.split(", ")) == 2 and set(map(int, named.split(", "))) <= set(ids)
    assert loss == str(value)
    saved = [torch.load(path, weights_only=True) for path in tmp_path.rglob("*.ckpt")]
    assert [checkpoint["global_step"] for checkpoint in saved] == [1]
    assert all(value.isfinite().all() for value in saved[0]["state_dict"].values())


class LossIs(BoringModel):
    """A module that any Lightning project might have, whose losses are given."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"] * 0 + self.losses[batch_idx]


def fit_boring(module, *callbacks, **options):
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=4, limit_val_batches=0, logger=False, **options,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks],
    )  # fmt: skip
    trainer.fit(module)
    return trainer


def test_any_module_is_stopped_and_the_batch_is_named():
    with pytest.raises(InputError, match=r"the loss of batch 2 is inf: lower model.lr"):
        fit_boring(LossIs([1.0, 2.0, torch.inf, 3.0]), FiniteLossCheck())
    assert fit_boring(LossIs([1.0, 2.0, torch.inf, 3.0])).global_step == 4


class LateHostCopy(HostCopy):
    """A copy that isn't ready until it is waited for, as on a busy GPU."""

    ready = False


def test_a_loss_that_arrives_late_is_checked_before_a_checkpoint_and_at_the_end(monkeypatch, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    monkeypatch.setattr("idefics_lit.training.finite_checks.HostCopy", LateHostCopy)
    for callbacks in ([], [Save()]):
        with pytest.raises(InputError, match="the loss of batch 1 is nan"):
            fit_boring(LossIs([1.0, torch.nan, 2.0, 3.0]), FiniteLossCheck(), *callbacks)
    assert [path.name for path in tmp_path.iterdir()] == ["1.ckpt"]


def test_a_host_copy_has_the_value_from_when_it_was_made():
    value = torch.tensor(1.0)
    host_copy = HostCopy(value)
    value.fill_(2)
    assert host_copy.ready and host_copy.result() == 1


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path):
    module = Idefics2Module(tiny, quantization="none")
    module.configure_model()
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(module)
    weight = next(p for p in module.parameters() if p.requires_grad)
    weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"lora_A.* isn't finite any more and isn't saved"):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_repeated_overflow_stops_the_run():
    """Only consecutive steps count; a successful step resets the count."""
    scaler = torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    trainer, check = Trainer(accelerator="cpu", logger=False), OverflowCheck()
    trainer.precision_plugin.scaler = scaler

    def step(gradient):
        scaler.scale(weight.sum()).backward()
        weight.grad.fill_(gradient)
        check.on_before_optimizer_step(trainer, None, optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for gradient in [torch.inf] * (MAX_SKIPPED_STEPS - 1) + [0.0] + [torch.inf] * MAX_SKIPPED_STEPS:
        step(gradient)
    with pytest.raises(InputError, match="float16 overflowed in 20 optimizer steps in a row, which were skipped: give"):
        step(0.0)


def test_without_a_gradient_scaler_nothing_is_counted():
    fit_boring(BoringModel(), OverflowCheck(), precision="bf16-mixed")
