"""Lightning's tuners of the learning rate and the batch size; the fit uses what they find."""

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.errors import InputError
from idefics_lit.model.loading import LoRA
from idefics_lit.training.module import Idefics2Module


def make_module(tiny, kind=Idefics2Module, lr=1e-2, **options):
    seed_everything(0)
    return kind(tiny, quantization="none", lora=LoRA(r=2), lr=lr, warmup_steps=1, max_new_tokens=1, **options)


@pytest.fixture
def data(tiny):
    return DocVQADataModule(
        "synthetic:form", tiny, limit_train=24, limit_val=2, num_workers=0, image_size=112, batch_size=1
    )


@pytest.fixture
def make_trainer(tmp_path):
    def make_trainer(*callbacks, max_steps=3):
        return Trainer(
            max_steps=max_steps, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[*callbacks],
            enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
        )  # fmt: skip

    return make_trainer


class Rates(Callback):
    def __init__(self):
        self.values = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.values.append(optimizer.param_groups[0]["lr"])


def assert_same_weights(one, two):
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


SEARCH = {"min_lr": 1e-5, "max_lr": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("as_callback", [False, True])
def test_a_fit_with_the_learning_rate_that_is_found_is_one_with_it_from_the_beginning(
    tiny, data, make_trainer, as_callback
):
    module, found = make_module(tiny), Rates()
    if as_callback:
        finder = LearningRateFinder(**SEARCH, num_training_steps=16)
        make_trainer(finder, found).fit(module, data)
        suggestion = finder.optimal_lr.suggestion()
    else:
        trainer = make_trainer(found)
        suggestion = Tuner(trainer).lr_find(module, datamodule=data, **SEARCH, num_training=16).suggestion()
        trainer.fit(module, data)
    assert module.lr == module.hparams.lr == suggestion != 1e-2
    given = Rates()
    make_trainer(given).fit(expected := make_module(tiny, lr=suggestion), data)
    assert found.values == given.values == pytest.approx([0, suggestion, suggestion / 2])
    assert_same_weights(module, expected)


class LoRAPlus(Idefics2Module):
    """Our schedule with groups of the subclass: the B matrices learn 16 times as fast."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        (group,) = optimizer.param_groups
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        fast = {**group, "params": [p for p in group["params"] if "lora_B" in names[id(p)]], "initial_lr": 16 * self.lr}
        group["params"] = [p for p in group["params"] if "lora_B" not in names[id(p)]]
        optimizer.param_groups.append(fast)
        scheduler.base_lrs.append(fast["initial_lr"])
        scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])
        return configured


def test_a_new_learning_rate_keeps_the_ratio_of_a_subclasss_groups(tiny, data, make_trainer):
    class Halve(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 1:
                module.lr = 0.005
            self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]

    make_trainer(halve := Halve(), max_steps=4).fit(make_module(tiny, LoRAPlus), data)
    assert halve.rates == pytest.approx([0.005 / 3, 16 * 0.005 / 3])


class OutOfMemory(Idefics2Module):
    """Whose GPU has room for four questions, and fails in the second batch."""

    def training_step(self, batch, batch_idx):
        self.batch_idx = batch_idx
        return super().training_step(batch, batch_idx)

    def loss(self, batch):
        loss = super().loss(batch)
        if len(batch.question_ids) > 4 and self.batch_idx == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return loss


@pytest.mark.slow
@pytest.mark.parametrize(("as_callback", "given"), [(False, 1), (True, None)])
def test_the_batch_size_that_is_found_is_used(tiny, data, make_trainer, as_callback, given):
    data.hparams.batch_size = given
    module, options = make_module(tiny, OutOfMemory), {"steps_per_trial": 2, "init_val": 2}
    if as_callback:
        trainer = make_trainer(finder := BatchSizeFinder(**options))
        trainer.fit(module, data)
        found = finder.optimal_batch_size
    else:
        trainer = make_trainer()
        found = Tuner(trainer).scale_batch_size(module, datamodule=data, **options)
        trainer.fit(module, data)
    assert data.batch_size == data.hparams.batch_size == trainer.train_dataloader.batch_size == found == 4
    assert trainer.global_step == 3
    data.batch_size = 4
    make_trainer().fit(expected := make_module(tiny), data)
    assert_same_weights(module, expected)


@pytest.mark.parametrize(
    ("kind", "option"), [(LearningRateFinder, "model.lr 0.01"), (BatchSizeFinder, "data.batch_size 1")]
)
def test_a_search_in_a_resumed_fit_is_refused(tiny, data, make_trainer, tmp_path, kind, option):
    """Lightning would forget the checkpoint after the search, and begin at step 0."""
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(tiny), data)
    trainer.save_checkpoint(path := tmp_path / "one.ckpt")
    with pytest.raises(
        InputError, match=rf"{kind.__name__} can't search in a fit that resumes: .* give {option}, which"
    ):
        make_trainer(kind()).fit(make_module(tiny), data, ckpt_path=path, weights_only=True)
