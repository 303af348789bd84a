"""Subclasses of `Idefics2Module` as users of Lightning write them."""

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.errors import InputError
from idefics_lit.model.loading import LoRA
from idefics_lit.reporting.prediction_writers import EvaluationWriter
from idefics_lit.reporting.report import Report
from idefics_lit.training.module import Idefics2Module
from idefics_lit.training.trained_weights import trained_parameters


def make_module(tiny, kind=Idefics2Module, **options):
    seed_everything(0)
    options = {"lora": LoRA(r=2, dropout=0.0), "quantization": "none", "warmup_steps": 0, "lr": 1e-2, **options}
    return kind(tiny, max_new_tokens=2, **options)


@pytest.fixture(scope="module")
def examples():
    """Questions with answers of different lengths."""
    pages = SyntheticPages("train", 4)
    examples = [pages[i] for i in range(4)]
    for number, example in enumerate(examples):
        example.answers = ["a longer answer"[: 2 + 4 * number]]
    return examples


def loader(tiny, examples, train=True, batch_size=1):
    collate = make_module(tiny).collator(train=train, image_size=112)
    return DataLoader(examples, batch_size=batch_size, collate_fn=collate)


def make_trainer(*callbacks, **options):
    options = {"max_steps": 2, "num_sanity_val_steps": 0, "enable_checkpointing": False, "logger": False, **options}
    return Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks], **options
    )


class Gradients(Callback):
    """The gradients of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = {name: p.grad.clone() for name, p in trained_parameters(module).items() if p.grad is not None}
        if gradients:
            self.steps.append(gradients)


def gradients_of(module, loss):
    parameters = trained_parameters(module)
    return dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True))


def assert_close(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-5), name


# Hyperparameters


class PassesOn(Idefics2Module):
    def __init__(self, *args, dropped=1, **kwargs):
        super().__init__(*args, **kwargs)


class SavesAgain(Idefics2Module):
    def __init__(self, pretrained, dropped=1, lora=LoRA(r=3), **kwargs):  # noqa: B008
        super().__init__(pretrained, lora=lora, **kwargs)
        self.save_hyperparameters()


@pytest.mark.parametrize("kind", [PassesOn, SavesAgain])
def test_hyperparameters_of_a_subclass_are_saved_and_loaded(tiny, examples, tmp_path, kind):
    module = make_module(tiny, kind, lora=LoRA(r=2, alpha=4), dropped=5)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, loader(tiny, examples))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.hparams == module.hparams == module.hparams_initial
    assert (loaded.hparams.dropped, loaded.hparams.lora["r"], loaded.hparams.lora["alpha"]) == (5, 2, 4)
    assert_close(loaded.state_dict(), module.state_dict())


# Training


class OwnStep(Idefics2Module):
    """The mean over each micro-batch's tokens, averaged by Lightning."""

    def training_step(self, batch, batch_idx):
        loss, tokens = self.loss(batch)
        return loss / tokens


def test_a_training_step_of_its_own_is_averaged_by_lightning(tiny, examples, tmp_path):
    module = make_module(tiny, OwnStep)
    report = Report(EvaluationWriter())
    trainer = make_trainer(found := Gradients(), report, accumulate_grad_batches=2, default_root_dir=tmp_path)
    trainer.fit(module, loader(tiny, examples))
    start = make_module(tiny, OwnStep)
    start.configure_model()
    batches = [*loader(tiny, examples[:2])]
    assert_close(found.steps[0], gradients_of(start, sum(start.training_step(batch, 0) for batch in batches) / 2))


class Regularised(Idefics2Module):
    def regulariser(self):
        return sum(parameter.square().sum() for parameter in trained_parameters(self).values())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.01 * self.regulariser()


def test_what_a_subclass_adds_to_the_loss_is_added_to_the_mean_over_the_steps_tokens(tiny, examples):
    """Though the micro-batches have different numbers of tokens."""

    class Outputs(Callback):
        def __init__(self):
            self.values = []

        def on_train_batch_end(self, trainer, module, outputs, *args):
            self.values.append(outputs["loss"])

    module = make_module(tiny, Regularised)
    trainer = make_trainer(found := Gradients(), outputs := Outputs(), accumulate_grad_batches=2)
    trainer.fit(module, loader(tiny, examples))
    start = make_module(tiny, Regularised)
    start.configure_model()
    losses, tokens = zip(*map(start.loss, loader(tiny, examples[:2])), strict=True)
    assert tokens[0] != tokens[1]
    expected = sum(losses) / sum(tokens) + 0.01 * start.regulariser()
    assert_close(found.steps[0], gradients_of(start, expected))
    # What callbacks get is the mean over the micro-batch, which Lightning divides by the number of micro-batches.
    mean = losses[0] / tokens[0] + 0.01 * start.regulariser()
    assert outputs.values[0].item() == pytest.approx(mean.item() / 2)
    assert trainer.callback_metrics["train/loss"].item() > 0


class Manual(Idefics2Module):
    """Two steps of accumulation, two optimizers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
            for optimizer in self.optimizers():
                optimizer.zero_grad()

    def configure_optimizers(self):
        parameters = trained_parameters(self).values()
        return [torch.optim.SGD(group, lr=self.lr) for group in ([*parameters][::2], [*parameters][1::2])]


class Automatic(Idefics2Module):
    def configure_optimizers(self):
        return torch.optim.SGD(trained_parameters(self).values(), lr=self.lr)


def test_manual_optimization_makes_the_same_steps(tiny, examples):
    manual, automatic = make_module(tiny, Manual), make_module(tiny, Automatic)
    make_trainer(max_steps=4).fit(manual, loader(tiny, examples))
    make_trainer(accumulate_grad_batches=2).fit(automatic, loader(tiny, examples))
    assert_close(manual.state_dict(), automatic.state_dict())
    assert manual.step_loss == automatic.step_loss


class OwnSchedule(Idefics2Module):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(trained_parameters(self).values(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_an_own_optimizer_and_schedule_are_resumed(tiny, examples, tmp_path):
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"max_steps": 4, "max_epochs": 2}
    make_trainer(save, **options, enable_checkpointing=True).fit(
        whole := make_module(tiny, OwnSchedule), loader(tiny, examples[:2])
    )
    resumed = make_module(tiny, OwnSchedule)
    path = tmp_path / "step=2.ckpt"
    make_trainer(**options).fit(resumed, loader(tiny, examples[:2]), ckpt_path=path, weights_only=True)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


class LogsNorms(Idefics2Module):
    """The example of Lightning's documentation."""

    def on_before_optimizer_step(self, optimizer):
        self.log("norm", sum(p.grad.norm() for p in trained_parameters(self).values()))


class OwnBackward(Idefics2Module):
    def backward(self, loss):
        loss.backward()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LogsNorms, "doesn't call super().on_before_optimizer_step(optimizer), which divides"),
        (OwnBackward, "doesn't call super().backward(loss)"),
    ],
)
def test_a_hook_without_super_that_would_change_the_gradients_is_refused(tiny, examples, kind, message):
    with pytest.raises(InputError) as error:
        make_trainer().fit(make_module(tiny, kind), loader(tiny, examples))
    assert message in str(error.value)


# Validation


class OwnHooks(Idefics2Module):
    """Hooks that are empty in Lightning, so that nobody calls super()."""

    def setup(self, stage):
        pass

    def on_fit_start(self):
        pass

    def on_train_batch_start(self, batch, batch_idx):
        pass

    def on_validation_epoch_start(self):
        pass


def test_each_validation_scores_its_own_answers(tiny, examples):
    class Answers(Callback):
        def __init__(self):
            self.values = []

        def on_validation_end(self, trainer, module):
            self.values.append(len(module.answers))

    module = make_module(tiny, OwnHooks)
    val = loader(tiny, examples[:2], train=False)
    make_trainer(answers := Answers(), val_check_interval=1).fit(module, loader(tiny, examples[:2]), val)
    assert answers.values == [2, 2]


def test_a_first_loader_without_questions_adds_no_earlier_answers(tiny, examples):
    module, own, empty = make_module(tiny), loader(tiny, examples[1:], train=False), loader(tiny, [], train=False)
    (expected,) = make_trainer().validate(module, own, verbose=False)
    make_trainer().validate(module, loader(tiny, examples[:1], train=False), verbose=False)
    scores = make_trainer().validate(module, [empty, own], verbose=False)[0]
    assert (len(module.answers), scores["val/loss"]) == (3, expected["val/loss"])


def test_several_loaders_are_scored_together_and_one_by_one(tiny, examples, tmp_path):
    """Though their questions have the same ids and indices, as those of two data modules."""
    module, writer = make_module(tiny), EvaluationWriter()
    loaders = [loader(tiny, part, train=False) for part in (examples[:1], examples[1:])]
    for part in (examples[:1], examples[1:]):
        for index, example in enumerate(part):
            example.index = example.question_id = index
    trainer = make_trainer(writer, default_root_dir=tmp_path)
    (first,) = trainer.validate(module, loaders[0], verbose=False)
    (second,) = trainer.validate(module, loaders[1], verbose=False)
    (both, *_) = trainer.validate(module, loaders, verbose=False)
    assert len(module.answers) == len(writer.answers) == 4
    assert both["val/anls_dataloader_idx_0"] == first["val/anls"]
    assert both["val/anls_dataloader_idx_1"] == second["val/anls"]
    assert both["val/anls"] == pytest.approx((first["val/anls"] + 3 * second["val/anls"]) / 4)
    assert "val/anls_dataloader_idx_0" not in first
    predictions = trainer.predict(module, loaders)
    assert [len(batches) for batches in predictions] == [1, 3]


class TrainsVision(Idefics2Module):
    """Unfreezes a layer of the vision tower, whose features change with each step."""

    def configure_model(self, model=None):
        super().configure_model(model)
        self.model.get_base_model().model.vision_model.encoder.layers[0].requires_grad_(True)


def test_features_of_an_unfrozen_vision_tower_are_not_kept(tiny, examples):
    def train(feature_cache):
        module = make_module(tiny, TrainsVision, feature_cache=feature_cache)
        make_trainer().fit(module, loader(tiny, examples[:1]))
        return module.state_dict()

    expected = train("off")
    with pytest.warns(UserWarning, match=r"model\.feature_cache: the vision tower is trained"):
        weights = train("memory")
    assert any(".vision_model." in name for name in weights)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
