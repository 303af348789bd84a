"""docs/lightning.md lists every feature of the installed Lightning, and each works or is refused as it says.

The runs share a module, which is loaded once. Each takes two steps of two questions.
"""

import inspect
import re
from pathlib import Path

import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    ProgressBar,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from idefics_lit import DocVQADataModule, Idefics2Module, InputError
from idefics_lit.training.unsupported import check_supported

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "lightning.md").read_text()
# Features with tests of their own: which tests name them.
TESTED_IN = {
    **dict.fromkeys(("ddp_spawn", "ddp_fork", "ddp_notebook"), "training/test_strategies.py"),
    **dict.fromkeys(("LearningRateFinder", "BatchSizeFinder"), "training/test_tuner.py"),
    "WandbLogger": "reporting/test_report.py",
    **dict.fromkeys(("CometLogger", "MLFlowLogger"), "reporting/test_logger_media.py"),
}


def rows(section):
    """Return the rows of a section's table, (works, note) by feature."""
    table = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return {
        name: (works, note) for name, works, note in re.findall(r"^\| `(\w+)` \| ([\w ]+) \| ?(.*?) ?\|$", table, re.M)
    }


def public(package):
    """Return the classes that a package of Lightning exports."""
    return {name for name in package.__all__ if inspect.isclass(getattr(package, name))}


def test_no_feature_is_missing():
    assert {*rows("Options of the Trainer")} == {*inspect.signature(Trainer).parameters}
    assert {*rows("Strategies")} == {*StrategyRegistry.available_strategies()}
    assert {*rows("Callbacks")} == public(lightning.pytorch.callbacks)
    assert {*rows("Loggers")} == public(lightning.pytorch.loggers)


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        pl_module.configure_model()

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


class Writer(BasePredictionWriter):
    def write_on_batch_end(self, trainer, pl_module, prediction, *_):
        self.written = prediction


class SaveAtEnd(Checkpoint):
    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint("end.ckpt")


class Bar(ProgressBar):
    def disable(self):
        pass


class MetricNames(Logger):
    """A logger of a user's own."""

    def __init__(self):
        super().__init__()
        self.names, self.hyperparameters = set(), {}

    name, version = "mine", 0

    def log_metrics(self, metrics, step=None):
        assert all(isinstance(value, (int, float)) for value in metrics.values())
        self.names |= {*metrics}

    def log_hyperparams(self, params, *args):
        self.hyperparameters.update(params)


def run(name, features, check=None, **options):
    return pytest.param(features.split(), check, options, id=name)


def has_scores(trainer):
    assert trainer.logged_metrics["val/anls"] >= 0 and trainer.logged_metrics["train/loss"] > 0


def logs(trainer):
    names = trainer.loggers[-1].names
    assert {"train/loss", "lr", "val/loss", "val/anls", "val/anls_form"} <= names
    # MLflow's file store: characters, and no metric is the folder of another.
    assert not [name for name in names if re.search("[^a-zA-Z0-9_/. -]", name)]
    assert not [name for name in names for other in names if other.startswith(f"{name}/")]
    assert trainer.loggers[-1].hyperparameters["lora"]["r"] == 8
    assert "val/anls" in (Path(trainer.loggers[0].log_dir) / "metrics.csv").read_text()


RUNS = [
    run("loops", "accelerator devices num_nodes strategy single_device precision logger callbacks max_epochs min_epochs"
        " limit_train_batches limit_val_batches limit_test_batches limit_predict_batches num_sanity_val_steps"
        " enable_checkpointing enable_progress_bar enable_model_summary default_root_dir",
        devices=1, num_nodes=1, strategy="single_device", callbacks=[], max_steps=-1, max_epochs=1, min_epochs=1,
        limit_train_batches=2, limit_val_batches=1, limit_test_batches=1, limit_predict_batches=1,
        num_sanity_val_steps=1, enable_checkpointing=True, enable_progress_bar=True, enable_model_summary=True),
    run("steps", "max_steps min_steps accumulate_grad_batches gradient_clip_val gradient_clip_algorithm"
        " val_check_interval check_val_every_n_epoch log_every_n_steps enable_autolog_hparams model_registry",
        has_scores, min_steps=1, accumulate_grad_batches=2, gradient_clip_val=0.5, gradient_clip_algorithm="value",
        val_check_interval=2, check_val_every_n_epoch=None, log_every_n_steps=1, enable_autolog_hparams=False,
        model_registry="owner/name"),
    run("debugging", "deterministic benchmark detect_anomaly profiler inference_mode use_distributed_sampler max_time"
        " reload_dataloaders_every_n_epochs sync_batchnorm plugins",
        precision="bf16-mixed", deterministic=True, benchmark=False, detect_anomaly=True, profiler="simple",
        inference_mode=False, use_distributed_sampler=False, max_time={"minutes": 5}, sync_batchnorm=True,
        reload_dataloaders_every_n_epochs=1, plugins=AsyncCheckpointIO(), enable_checkpointing=True),
    run("fast_dev_run", "fast_dev_run", fast_dev_run=2),
    run("overfit_batches", "overfit_batches", overfit_batches=1),
    run("barebones", "barebones", barebones=True, logger=None, enable_checkpointing=None, enable_progress_bar=None,
        enable_model_summary=None),
    run("ddp", "ddp", devices=1, strategy="ddp"),
    run("ddp_find_unused_parameters_true", "ddp_find_unused_parameters_true ddp_find_unused_parameters_false",
        devices=1, strategy="ddp_find_unused_parameters_true"),
    run("callbacks", "BaseFinetuning BasePredictionWriter Callback Checkpoint DeviceStatsMonitor EarlyStopping"
        " LambdaCallback LearningRateMonitor ModelCheckpoint OnExceptionCheckpoint SpikeDetection ThroughputMonitor"
        " Timer RichModelSummary RichProgressBar", has_scores,
        logger=True, log_every_n_steps=1, val_check_interval=2, enable_checkpointing=True, enable_progress_bar=True,
        enable_model_summary=True, callbacks=[
            Finetuning(), Writer(), Callback(), SaveAtEnd(), DeviceStatsMonitor(cpu_stats=True),
            EarlyStopping("val/loss"), LambdaCallback(), LearningRateMonitor(), ModelCheckpoint(monitor="val/anls"),
            OnExceptionCheckpoint("."), SpikeDetection(), ThroughputMonitor(lambda batch: len(batch.question_ids)),
            Timer("00:00:05:00"), RichModelSummary(), RichProgressBar()]),
    run("other bars", "ModelSummary ProgressBar GradientAccumulationScheduler", enable_progress_bar=True,
        enable_model_summary=True, callbacks=[ModelSummary(2), Bar(), GradientAccumulationScheduler({0: 2})]),
    run("tqdm", "TQDMProgressBar StochasticWeightAveraging", enable_progress_bar=True, max_steps=-1, max_epochs=2,
        limit_train_batches=1, callbacks=[TQDMProgressBar(), StochasticWeightAveraging(1e-3, swa_epoch_start=1)]),
    run("averages", "WeightAveraging", callbacks=[WeightAveraging()]),
    run("exponential averages", "EMAWeightAveraging", callbacks=[EMAWeightAveraging(decay=0.5)]),
    run("loggers", "CSVLogger TensorBoardLogger Logger", logs, log_every_n_steps=1, val_check_interval=2,
        logger=lambda: [CSVLogger("."), TensorBoardLogger("."), MetricNames()]),
]  # fmt: skip


@pytest.fixture(scope="module")
def module(tiny):
    return Idefics2Module(tiny, quantization="none", lr=1e-3, warmup_steps=0, max_new_tokens=2)


@pytest.fixture(scope="module")
def data(tiny):
    options = {"image_size": 112, "batch_size": 2, "num_workers": 0}
    return DocVQADataModule(
        "synthetic:form", tiny, limit_train=8, limit_val=2, limit_test=2, test_split="validation", **options
    )


def quiet(options):
    """Return a Trainer's options, by default without files and bars."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "max_steps": 2, **off, **options}
    if callable(options["logger"]):
        options["logger"] = options["logger"]()
    return options


@pytest.mark.parametrize(("features", "check", "options"), RUNS)
def test_features(features, check, options, module, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if module.attached_trainer is None:
        module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = Trainer(**quiet(options))
    trainer.fit(module, data)
    assert trainer.global_step == 2 and module.step_loss.isfinite()
    after = module.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert all(value.isfinite().all() for value in after.values())
    if check:
        check(trainer)
    if "limit_test_batches" in features:
        assert "val/anls" in trainer.validate(module, data, verbose=False)[0]
        assert "test/anls" in trainer.test(module, data, verbose=False)[0]
        assert len(trainer.predict(module, data)[0]) == 2


def test_every_feature_that_works_is_run():
    ran = {feature for run in RUNS for feature in run.values[0]}
    for section in ("Options of the Trainer", "Strategies", "Callbacks", "Loggers"):
        for name, (works, note) in rows(section).items():
            assert works in ("yes", "no", "not tried")
            if works == "yes" and name not in ran and not note.startswith("as `"):
                where = ROOT / "tests" / TESTED_IN[name]
                assert name in where.read_text(), name


@pytest.mark.parametrize("callback", [BackboneFinetuning(), ModelPruning("l1_unstructured")])
def test_callbacks_that_cant_work_are_refused(callback, module, data):
    _, note = rows("Callbacks")[type(callback).__name__]
    with pytest.raises(InputError, match=re.escape(f"trainer.callbacks {type(callback).__name__} {note}")):
        Trainer(**quiet({"callbacks": [callback]})).fit(module, data)


class Stub:
    """The attributes of a Trainer whose strategy needs a GPU or a package that isn't installed."""

    def __init__(self, kind):
        self.strategy, self.callbacks = kind.__new__(kind), []


@pytest.mark.parametrize("name", [name for name, (works, _) in rows("Strategies").items() if works == "no"])
def test_strategies_that_cant_work_are_refused(name):
    kind = StrategyRegistry[name]["strategy"]
    _, note = rows("Strategies")[name]
    if same := re.fullmatch(r"as `(\w+)`", note):
        _, note = rows("Strategies")[same[1]]
    with pytest.raises(InputError, match=f"^trainer.strategy {kind.__name__} {re.escape(note)}$"):
        check_supported(Stub(kind))


def test_lightnings_own_fsdp2_is_refused():
    with pytest.raises(InputError, match=r"^trainer.strategy ModelParallelStrategy shards the trained"):
        check_supported(Stub(ModelParallelStrategy))
