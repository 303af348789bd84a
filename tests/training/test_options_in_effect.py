"""The options that a run leaves open: what is chosen, tried, printed, saved and resumed."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback, Trainer

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.errors import InputError
from idefics_lit.model.execution import Device
from idefics_lit.model.loading import LoRA
from idefics_lit.model.memory import count_weights
from idefics_lit.training.module import Idefics2Module
from idefics_lit.training.options_in_effect import find_batch_size, options_in_effect

ROOT = Path(__file__).parents[2]
CPU = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
CARD = Device("NVIDIA A card", "cuda", 79, 500)


class SmallMemory(Idefics2Module):
    """A module on a device whose memory suffices for ``largest`` questions; its fit tries its batches as on a GPU."""

    largest = 5  # questions; a batch of 4 is tried with more rows than it has questions for

    def loss(self, batch):
        if len(batch.question_ids) > self.largest:
            raise torch.OutOfMemoryError
        return super().loss(batch)

    def on_fit_start(self):
        super().on_fit_start()
        find_batch_size(self, self.trainer)


@pytest.fixture
def data(docvqa, tiny):
    def data(**options):
        small = {"image_size": 112, "num_workers": 0, "limit_val": 1, **options}
        return DocVQADataModule(str(docvqa), tiny, **small)

    return data


@pytest.fixture
def module(tiny):
    return lambda kind=Idefics2Module, **options: kind(
        tiny, quantization="none", lora=LoRA(dropout=0.0), warmup_steps=0, max_new_tokens=2, **options
    )


def test_a_batch_that_does_not_fit_is_halved_before_the_first_step(module, data, caplog):
    trainer, pages = Trainer(**CPU, max_steps=1, limit_val_batches=0), data(val_every_n_steps=1)
    sizes = []
    pages.on_before_batch_transfer = lambda batch, _: sizes.append(len(batch.question_ids)) or batch
    ours = module(SmallMemory)
    trainer.fit(ours, pages)
    assert trainer.global_step == 1 and sizes == [4, 4, 4, 4]
    (line,) = (
        r.message
        for r in caplog.records
        if "may not fit" in r.message and "from now on" in r.message and " 4," in r.message
    )
    assert "data.batch_size 4, trainer.accumulate_grad_batches 4" in line


def test_the_trial_changes_no_run(module, data):
    """Neither the adapter nor the numbers drawn: a fit with it ends as one without."""
    adapters = []
    for kind in (Idefics2Module, SmallMemory):
        torch.manual_seed(0)
        ours = module(kind)
        ours.largest = 16
        Trainer(**CPU, max_steps=2, limit_val_batches=0).fit(ours, data())
        adapters.append((ours.state_dict(), torch.rand(1)))
    assert adapters[0][1] == adapters[1][1]
    for name, value in adapters[0][0].items():
        assert torch.equal(value, adapters[1][0][name]), name


def test_nothing_fits(module, data):
    ours = module(SmallMemory)
    ours.largest = 0
    with pytest.raises(InputError, match=r"a batch of one question: give --model\.gradient_checkpointing true"):
        Trainer(**CPU, max_steps=1, limit_val_batches=0).fit(ours, data())


def test_a_given_batch_size_is_warned_of_kept_and_computed_in_parts(module, data):
    trainer, ours = Trainer(**CPU, max_steps=1, limit_val_batches=0), module(SmallMemory)
    with pytest.warns(UserWarning) as warned:
        trainer.fit(ours, data(batch_size=8))
    lines = [str(line.message) for line in warned]
    assert any("data.batch_size 8 may not fit" in line and "leave it" in line for line in lines)
    assert any("computed in parts of" in line for line in lines)
    assert trainer.global_step == 1 and trainer.train_dataloader.batch_size == 8


@pytest.mark.parametrize(
    ("max_steps", "ram", "gigabytes", "options", "expected"),
    [
        (4, 500, 20, {}, "memory"),  # 64 of 24 questions
        (1, 500, 20, {"questions_per_page": 8}, "off"),  # no page twice
        (1, 500, 20, {"questions_per_page": 1}, "memory"),  # each question reads its page
        (4, 1e-4, 20, {}, "off"),
        (4, 500, 1e-6, {}, "off"),
    ],
)
def test_features_are_cached_where_pages_recur_and_memory_allows(
    module, data, max_steps, ram, gigabytes, options, expected
):
    pages = data(**options)
    pages.trainer = trainer = Trainer(**CPU, max_steps=max_steps)
    pages.setup("fit")
    given = module(feature_cache_gb=gigabytes).hparams
    found = options_in_effect(given, [CARD._replace(ram_gib=ram), CARD], "bf16-mixed", trainer, pages)
    assert found.feature_cache == expected
    assert (
        options_in_effect({**given, "feature_cache": "off"}, [CARD], "bf16-mixed", trainer, pages).feature_cache
        == "off"
    )


@pytest.mark.parametrize(
    ("limits", "options", "compiled"),
    [
        ({"max_steps": 149}, {}, False),
        ({"max_steps": 150}, {}, True),
        ({"max_epochs": 90}, {}, False),  # 24 questions, 16 a step: 135 steps
        ({"max_epochs": 110}, {}, True),
        ({"max_epochs": 110, "max_steps": 149}, {}, False),
        ({"max_epochs": 90}, {"global_batch_size": 8}, True),
        ({"max_epochs": -1}, {}, True),
    ],
)
def test_long_fits_are_compiled(module, data, limits, options, compiled):
    pages = data(**options)
    pages.trainer = trainer = Trainer(**CPU, **limits)
    pages.setup("fit")
    assert options_in_effect(module().hparams, [CARD], "bf16-mixed", trainer, pages).compile == compiled


def test_the_smallest_device_decides_and_a_module_alone_has_no_graphs(module):
    given = module(feature_cache=None).hparams
    trainer = Trainer(**CPU, max_steps=1)
    assert options_in_effect(given, [CARD, CARD], "bf16-mixed", trainer).cuda_graphs
    assert not options_in_effect(given, [CARD, CARD._replace(gib=0.001)], "bf16-mixed", trainer).cuda_graphs
    alone = options_in_effect(given, [CARD], "bf16-mixed")
    assert not alone.cuda_graphs and not alone.compile
    assert options_in_effect({**given, "cuda_graphs": True}, [CARD], "bf16-mixed").cuda_graphs


def test_weights_are_counted_only_where_something_depends_on_their_number(module, data, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "idefics_lit.training.options_in_effect.count_weights", lambda *args: calls.append(args) or count_weights(*args)
    )
    given, trainer, pages = module().hparams, Trainer(**CPU, max_steps=1), data()
    cpu = Device("CPU", "cpu", 16, 16)
    evaluation = options_in_effect(given, [cpu], "32-true", trainer)
    assert not calls and not evaluation.gradient_checkpointing
    pages.trainer = trainer
    pages.setup("fit")
    chosen = options_in_effect(given, [cpu], "32-true", trainer, pages)
    assert len(calls) == 1
    again = data(batch_size=pages.batch_size)  # as in a run's config.yaml
    again.trainer = trainer
    again.setup("fit")
    assert options_in_effect(chosen, [CARD], "bf16-mixed", trainer, again) == chosen
    assert len(calls) == 1
    assert options_in_effect(given, [CARD], "bf16-mixed", trainer).cuda_graphs and len(calls) == 2


def test_the_plain_command_chooses_prints_and_saves(run, tiny, docvqa, caplog, monkeypatch, in_effect):
    """docvqa.yaml alone: 16 examples a step, and a config.yaml that repeats the run."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    flags = ["fit", "--config", ROOT / "configs" / "docvqa.yaml", "--model.pretrained", tiny, "--data.source", docvqa]
    flags += ["--data.image_size", 112, "--data.limit_train", 20, "--data.limit_val", 1, "--data.num_workers", 0]
    flags += ["--model.max_new_tokens", 2, "--trainer.max_steps", 3, "--data.val_every_n_steps", 2]
    flags += ["--trainer.accelerator", "cpu", "--trainer.num_sanity_val_steps", 0]
    folder = run(*flags)
    (line,) = (message for message in caplog.messages if "can be given as a flag" in message)
    expected = ("CPU, ", "trainer.precision 32-true, data.batch_size 16, trainer.accumulate_grad_batches 1, ")
    assert all(text in line for text in (*expected, "model.dequantize false", "model.feature_cache memory"))
    config = next(folder.rglob("config.yaml"))
    saved = yaml.safe_load(config.read_text())
    assert (saved["data"]["batch_size"], saved["data"]["global_batch_size"]) == (16, 16)
    assert saved["trainer"]["precision"] == "32-true" and saved["model"]["cuda_graphs"] is False
    assert saved["model"]["feature_cache"] == "memory"
    checkpoint = torch.load(next(folder.rglob("last.ckpt")), weights_only=True)
    assert checkpoint["global_step"] == 3  # the last one, although the last validation was after two
    assert checkpoint["hyper_parameters"]["dequantize"] is None  # chosen again on another card
    assert checkpoint["DocVQADataModule"]["batch_size"] == 16
    assert in_effect("fit", "--config", config).data.batch_size == 16
    run("fit", "--config", config)
    again = torch.load(max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns), weights_only=True)
    assert all(torch.equal(value, again["state_dict"][name]) for name, value in checkpoint["state_dict"].items())
    best = [path for path in folder.rglob("best.ckpt")]
    assert {torch.load(path, weights_only=True)["global_step"] for path in best} == {2}  # every two steps


def test_sizes_that_do_not_multiply_are_one_line(run, tiny, docvqa, capfd):
    with pytest.raises(SystemExit, match="2"):
        run(
            *("fit", "--config", ROOT / "configs" / "docvqa.yaml", "--model.pretrained", tiny),
            *("--data.source", docvqa, "--data.batch_size", 3, "--trainer.logger", "false"),
        )
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: data.global_batch_size 16 isn't data.batch_size 3 x trainer.accumulate_grad_batches 1"
    )


@pytest.mark.parametrize(("batch_size", "accumulated"), [(4, 1), (2, 2), (1, 4)])
def test_a_fit_validates_after_the_same_steps_whatever_the_batch_size(module, data, batch_size, accumulated):
    """Also where an epoch ends with an incomplete step: its ten questions are steps of 4, 4 and 2."""
    steps = []

    class Steps(Callback):
        def on_validation_start(self, trainer, module):
            steps.append(trainer.global_step)

    trainer = Trainer(
        **CPU, max_steps=9, accumulate_grad_batches=accumulated, num_sanity_val_steps=0, callbacks=Steps()
    )
    trainer.fit(module(), data(batch_size=batch_size, limit_train=10, val_every_n_steps=2))
    assert steps == [2, 4, 6, 8]
