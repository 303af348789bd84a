"""What is loaded runs no code, and is what the checkpoint was made with."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from idefics_lit.tiny import build_tiny


class RunsCode:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("code-ran",)


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model's folder, to be tampered with."""
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


def fails(run, capfd, *args):
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2
    return capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_that_is_a_pickle(run, short_fit, model, capfd, tmp_path, name):
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": RunsCode()}, model / name)
    error = fails(run, capfd, *short_fit("--model.pretrained", model))
    assert error.startswith(f"error: model.pretrained '{model}': no model can be loaded (")
    assert not (tmp_path / "code-ran").exists()


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
def test_a_model_with_code_of_its_own(run, short_fit, model, capfd, tmp_path, file):
    """Its classes are transformers', whatever it says; of another type it is refused."""
    (model / "evil.py").write_text("import os\nos.mkdir('code-ran')\nEvil = dict\n")
    written = json.loads((model / file).read_text())
    mapped = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")}
    (model / file).write_text(json.dumps({**written, "auto_map": mapped}))
    run(*short_fit("--model.pretrained", model, "--trainer.max_steps", 1))
    assert not (tmp_path / "code-ran").exists()
    if file == "config.json":
        (model / file).write_text(json.dumps({**written, "model_type": "evil", "auto_map": mapped}))
        error = fails(run, capfd, *short_fit("--model.pretrained", model))
        assert error.startswith(f"error: model.pretrained '{model}': no model can be loaded (")
        assert not (tmp_path / "code-ran").exists()


@pytest.fixture
def checkpoint(run, short_fit):
    folder = run(*short_fit("--trainer.max_steps", 2, "--data.prompt_style", "idefics"))
    return next(folder.rglob("*.ckpt"))


def test_another_base_model_is_refused_and_the_same_elsewhere_is_not(run, checkpoint, model, capfd, tmp_path):
    run("validate", "--ckpt_path", checkpoint, "--model.pretrained", model, "--trainer.accelerator", "cpu")
    build_tiny(tmp_path / "other", seed=1)
    other = ("--model.pretrained", "other", "--trainer.accelerator", "cpu")
    error = fails(run, capfd, "validate", "--ckpt_path", checkpoint, *other)
    assert "trained on another base model than model.pretrained 'other', whose embeddings differ: give the" in error


def test_another_prompt_and_processor_are_named(run, checkpoint):
    changed = ("--data.prompt_style", "recipe", "--data.image_size", 56, "--trainer.accelerator", "cpu")
    with pytest.warns(UserWarning, match=r"data.prompt_style 'idefics', here 'recipe'; data.image_size 112, here 56\."):
        run("validate", "--ckpt_path", checkpoint, *changed)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The adapter was trained with")
        run("validate", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu")


def test_the_newest_good_checkpoint_is_last(run, checkpoint, capfd, tmp_path):
    good = checkpoint.relative_to(tmp_path)
    for number, damage in enumerate((lambda c: c[:3000], lambda c: b"", lambda c: c[:-100])):
        (checkpoint.parent / f"newer{number}.ckpt").write_bytes(damage(checkpoint.read_bytes()))
    torch.save(
        {"state_dict": {}, "pytorch-lightning_version": "2", "code": RunsCode()}, checkpoint.parent / "code.ckpt"
    )
    capfd.readouterr()
    with pytest.warns(UserWarning, match=r"Passed over: ckpt_path .*newer2.ckpt: not a checkpoint of this"):
        run("validate", "--ckpt_path", "last", "--trainer.accelerator", "cpu")
    assert f"last checkpoint: {good}" in capfd.readouterr().err
    assert not Path("code-ran").exists()


def test_without_a_checkpoint_last_is_an_error_but_for_a_fit(run, docvqa, capfd):
    error = fails(run, capfd, "validate", "--data.source", docvqa, "--ckpt_path", "last")
    assert error == "error: ckpt_path last: no checkpoint in lightning_logs"
