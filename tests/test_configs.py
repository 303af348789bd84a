"""Every shipped config runs, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from stand_ins import KINDS, TILE, build_stand_in

from idefics_lit.model.execution import EXECUTION_OPTIONS
from idefics_lit.training.experiment import flatten

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = {
    "docvqa": ["docvqa.yaml"],
    "image_splitting": ["docvqa.yaml", "image_splitting.yaml"],
    "idefics3": ["docvqa.yaml", "idefics3.yaml"],
    "smolvlm": ["docvqa.yaml", "smolvlm.yaml"],
    "fsdp": ["docvqa.yaml", "fsdp.yaml"],
    "early_stopping": ["docvqa.yaml", "early_stopping.yaml"],
    "quickstart": ["quickstart.yaml"],
}
WITH_SPLITTING = {"image_splitting", *KINDS}
LOGS = {"quickstart": "lightning_logs"}  # where runs log, where it isn't Weights & Biases' project


def test_no_config_is_left_out():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_config_runs_and_goes_on(run, in_effect, tiny, docvqa, name, monkeypatch, end_wandb, capfd, tmp_path):
    """With its own logger: the fit, the same command again, which resumes it, and a fit from its config.yaml."""
    monkeypatch.setenv("WANDB_MODE", "offline" if name == "docvqa" else "disabled")
    # What a CPU, a small model and two minutes ask for; the rest is the config's own.
    model, image_size = (build_stand_in(name, tmp_path / "model"), 2 * TILE) if name in KINDS else (tiny, 112)
    changed = ["--model.pretrained", model, "--data.source", docvqa, "--data.num_workers", 0]
    changed += ["--data.image_size", image_size, "--data.limit_train", 4 if name in WITH_SPLITTING else 16]
    changed += ["--data.limit_val", 2, "--trainer.max_steps", 1, "--trainer.accelerator", "cpu"]
    changed += ["--model.max_new_tokens", 2]
    changed += ["--trainer.val_check_interval" if name == "quickstart" else "--data.val_every_n_steps", 1]
    if name == "fsdp":  # its strategy starts processes, see test_fsdp.py
        changed += ["--trainer.strategy", "auto", "--trainer.devices", 1]
    configs = [argument for file in RUNS[name] for argument in ("--config", CONFIGS / file)]
    folder = run("fit", *configs, *changed)
    end_wandb()
    checkpoints = sorted(folder.rglob("*.ckpt"))
    assert [path.name for path in checkpoints] == ["best.ckpt", "last.ckpt"]
    config = next(folder.rglob("config.yaml"))
    assert config.parent.parent == folder / LOGS.get(name, "lightning_logs/idefics_lit")
    repeated, first = (in_effect("fit", *args) for args in (["--config", config], [*configs, *changed]))
    repeated, first = (flatten(dict(options.as_dict(), config="")) for options in (repeated, first))
    assert not {name for name, value in first.items() if value is not None and repeated.get(name) != value}
    worked_out = {name for name, value in first.items() if value is None and repeated.get(name) is not None}
    execution = {f"model.{name}" for name in (*EXECUTION_OPTIONS, "feature_cache") if first[f"model.{name}"] is None}
    sizes = {"data.batch_size", "data.global_batch_size"}  # the quickstart gives the first, docvqa.yaml the second
    assert execution <= worked_out <= execution | sizes | {"data.image_splitting"}
    saved = yaml.safe_load(config.read_text())
    assert bool(saved["data"]["image_splitting"]) == (name in WITH_SPLITTING)
    assert saved["trainer"]["precision"] == ("bf16-mixed" if name == "fsdp" else "32-true")
    capfd.readouterr()
    run("fit", *configs, *changed, "--trainer.max_steps", 2, "--ckpt_path", "last")
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime_ns).relative_to(folder)
    assert f"last checkpoint: {newest}" in capfd.readouterr().err.splitlines()
    (again,) = {path.parent for path in folder.rglob("*.ckpt")} - {checkpoints[0].parent}
    steps = {torch.load(path, weights_only=True)["global_step"] for path in again.glob("*.ckpt")}
    assert steps == {2} and again.parent.parent == config.parent.parent


@pytest.mark.parametrize(
    ("splits", "options", "validated"),
    [
        (["train"], [], "train"),
        (["train", "test"], [], "train"),
        (["train", "test", "val"], [], "val"),
        (["train", "test", "validation"], [], "validation"),
        (["train", "test"], ["--data.val_split", "test"], "test"),
    ],
)
def test_ones_own_data_are_validated_on_no_test_split_unasked(run, tiny, tmp_path, capfd, splits, options, validated):
    """With the config that docs/data.md names for it; validated on held-out pages or a separate split."""
    for split in splits:
        (tmp_path / "pages").mkdir(exist_ok=True)
        for page in range(4):
            Image.new("L", (40, 30), page).save(tmp_path / "pages" / f"{split}{page}.png")
        rows = "".join(f"{split} {page}?,{split}{page}.png,a\n" for page in range(4))
        (tmp_path / "pages" / f"{split}.csv").write_text(f"question,image,answer\n{rows}")
    flags = ["--config", CONFIGS / "docvqa.yaml", "--model.pretrained", tiny, "--data.source", tmp_path / "pages"]
    flags += ["--data.num_workers", 0, "--trainer.accelerator", "cpu"]
    run("check", *flags, "--trainer.logger", "false", *options)
    screen = capfd.readouterr().out
    counts = (3, 1) if validated == "train" else (4, 4)
    assert re.search(rf"^questions +{counts[0]} +{counts[1]} *$", screen, flags=re.MULTILINE)
    shown = screen.partition("validation questions, as")[2]
    assert {*re.findall(r"(\w+) \d\?", shown)} == {validated}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_says_how_it_is_run(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# python -m idefics_lit fit --config configs/")
    assert f"configs/{path.name}" in lines[0]
