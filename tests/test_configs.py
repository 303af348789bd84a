"""Every shipped config runs, on a tiny model."""

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = {  # the files, and the batches of an optimizer step
    "docvqa": (["docvqa.yaml"], 8),
    "image_splitting": (["docvqa.yaml", "image_splitting.yaml"], 8),
    "gpu_15gb": (["docvqa.yaml", "gpu_15gb.yaml"], 2),
    "gpu_80gb": (["docvqa.yaml", "gpu_80gb.yaml"], 1),
    "fsdp": (["docvqa.yaml", "fsdp.yaml"], 1),
    "early_stopping": (["docvqa.yaml", "early_stopping.yaml"], 8),
    "quickstart": (["quickstart.yaml"], 1),
}


def test_no_config_is_left_out():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_config_runs(run, tiny, docvqa, name, monkeypatch, end_wandb):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    files, batches = RUNS[name]
    # What a CPU, a small model and two minutes ask for; the rest is the config's own.
    changed = ["--model.pretrained", tiny, "--data.source", docvqa, "--data.num_workers", 0]
    changed += ["--data.image_size", 112, "--data.limit_train", 16, "--trainer.val_check_interval", batches]
    changed += ["--trainer.max_steps", 1, "--trainer.accelerator", "cpu"]
    changed += ["--model.max_new_tokens", 2]
    if name in ("docvqa", "image_splitting", "gpu_15gb", "early_stopping"):  # a CPU has no 16-mixed
        changed += ["--trainer.precision", "32-true"]
    if name == "fsdp":  # its strategy takes processes of its own, in test_sharding.py
        changed += ["--trainer.strategy", "auto", "--trainer.devices", 1]
    configs = [argument for file in files for argument in ("--config", CONFIGS / file)]
    folder = run("fit", *configs, *changed)
    assert {path.name for path in folder.rglob("*.ckpt")} == {"best.ckpt", "last.ckpt"}
    saved = yaml.safe_load(next(folder.rglob("config.yaml")).read_text())
    assert saved["data"]["image_splitting"] == (name == "image_splitting")
    assert saved["trainer"]["precision"] == ("bf16-mixed" if name in ("gpu_80gb", "fsdp") else "32-true")


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
    """With the config that docs/data.md names for them: on pages held out, or a split of its own."""
    for split in splits:
        (tmp_path / "pages").mkdir(exist_ok=True)
        for page in range(4):
            Image.new("L", (40, 30), page).save(tmp_path / "pages" / f"{split}{page}.png")
        rows = "".join(f"{split} {page}?,{split}{page}.png,a\n" for page in range(4))
        (tmp_path / "pages" / f"{split}.csv").write_text(f"question,image,answer\n{rows}")
    flags = ["--config", CONFIGS / "docvqa.yaml", "--model.pretrained", tiny, "--data.source", tmp_path / "pages"]
    flags += ["--data.num_workers", 0, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
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
