"""Numbers that are none end a run by name; float16's overflows are the scaler's, up to a point."""

import json

import pytest
import torch
from lightning import Trainer

from idefics_lit.errors import InputError
from idefics_lit.training.finite_checks import MOST_SKIPPED, FiniteLossCheck, OverflowCheck
from idefics_lit.training.module import Idefics2Module
from idefics_lit.utils.host_copy import HostCopy


@pytest.fixture
def broken_after(monkeypatch):
    """Make the loss of each batch behind so many what is asked for."""

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


def test_losses_are_looked_at_in_their_order():
    watch = FiniteLossCheck()
    watch.add(torch.tensor(1.0), [1])
    with pytest.raises(InputError, match=r"the loss of questions 2, 3 is inf: lower model.lr"):
        watch.add(torch.tensor(torch.inf), [2, 3])
    watch.check(wait=True)


def test_what_arrives_is_what_was_sent():
    value = torch.tensor(1.0)
    arriving = HostCopy(value)
    value.fill_(2)
    assert arriving.ready and arriving.result() == 1


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


def test_a_scaler_that_falls_and_falls_ends_the_run():
    watch, scaler = OverflowCheck(), torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def step(gradient):
        scaler.scale(weight.sum()).backward()
        weight.grad.fill_(gradient)
        watch.step(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for gradient in [torch.inf] * (MOST_SKIPPED - 1) + [0.0] + [torch.inf] * MOST_SKIPPED:
        step(gradient)
    with pytest.raises(InputError, match="float16 overflowed in 20 optimizer steps in a row, which were skipped: give"):
        step(0.0)
