"""Early stopping and sweeps, as their pages say."""

import csv
import queue
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(tiny, docvqa):
    """What makes a fit of docvqa.yaml small: a step a batch and a validation a step, which scores 0."""
    flags = ["--model.pretrained", tiny, "--data.source", str(docvqa)]
    flags += ["--data.num_workers", "0", "--data.image_size", "112", "--data.limit_val", "1"]
    flags += ["--model.max_new_tokens", "1", "--model.quantization", "none", "--data.val_every_n_steps", "1"]
    flags += ["--trainer.num_sanity_val_steps", "0"]
    return [*flags, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]


@pytest.fixture
def stopping(small):
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", ".", "--trainer.logger.name", "logs"]
    configs = [f"--config={ROOT / 'configs' / name}.yaml" for name in ("docvqa", "early_stopping")]
    return ["fit", *configs, *small, *logger]


def validations(folder):
    return [row["val/anls"] for row in csv.DictReader((folder / "metrics.csv").open()) if row["val/anls"]]


def test_a_fit_stops_behind_three_validations_that_bring_nothing(run, stopping, caplog):
    folder = run(*stopping) / "logs" / "version_0"
    assert len(validations(folder)) == 1 + 3
    assert (folder / "val_predictions.jsonl").exists() and (folder / "config.yaml").exists()  # our own callbacks ran
    assert {path.name for path in folder.rglob("*.ckpt")} == {"best.ckpt", "last.ckpt"}
    assert "did not improve in the last 3 records" in caplog.text


def test_a_resumed_fit_goes_on_counting(run, stopping):
    each = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename={step}"]
    folder = run(*stopping, *each, "--trainer.max_steps", 2) / "logs"
    assert len(validations(folder / "version_0")) == 2
    run(*stopping, "--ckpt_path", next(folder.rglob("step=2.ckpt")))
    assert len(validations(folder / "version_1")) == 2


def test_a_sweeps_agent_starts_a_fit_with_its_parameters(run, small, tmp_path, monkeypatch, end_wandb):
    """The agent's own code, with a trial as the server sends it, up to the start of the process."""
    from wandb import wandb_agent
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    sweep = load_sweep_config(str(ROOT / "configs" / "sweeps" / "docvqa.yaml"))
    values = {"model.lr": 0.0002, "model.lora.r": 4, "model.lora.dropout": 0.05, "model.weight_decay": 0.1}
    assert values.keys() == sweep["parameters"].keys()
    for name, parameter in sweep["parameters"].items():
        assert values[name] in parameter.get("values", [values[name]])
        assert parameter.get("min", 0) <= values[name] <= parameter.get("max", 9)

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, value in {"MODE": "offline", "SWEEP_ID": "sweep1", "RUN_ID": "", "SWEEP_PARAM_PATH": ""}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)  # the agent sets the last two
    started = []
    monkeypatch.setattr(wandb_agent, "AgentProcess", lambda **process: started.append(process) or Mock())
    agent = wandb_agent.Agent(api=None, queue=queue.Queue(), sweep_id="sweep1")
    agent._sweep_command = sweep["command"]
    trial = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": "trial1", "program": sweep["program"], "args": trial})
    command = started[0]["command"]
    assert command[:4] == ["/usr/bin/env", "python", "-m", "idefics_lit"]

    folder = run(*command[4:], *small, "--trainer.max_steps=1") / "lightning_logs"
    end_wandb()
    saved = yaml.safe_load((folder / "idefics_lit" / "trial1" / "config.yaml").read_text())
    assert (saved["model"]["lr"], saved["model"]["lora"]["r"], saved["model"]["weight_decay"]) == (0.0002, 4, 0.1)
    logged = next(folder.glob("wandb/offline-run-*-trial1/*.wandb")).read_bytes()
    assert b"sweep1" in logged and sweep["metric"]["name"].encode() in logged
