"""Lightning's callbacks that average weights: they see the trained weights alone."""

import gc

import pytest
import torch
from bitsandbytes.nn.modules import Params4bit
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.errors import InputError
from idefics_lit.model.loading import LoRA
from idefics_lit.training.module import Idefics2Module
from idefics_lit.training.trained_weights import trained_parameters

CPU = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "num_sanity_val_steps": 0,
       "enable_model_summary": False}  # fmt: skip


def make_module(tiny, quantization="none"):
    seed_everything(0)
    return Idefics2Module(tiny, quantization=quantization, lora=LoRA(r=2), lr=1e-2, warmup_steps=0, max_new_tokens=1)


@pytest.fixture(scope="module")
def loaders(tiny):
    pages, module = SyntheticPages("train", 2), make_module(tiny)
    examples = [pages[i] for i in range(2)]
    return [
        DataLoader(examples, batch_size=1, collate_fn=module.collator(train=train, image_size=112))
        for train in (True, False)
    ]


@pytest.fixture(params=[WeightAveraging, EMAWeightAveraging, lambda: EMAWeightAveraging(use_buffers=False, decay=0.5)],
                ids=["mean", "ema", "no buffers"])  # fmt: skip
def averaging(request):
    return request.param


def fit(module, loaders, folder, *callbacks, steps=4, ckpt_path=None, **options):
    """Make two steps an epoch, then validate and save."""
    options = {"max_steps": steps, **options}
    checkpoint = ModelCheckpoint(folder, "{step}", monitor="val/loss", save_top_k=-1)
    trainer = Trainer(**CPU, **options, callbacks=[*callbacks, checkpoint])
    trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def load(path):
    return torch.load(path, weights_only=True)


def assert_equal(one, two):
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def trained(module):
    return {name: parameter.detach().clone() for name, parameter in trained_parameters(module).items()}


class Weights(Callback):
    """The trained weights after each step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, *args):
        self.values.append(trained(module))


def test_the_base_is_neither_copied_nor_averaged(tiny, loaders, tmp_path):
    """The running average of 4-bit weights would be other weights."""
    module = make_module(tiny, "nf4")
    module.configure_model()
    frozen = {name: p.data.clone() for name, p in module.named_parameters() if not p.requires_grad}
    counts = []

    class Count(Callback):
        def on_train_end(self, *_):
            counts.append(number_of_weights())

    def number_of_weights():
        gc.collect()
        return sum(isinstance(value, Params4bit) for value in gc.get_objects())

    expected = number_of_weights()
    fit(module, loaders, tmp_path, EMAWeightAveraging(decay=0.5), Count())
    assert counts == [expected] and expected > 0
    assert_equal(frozen, {name: p.data for name, p in module.named_parameters() if not p.requires_grad})


def test_a_checkpoint_holds_the_average_that_validation_scored(tiny, loaders, tmp_path, averaging):
    module, weights = make_module(tiny), Weights()
    trainer = fit(module, loaders, tmp_path, averaging(), weights)
    saved = load(tmp_path / "step=4.ckpt")
    assert_equal(saved["current_model_state"], weights.values[-1])
    assert_equal(saved["state_dict"], trained(module))  # that of the module after the fit
    mean = {name: torch.stack([step[name] for step in weights.values]).mean(0) for name in weights.values[0]}
    if averaging is WeightAveraging:
        assert all(torch.allclose(saved["state_dict"][name], value, atol=1e-6) for name, value in mean.items())
    other = make_module(tiny)
    scores = Trainer(**CPU).validate(other, loaders[1], ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    assert scores[0]["val/loss"] == trainer.callback_metrics["val/loss"].item()


def test_evaluating_a_checkpoint_after_the_fit_scores_that_checkpoint(tiny, loaders, tmp_path):
    """And not the average of the fit's end, of which Lightning's callback has a copy."""
    trainer = fit(module := make_module(tiny), loaders, tmp_path, EMAWeightAveraging(decay=0.5))
    for step in (2, 4):
        path = tmp_path / f"step={step}.ckpt"
        (expected,) = Trainer(**CPU).validate(make_module(tiny), loaders[1], ckpt_path=path, verbose=False)
        (scores,) = trainer.validate(module, loaders[1], ckpt_path=path, verbose=False)
        assert scores == expected
        (scores,) = trainer.test(module, loaders[1], ckpt_path=path, verbose=False)
        assert scores["test/loss"] == expected["val/loss"]
    (best,) = trainer.validate(module, loaders[1], ckpt_path="best", verbose=False)
    assert best["val/loss"] == trainer.checkpoint_callback.best_model_score.item()


def test_a_resumed_fit_ends_with_the_same_weights(tiny, loaders, tmp_path, averaging):
    fit(make_module(tiny), loaders, tmp_path / "whole", averaging())
    resumed = make_module(tiny)
    fit(resumed, loaders, tmp_path / "resumed", averaging(), ckpt_path=tmp_path / "whole" / "step=2.ckpt")
    whole, again = (load(tmp_path / name / "step=4.ckpt") for name in ("whole", "resumed"))
    assert_equal(whole["state_dict"], again["state_dict"])
    assert_equal(whole["current_model_state"], again["current_model_state"])


class EpochMean(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        (EpochMean, {}, (2, 3, 6)),
        (StochasticWeightAveraging, {"swa_lrs": 1e-2, "swa_epoch_start": 1}, (2, 3)),
        (GradientAccumulationScheduler, {"scheduling": {0: 2, 1: 1, 2: 2}}, (1, 2, 3)),
    ],
)
def test_what_a_callback_does_once_an_epoch_is_done_in_a_resumed_fit_too(tiny, docvqa, tmp_path, kind, options, steps):
    """From checkpoints of an epoch's last batch, where Lightning calls no hook at its end, and from within epochs."""

    def fit(folder, ckpt_path=None):
        every_step = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = Trainer(**CPU, max_epochs=3, limit_val_batches=0, callbacks=[kind(**options), every_step])
        data = DocVQADataModule(str(docvqa), tiny, limit_train=2, batch_size=1, image_size=112, num_workers=0)
        trainer.fit(module := make_module(tiny), data, ckpt_path=ckpt_path, weights_only=True)
        return trained(module)

    whole = fit(tmp_path / "whole")
    for step in steps:
        assert_equal(whole, fit(tmp_path / f"from {step}", tmp_path / "whole" / f"step={step}.ckpt"))


def test_a_checkpoint_that_is_saved_in_a_validation_holds_the_same(tiny, loaders, tmp_path):
    """As after SIGTERM; the module holds the average then."""

    class Save(Callback):
        def on_validation_batch_start(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"inside={trainer.global_step}.ckpt")

    fit(make_module(tiny), loaders, tmp_path, EMAWeightAveraging(decay=0.5), Save())
    for step in (2, 4):
        inside, after = load(tmp_path / f"inside={step}.ckpt"), load(tmp_path / f"step={step}.ckpt")
        assert_equal(inside["state_dict"], after["state_dict"])
        assert_equal(inside["current_model_state"], after["current_model_state"])


def test_stochastic_weight_averaging_averages_the_epochs(tiny, loaders, tmp_path):
    weights = Weights()
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    module = make_module(tiny)
    fit(module, loaders, tmp_path, averaging, weights, steps=-1, max_epochs=3)
    # Lightning's callback takes the weights at the beginning of each epoch, the first one's too.
    start = make_module(tiny)
    start.configure_model()
    for name, value in trained(module).items():
        epochs = [trained(start)[name], weights.values[1][name], weights.values[3][name]]
        assert torch.allclose(value, torch.stack(epochs).mean(0), atol=1e-6), name


def test_a_parent_of_a_quantized_module_is_refused(tiny, loaders, tmp_path):
    class Parent(LightningModule):
        def __init__(self, child):
            super().__init__()
            self.child = child

        def configure_model(self):
            self.child.configure_model()

        def configure_optimizers(self):
            return self.child.configure_optimizers()

        def training_step(self, batch, batch_idx):
            return self.child.loss(batch)[0]

    with pytest.raises(InputError, match="the weights of a Parent can't be averaged, since its Idefics2Module is"):
        Trainer(**CPU, max_steps=1, callbacks=[EMAWeightAveraging()]).fit(Parent(make_module(tiny, "nf4")), loaders[0])


def test_the_command_line_averages_resumes_and_exports(run, short_fit, tmp_path):
    callback = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.5"]
    run(*short_fit(*callback, "--trainer.max_steps", 6))
    (path,) = {*tmp_path.rglob("*.ckpt")}
    run(*short_fit(*callback), "--ckpt_path", "last")
    run("export", "--ckpt_path", path, "--output", tmp_path / "adapter")
    exported, saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), load(path)["state_dict"]
    assert len(exported) == len(saved)
    for name, value in saved.items():
        assert torch.equal(value, exported[name.removeprefix("model.").replace(".default", "")])
