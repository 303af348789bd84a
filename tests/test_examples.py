"""The programs in examples/ run as their docstrings say, and use only the public API."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import idefics_lit

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*args, folder):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Tip:" not in done.stderr and "LeafSpec" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_only_the_public_api_is_used(name):
    code = (EXAMPLES / name).read_text()
    imported = re.findall(r"^(?:from|import) (idefics_lit\S*) ?(?:import (.*))?$", code, flags=re.MULTILINE)
    assert imported
    for module, names in imported:
        assert module == "idefics_lit"
        assert {*names.split(", ")} <= {*idefics_lit.__all__}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_trainer.py", "lora_plus_ema.py"])
def test_training_programs(name, tmp_path, tiny):
    printed = run(EXAMPLES / name, tiny, folder=tmp_path)
    first, second = re.search(r"^ANLS ([\d.]+), [^\d]* ([\d.]+)", printed, flags=re.MULTILINE).groups()
    assert first == second
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert checkpoint.stat().st_size < 5e6  # the adapter and its optimizer, without the base


@pytest.mark.slow
def test_own_command_line(tmp_path, tiny):
    for name in ("Ann", "Bob", "Cleo", "Dora"):
        page = Image.new("RGB", (448, 336), "white")
        ImageDraw.Draw(page).text((40, 40), f"Name {name}", fill="black", font_size=24)
        page.save(tmp_path / f"{name}.png")
    options = ["--data.folder", ".", "--model.pretrained", tiny, "--trainer.accelerator", "cpu"]
    options += ["--model.max_new_tokens", 4, "--trainer.precision", "32-true"]
    train = ["--trainer.max_epochs", 1, "--model.lora.alpha", 16, "--model.warmup_steps", 0]
    fitted = run(EXAMPLES / "own_cli.py", "fit", *options, *train, folder=tmp_path)
    assert "train/loss" in fitted
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    printed = run(EXAMPLES / "own_cli.py", "validate", *options, "--ckpt_path", checkpoint, folder=tmp_path)
    assert re.search(r"val/anls\W+\d\.\d", printed)
