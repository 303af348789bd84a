"""What is loaded runs no code, and is what the checkpoint was made with."""

import json
import os
import re
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file, save_file

from idefics_lit.errors import InputError
from idefics_lit.model.tiny import build_tiny
from idefics_lit.training.checkpoint import base_fingerprint
from idefics_lit.training.checkpoint_checks import check_base

EMBEDDING = "model.text_model.embed_tokens.weight"


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
def test_a_model_with_code_of_its_own(run, short_fit, model, capfd, tmp_path, file, monkeypatch):
    """Its classes are transformers', whatever it says; of another type it is refused, and nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (model / "evil.py").write_text("import os\nos.mkdir('code-ran')\nEvil = dict\n")
    written = json.loads((model / file).read_text())
    mapped = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")}
    (model / file).write_text(json.dumps({**written, "auto_map": mapped}))
    run(*short_fit("--model.pretrained", model, "--trainer.max_steps", 1))
    assert not (tmp_path / "code-ran").exists()
    if file == "config.json":
        (model / file).write_text(json.dumps({**written, "model_type": "evil", "auto_map": mapped}))
        for more in ((), ("--data.image_size", "null")):
            error = fails(run, capfd, *short_fit("--model.pretrained", model, *more))
            assert error.startswith(f"error: model.pretrained '{model}': no configuration can be loaded (")
        assert not (tmp_path / "code-ran").exists()


@pytest.fixture
def checkpoint(run, short_fit):
    folder = run(*short_fit("--trainer.max_steps", 2, "--data.prompt_style", "idefics"))
    return next(folder.rglob("*.ckpt"))


def test_pages_held_out_otherwise_than_in_training_are_named(run, short_fit, docvqa, tmp_path):
    shutil.copytree(docvqa, tmp_path / "data")
    (tmp_path / "data" / "val.json").unlink()
    source = ("--data.source", tmp_path / "data", "--data.held_out", 0.2)
    folder = run(*short_fit(*source, "--trainer.max_steps", 2))
    validate = ("validate", "--ckpt_path", next(folder.rglob("*.ckpt")), "--trainer.accelerator", "cpu")
    with pytest.warns(UserWarning, match=r"held out .* differently .*\(data.seed 0, here 1\): it was trained on some"):
        run(*validate, "--data.seed", 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*held out")
        run(*validate, "--data.limit_val", 1)


def test_another_base_model_is_refused_and_the_same_elsewhere_is_not(run, checkpoint, model, capfd, tmp_path):
    """A sibling, trained a little further, is another; the same base in another precision isn't."""
    validate = ("validate", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu", "--model.pretrained", model)
    run(*validate)
    build_tiny(tmp_path / "other", seed=1)
    error = fails(run, capfd, *validate[:-1], "other")
    assert re.search(
        r"trained on another base model than model.pretrained 'other' \(\d+ of 165 weights differ, such as lm_head",
        error,
    )
    weights = load_file(model / "model.safetensors")
    for changed, name in ((torch.bfloat16, None), (None, "model.text_model.layers.2.self_attn.v_proj.weight")):
        stored = {
            n: weight.to(changed) if changed else weight * (1 + 2e-3 * (n == name)) for n, weight in weights.items()
        }
        save_file(stored, model / "model.safetensors", {"format": "pt"})
        if changed:
            run(*validate, "--model.quantization", "nf4", "--trainer.precision", "bf16-mixed")
        else:
            error = fails(run, capfd, *validate)
            assert (
                f"another base model than model.pretrained '{model}' (1 of 165 weights differ, such as {name})" in error
            )


def test_a_checkpoint_of_an_earlier_version_knows_an_embedding_alone(run, checkpoint, capfd, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    embedding = load_file(Path(saved["hyper_parameters"]["pretrained"]) / "model.safetensors")[EMBEDDING]
    torch.save({**saved, "base": embedding[:8, :8].float()}, "old.ckpt")
    validate = ("validate", "--ckpt_path", "old.ckpt", "--trainer.accelerator", "cpu")
    run(*validate)
    build_tiny(tmp_path / "other", seed=1)
    error = fails(run, capfd, *validate, "--model.pretrained", "other")
    assert "trained on another base model than model.pretrained 'other', whose embeddings differ: give the" in error


def test_the_hubs_revision_is_remembered_and_named(tmp_path, monkeypatch):
    """Another commit with the same weights is the same base."""
    bases = {}
    for revision, seed in (("a" * 40, 0), ("b" * 40, 0), ("c" * 40, 1)):
        build_tiny(tmp_path / "models--someone--base" / "snapshots" / revision, seed=seed)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        cached = partial(try_to_load_from_cache, cache_dir=tmp_path)
        monkeypatch.setattr("idefics_lit.pretrained.try_to_load_from_cache", cached)
        bases[revision[0]] = base_fingerprint("someone/base", revision)
    assert len(bases["a"]["names"]) == 165
    check_base(bases["a"], bases["b"], "someone/base")
    with pytest.raises(InputError, match=rf"weights differ, such as .*; revision {'a' * 40}, here {'c' * 40}\)"):
        check_base(bases["a"], bases["c"], "someone/base")


def test_an_adapter_that_is_no_number_is_refused(run, checkpoint, capfd):
    saved = torch.load(checkpoint, weights_only=True)
    name = next(iter(saved["state_dict"]))
    saved["state_dict"][name][0, 0] = float("nan")
    torch.save(saved, "nan.ckpt")
    for command in (("validate",), ("export", "--output", "out")):
        error = fails(run, capfd, *command, "--ckpt_path", "nan.ckpt", "--trainer.accelerator", "cpu")
        assert error == f"error: the checkpoint's {name} holds numbers that aren't finite: take an earlier checkpoint"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("command", "quantization", "value"),
    [("fit", "none", "nan"), ("validate", "nf4", "inf"), ("ask", "nf4", "nan"), ("export", "none", "-inf")],
)
def test_a_base_with_a_weight_that_is_no_number_is_refused(
    run, short_fit, checkpoint, model, docvqa, capfd, command, quantization, value
):
    """It would answer, and say nothing."""
    weights = load_file(model / "model.safetensors")
    name = "model.text_model.layers.0.mlp.up_proj.weight"
    weights[name][3, 5] = float(value)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    page = next((docvqa / "documents").iterdir())
    options = {"ask": ("--image", page, "--question", "?"), "export": ("--output", "out")}
    args = (command, "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu", *options.get(command, ()))
    args = short_fit() if command == "fit" else args
    error = fails(run, capfd, *args, "--model.pretrained", model, "--model.quantization", quantization)
    assert error.startswith(f"error: model.pretrained '{model}': {name} holds numbers that aren't finite in torch.")
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["fit", "ask", "export"])
def test_a_base_that_lacks_a_weight_is_refused(run, short_fit, checkpoint, model, docvqa, capfd, command):
    """It would be random numbers."""
    weights = load_file(model / "model.safetensors")
    name = "model.vision_model.encoder.layers.0.mlp.fc1.bias"
    weights["vision.old"] = weights.pop(name)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    page = next((docvqa / "documents").iterdir())
    options = {"ask": ("--image", page, "--question", "?"), "export": ("--output", "out", "--merge", "true")}
    args = (command, "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu", *options.get(command, ()))
    error = fails(run, capfd, *(short_fit() if command == "fit" else args), "--model.pretrained", model)
    assert error == (
        f"error: model.pretrained '{model}' lacks 1 of the model's weights, such as {name}, and has 1 weights that the "
        f"model doesn't use, such as vision.old: fetch or convert it again"
    )


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
    with pytest.warns(UserWarning, match=r"Skipped: ckpt_path .*newer2.ckpt: not a checkpoint of this"):
        run("validate", "--ckpt_path", "last", "--trainer.accelerator", "cpu")
    assert f"last checkpoint: {good}" in capfd.readouterr().err
    assert not Path("code-ran").exists()


def test_without_a_checkpoint_last_is_an_error_but_for_a_fit(run, docvqa, capfd):
    error = fails(run, capfd, "validate", "--data.source", docvqa, "--ckpt_path", "last")
    assert error == "error: ckpt_path last: no checkpoint in lightning_logs"
