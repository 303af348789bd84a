"""The command `export`: what plain peft and transformers make of the folder."""

import json
import re
import resource
from pathlib import Path

import peft
import pytest
import torch
import yaml
from huggingface_hub import HfApi, RepoUrl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from idefics_lit import pretrained
from idefics_lit.collator import Idefics2Collator
from idefics_lit.data.synthetic import SyntheticPages
from idefics_lit.errors import InputError
from idefics_lit.module import Idefics2Module
from idefics_lit.pretrained import load_processor, refuse_adapter, resolve

CPU = ("--trainer.accelerator", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The best checkpoint of a short fit of the reader, whose adapter does something."""
    from idefics_lit.cli import main

    folder = tmp_path_factory.mktemp("run")
    config = {
        "model": {"pretrained": "tiny", "quantization": "none", "lr": 0.01, "warmup_steps": 0, "max_new_tokens": 9},
        "data": {
            **{"source": "synthetic:form", "limit_train": 8, "limit_val": 2, "num_workers": 0},
            **{"prompt_style": "idefics", "image_size": 400},
        },
        "trainer": {
            **{"accelerator": "cpu", "max_steps": 4, "enable_progress_bar": False, "num_sanity_val_steps": 0},
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder)}},
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/anls", "mode": "max"}}],
        },
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(folder / "fit.yaml")])
    return next(folder.rglob("*.ckpt"))


@pytest.fixture
def export(run, checkpoint, capfd):
    """Run `export`; returns the folder and what was printed."""

    def export(*args, output="out"):
        capfd.readouterr()
        folder = run("export", "--ckpt_path", checkpoint, "--output", output, *CPU, *args) / output
        return folder, capfd.readouterr()

    return export


@pytest.fixture
def fails(run, checkpoint, capfd):
    """Run `export`, which ends in exit code 2 and one line; returns the line."""

    def fails(*args, ckpt_path=("--ckpt_path",)):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            run("export", *ckpt_path, *([checkpoint] if ckpt_path else []), *CPU, *args)
        assert caught.value.code == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]

    return fails


@pytest.fixture(scope="module")
def trained(checkpoint):
    """The module with the checkpoint's adapter, in float32."""
    saved = torch.load(checkpoint, weights_only=True)
    module = Idefics2Module(**saved["hyper_parameters"])
    module.configure_model()
    module.load_state_dict(saved["state_dict"])
    return module.eval()


@pytest.fixture
def batch():
    """Two questions as the checkpoint's prompt asks them, for a processor."""

    def batch(processor):
        drawn = SyntheticPages("export", 2, families=("form",))
        collate = Idefics2Collator(processor, train=True, prompt_style="idefics")
        made = collate([drawn[0], drawn[len(drawn) - 1]])
        return {name: made[name] for name in ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")}

    return batch


@torch.no_grad()
def difference(model, module, inputs):
    """The largest between the logits of tokens that are no padding."""
    seen = inputs["attention_mask"].bool()
    return float((model.eval()(**inputs).logits - module.model(**inputs).logits)[seen].abs().max())


def test_plain_peft_loads_it(export, trained, batch):
    folder, printed = export()
    assert printed.out == "adapter in out\n"
    config = json.loads((folder / "adapter_config.json").read_text())
    base = config["base_model_name_or_path"]
    assert Path(base) == Path(resolve("tiny"))
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    inputs = batch(AutoProcessor.from_pretrained(folder))
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        alone = model.eval()(**inputs).logits
    model = PeftModel.from_pretrained(model, folder)
    assert difference(model, trained, inputs) == 0
    assert (model(**inputs).logits - alone).abs().max() > 1  # the adapter does something


def test_the_processor_is_the_runs(export):
    folder, printed = export()
    images = AutoProcessor.from_pretrained(folder).image_processor
    assert (images.do_image_splitting, images.size["longest_edge"]) == (False, 400)
    assert re.fullmatch("warning: .*splitting off, 64 image tokens a page.*, 320 tokens\n", printed.err), printed.err
    facts = json.loads((folder / "idefics_lit.json").read_text())
    assert (facts["prompt_style"], facts["image_splitting"], facts["image_tokens"]) == ("idefics", False, 64)
    assert facts["model"]["lora"]["r"] == 8 and facts["data"]["source"] == "synthetic:form"
    folder, printed = export("--data.image_splitting", "true", output="split")
    assert AutoProcessor.from_pretrained(folder).image_processor.do_image_splitting
    assert json.loads((folder / "idefics_lit.json").read_text())["image_tokens"] == 320
    assert printed.err == "" and "splitting off" not in (folder / "README.md").read_text()


def test_the_card_says_what_it_is(export, checkpoint):
    card = (export()[0] / "README.md").read_text()
    head, config = yaml.safe_load(card.split("---")[1]), yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert head["library_name"] == "peft" and "base_model" not in head  # a folder isn't on the Hub
    assert config["model"]["lr"] == 0.01 and config["data"]["prompt_style"] == "idefics"
    states = torch.load(checkpoint, weights_only=True)["callbacks"].values()
    best = next(float(state["best_model_score"]) for state in states if "best_model_score" in state)
    assert f"best `val/anls` of its run by then: {best:.4f}" in card


@pytest.mark.parametrize("flags", [(), ("--merge", "true")])
def test_the_cards_code_answers_as_ask_does(export, run, checkpoint, capfd, flags):
    folder, _ = export(*flags)
    drawn = SyntheticPages("export", 1, families=("form",))[0]
    drawn.images[0].save("page.png")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, {})
    printed = capfd.readouterr().out
    model = ("--model.pretrained", folder) if flags else ("--ckpt_path", checkpoint)
    same = ("--model.quantization", "none", "--model.max_new_tokens", "9")
    data = ("--data.prompt_style", "idefics", "--data.image_size", "400")
    run("ask", *model, *CPU, *same, *data, "--json", "--image", "page.png", "--question", "What is the date?")
    assert json.loads(capfd.readouterr().out)["answer"] + "\n" == printed


@pytest.mark.parametrize("command", ["validate", "ask"])
def test_an_adapter_is_no_model_to_begin_with(export, run, checkpoint, capfd, tmp_path, command):
    """It would be taken for its base, with a new adapter."""
    folder, _ = export()
    SyntheticPages("export", 1)[0].images[0].save(tmp_path / "page.png")
    flags = {"validate": ("--data.source", "synthetic"), "ask": ("--image", "page.png", "--question", "What?")}
    with pytest.raises(SystemExit) as caught:
        run(command, "--model.pretrained", folder, *flags[command], "--model.quantization", "none", *CPU)
    assert caught.value.code == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    base = resolve("tiny")
    assert f"model.pretrained '{folder}' is an adapter (adapter_config.json) on the model {base}: give" in error
    assert f"--model.pretrained {base} --ckpt_path CHECKPOINT" in error and "--merge true" in error
    if command == "validate":
        for refuses in (load_processor, refuse_adapter):
            with pytest.raises(InputError, match="is an adapter"):
                refuses(str(folder))
        (folder / "config.json").write_text("{}")
        with pytest.raises(InputError, match="holds a model and an adapter"):
            load_processor(str(folder))
        (folder / "adapter_config.json").write_text("no JSON")
        with pytest.raises(InputError, match="holds a model and an adapter"):
            load_processor(str(folder))


def test_an_adapter_of_the_hub_is_no_model_either(tmp_path, monkeypatch):
    config = tmp_path / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "some/base"}')
    asked = []
    monkeypatch.setattr(pretrained, "find_adapter_config_file", lambda name: asked.append(name) or str(config))
    for load in (load_processor, lambda name: Idefics2Module(name, quantization="none").configure_model()):
        with pytest.raises(InputError, match=r"'some/adapter' is an adapter .* on the model some/base"):
            load("some/adapter")
    assert asked == ["some/adapter"] * 2


def test_merged(export, trained, batch):
    folder, printed = export("--merge", "true")
    assert printed.out == "merged model in out\n"
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.dtype == torch.bfloat16 and not isinstance(model, PeftModel)
    assert not any("lora" in name for name, _ in model.named_modules())
    inputs = batch(AutoProcessor.from_pretrained(folder))
    assert difference(model.float(), trained, inputs) < 0.5
    # As peft merges in float32, but for the last place of bfloat16.
    exact = peft.PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(resolve("tiny"), dtype=torch.float32),
        export(output="adapter")[0],
    ).merge_and_unload()
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=2**-7, atol=1e-4)
    facts = json.loads((folder / "idefics_lit.json").read_text())
    assert facts["merged"] and "library_name: transformers" in (folder / "README.md").read_text()


def test_an_adapter_of_a_4_bit_base(run, tmp_path):
    """It is exported by itself, or merged into the base as it was before it was quantized."""
    fit = ("--model.pretrained", "tiny", "--data.source", "synthetic:form", "--data.limit_train", "2")
    small = ("--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false")
    run("fit", *fit, *small, *CPU, "--data.num_workers", "0", "--data.image_splitting", "true")
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    for flags in ((), ("--merge", "true")):
        run("export", "--ckpt_path", checkpoint, "--output", f"out{len(flags)}", *CPU, *flags)
    assert "trained on it in 4 bits" in Path("out0/README.md").read_text()
    assert "quantization_config" not in json.loads(Path("out2/config.json").read_text())
    base = load_file(Path(resolve("tiny")) / "model.safetensors")
    merged = load_file("out2/model.safetensors")
    assert base.keys() == merged.keys()
    assert all(torch.equal(merged[name], base[name].bfloat16()) for name in base if "vision_model" in name)


def test_push(export, monkeypatch):
    """What would go over the network."""
    sent = []

    def create_repo(api, repo_id, **options):
        sent.append(("create", repo_id, options))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(api, **options):
        sent.append(
            ("upload", options["repo_id"], sorted(path.name for path in Path(options["folder_path"]).iterdir()))
        )

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    folder, printed = export("--push_to_hub", "me/reader")
    assert sent[0] == ("create", "me/reader", {"private": True, "exist_ok": True})
    assert sent[1][:2] == ("upload", "me/reader") and "adapter_model.safetensors" in sent[1][2]
    assert "uploaded to https://huggingface.co/me/reader" in printed.out
    assert 'PeftModel.from_pretrained(base, "me/reader")' in (folder / "README.md").read_text()


def test_errors(fails, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    for args, message in (
        ([], "output is missing: give --output FOLDER"),
        (["--output", "out", "--push_to_hub", "reader"], "push_to_hub reader: whose[?] Give OWNER/reader"),
        (["--output", "full"], "output full is there already: name a new folder"),
        (["--output", "full/mine.txt"], "output full/mine.txt is there already"),
        (["--output", "full/mine.txt/out"], "output full/mine.txt/out can't be written: Not a directory"),
        (["--output", "out", "--model.lora.r", "3"], "the checkpoint belongs to another adapter"),
        (["--output", "out", "--model.lora.alpha", "3"], "trained with model.lora.alpha 8, this run has 3"),
    ):
        assert re.search(message, line := fails(*args)), line
    assert re.search("ckpt_path is missing: give --ckpt_path", fails("--output", "out", ckpt_path=()))
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_the_hub_refuses(fails, tmp_path):
    """The folder is kept, and can be uploaded later."""
    line = fails("--output", "out", "--push_to_hub", "me/reader")
    assert re.search("push_to_hub me/reader: .*: out is written; .*`hf upload me/reader out`", line), line
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("flags", [(), ("--merge", "true")])
def test_a_full_disk(fails, tmp_path, flags):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        line = fails("--output", "out", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search("output out can't be written: .*nothing is left of it: make room", line), line
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken(export, tmp_path):
    (tmp_path / "out").mkdir()
    assert (export()[0] / "adapter_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
