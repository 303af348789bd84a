"""The frozen base in shards: two processes, as a user starts them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch.distributed.tensor import DTensor

TESTS = Path(__file__).parent
CONFIGS = TESTS.parents[1] / "configs"


class Shares(Callback):
    """Write what a rank holds of the text model's layers, and of how much, in training and in validation."""

    def __init__(self):
        self.held = {}

    def hold(self, stage, module):
        layers = module.model.get_base_model().model.text_model.layers
        weights = [p for p in layers.parameters() if not p.requires_grad]
        own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in weights)
        self.held[stage] = (own, sum(p.numel() for p in weights))

    def on_train_batch_end(self, trainer, module, *_):
        self.hold("train", module)

    def on_validation_batch_end(self, trainer, module, *_):
        self.hold("validation", module)

    def on_fit_end(self, trainer, module):
        Path(f"shares_{trainer.global_rank}.json").write_text(json.dumps(self.held))


def command(name, tiny, *args):
    """What a user types, for a small model and pages drawn here."""
    flags = f"""{name} --config {CONFIGS}/docvqa.yaml --config {CONFIGS}/fsdp.yaml --model.pretrained {tiny}
        --data.source synthetic --data.image_size 112 --data.limit_train 8 --data.limit_val 6
        --data.num_workers 0 --data.batch_size 2 --model.lr 1e-4 --model.warmup_steps 0 --model.max_new_tokens 4
        --model.lora.dropout 0 --trainer.accelerator cpu --trainer.precision 32-true
        --data.val_every_n_steps 2 --data.global_batch_size 4 --trainer.max_steps 4 --trainer.enable_progress_bar false
        --trainer.logger CSVLogger --trainer.logger.save_dir .""".split()
    return [*flags, *map(str, args)]


def save_every_second_step():
    callback = "--trainer.callbacks"
    return [f"{callback}+=ModelCheckpoint", f"{callback}.save_top_k", -1, f"{callback}.every_n_train_steps", 2]


def fit_in_two_processes(folder, tiny, *args):
    folder.mkdir()
    options = ["--trainer.devices", 2, *save_every_second_step(), "--trainer.callbacks+=test_fsdp.Shares", *args]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    typed = [sys.executable, "-m", "idefics_lit", *command("fit", tiny, *options)]
    done = subprocess.run(typed, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def newest(folder, pattern):
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)


def val_loss(folder):
    rows = csv.DictReader(newest(folder, "metrics.csv").open())
    return [float(row["val/loss"]) for row in rows if row["val/loss"]][-1]


def assert_same(path, other):
    """The same adapter, moments and options."""
    ours, theirs = (torch.load(file, weights_only=True) for file in (path, other))
    assert ours.keys() == theirs.keys() and ours["hyper_parameters"] == theirs["hyper_parameters"]
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert all("lora_" in name for name in ours["state_dict"])
    for name, value in ours["state_dict"].items():
        assert torch.allclose(value, theirs["state_dict"][name], atol=1e-5), name
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (ours, theirs)]
    for number, state in states[0].items():
        assert torch.allclose(state["exp_avg"], states[1][number]["exp_avg"], atol=1e-7), number


@pytest.mark.long
def test_two_shards_train_and_resume_as_one_model(run, tmp_path, tiny):
    """The checkpoints are the same, and resume with and without sharding."""
    alone = ["--trainer.devices", 1, "--trainer.strategy", "auto", "--data.batch_size", 4]
    more = save_every_second_step()
    two, one = tmp_path / "two", tmp_path / "one"
    fit_in_two_processes(two, tiny)
    run(*command("fit", tiny, *alone, *more, "--trainer.logger.save_dir", one))
    middle, end = ([newest(folder, f"*step={step}.ckpt") for folder in (two, one)] for step in (2, 4))
    assert_same(*middle)
    assert_same(*end)
    assert val_loss(two) == pytest.approx(val_loss(one), abs=1e-5)
    for rank in (0, 1):
        held = json.loads((two / f"shares_{rank}.json").read_text())
        (share, all_of_them), (whole, _) = held["train"], held["validation"]
        assert 0.45 < share / all_of_them < 0.55 and whole == all_of_them

    run(*command("validate", tiny, *alone, "--ckpt_path", end[0]))
    assert val_loss(tmp_path) == pytest.approx(val_loss(one), abs=1e-5)

    resumed = tmp_path / "resumed"
    fit_in_two_processes(resumed, tiny, "--ckpt_path", middle[1])
    assert_same(newest(resumed, "*step=4.ckpt"), end[0])
    run(*command("fit", tiny, *alone, *more, "--ckpt_path", middle[0], "--trainer.logger.save_dir", resumed))
    assert_same(newest(resumed, "*step=4.ckpt"), end[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.quantization", "nf4"], "give --model.quantization none"),
        (["--model.cuda_graphs", "true"], "cuda_graphs"),
    ],
)
def test_what_cant_be_sharded_is_refused(run, tiny, flags, message, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")  # as a launcher does: no other process is started
    with pytest.raises(SystemExit) as stopped:
        run(*command("fit", tiny, "--trainer.devices", 1, *flags))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
