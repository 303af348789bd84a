"""The command `export`: plain peft and transformers load the folder that it writes."""

import json
import os
import re
import resource
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from idefics_lit import pretrained
from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.data.images import open_page
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.errors import InputError
from idefics_lit.model.tiny import tiny_config
from idefics_lit.pretrained import load_processor, refuse_adapter, resolve
from idefics_lit.training.module import Idefics2Module

CPU = ("--trainer.accelerator", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The best checkpoint of a short fit of the reader, whose adapter does something."""
    from idefics_lit.cli.main import main

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
        return {
            name: getattr(made, name)
            for name in ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
        }

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


def code_of(folder):
    """Return the code that the card of an export shows."""
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("flags", [(), ("--merge", "true")])
def test_the_cards_code_answers_as_ask_does(export, run, checkpoint, capfd, tmp_path, flags):
    """A page that its EXIF data turn, without paper, and a base that doesn't say how its answers end."""
    base = shutil.copytree(resolve("tiny"), tmp_path / "base", ignore=shutil.ignore_patterns("generation_config.json"))
    folder, _ = export(*flags, "--model.pretrained", base)
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    drawn = SyntheticPages("export", 1, families=("form",))[0]
    page = Image.new("RGBA", drawn.images[0].size)
    page.putalpha(ImageOps.invert(drawn.images[0].convert("L")))
    page.transpose(Image.Transpose.ROTATE_90).save("page.png", exif=exif)
    exec(code_of(folder), names := {})
    printed = capfd.readouterr().out
    upright = names["processor"].image_processor(open_page("page.png"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(names["inputs"]["pixel_values"].float(), upright, rtol=0, atol=0.01)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id if flags else [2, 5]
    assert ends == [2, 5] and "eos_token_id=[2, 5]" in code_of(folder)
    model = ("--model.pretrained", folder) if flags else ("--ckpt_path", checkpoint, "--model.pretrained", base)
    same = ("--model.quantization", "none", "--model.max_new_tokens", "9")
    data = ("--data.prompt_style", "idefics", "--data.image_size", "400")
    run("ask", *model, *CPU, *same, *data, "--json", "--image", "page.png", "--question", "What is the date?")
    assert json.loads(capfd.readouterr().out)["answer"] + "\n" == printed


def test_the_cards_code_refuses_an_older_transformers(export, monkeypatch):
    folder, _ = export()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.1")
    with pytest.raises(ImportError, match=r"(?s)transformers>=5\.21 is required.*4\.57\.1\.\n.*can't read this"):
        exec(code_of(folder), {})
    assert "needs transformers 5.21 or later" in (folder / "README.md").read_text()


QUESTIONS = [
    "What is the date?",
    "  12.80 $ or 007?\n",
    "two\nlines,\ttabs  and   spaces",
    "½ naïve ﬁ 日本語 🙂 \u200b?",
    "<0x41> ▁ [INST] </div> {{ x }}",
    "7",
]


@pytest.fixture(scope="module")
def large(hub_files, tmp_path_factory):
    """A random model for Idefics2-8b's own processor, and a checkpoint of its adapter."""
    from idefics_lit.cli.main import main

    folder = shutil.copytree(hub_files, tmp_path_factory.mktemp("large") / "base")
    config = tiny_config().to_dict()
    config["image_token_id"] = 32001
    config["text_config"]["vocab_size"] = 32003
    torch.manual_seed(0)
    Idefics2ForConditionalGeneration(Idefics2Config(**config)).save_pretrained(folder)
    runs = folder.parent / "runs"
    flags = ["--model.pretrained", folder, "--model.quantization", "none", "--data.source", "synthetic:form"]
    flags += ["--data.limit_train", 1, "--data.num_workers", 0, "--data.image_size", 112, "--trainer.max_steps", 1]
    flags += ["--trainer.limit_val_batches", 0, "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    flags += ["--trainer.default_root_dir", runs, *CPU]
    main(["fit", *map(str, flags)])
    return folder, next(runs.rglob("*.ckpt"))


def prompt_ids(processor, question, image, style):
    """A prompt as the card makes it."""
    text, page = {"type": "text", "text": question.strip()}, {"type": "image"}
    content = [{"type": "text", "text": "Answer briefly."}, page, text]
    if style == "idefics":
        content = [page, {"type": "text", "text": f"{question.strip()}\nGive a very brief answer."}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True).strip()
    return processor(text=prompt, images=[image], return_tensors="pt")


@pytest.mark.parametrize(("splitting", "flags"), [("false", ()), ("true", ("--merge", "true"))])
def test_idefics2s_processor_reads_whole_prompts_as_training_does(large, run, splitting, flags):
    base, checkpoint = large
    options = ("--data.image_splitting", splitting, "--data.image_size", "400")
    folder = run("export", "--ckpt_path", checkpoint, "--output", "out", *CPU, *options, *flags) / "out"
    exported = AutoProcessor.from_pretrained(folder)
    own = load_processor(str(base), image_splitting=splitting == "true", image_size=400)
    image = Image.linear_gradient("L").resize((500, 700))
    for style in ("recipe", "idefics"):
        collate = Idefics2Collator(own, train=False, prompt_style=style)
        for number, question in enumerate(QUESTIONS):
            batch = collate([Example(question_id=number, question=question, images=[image], answers=["x 7"])])
            read = prompt_ids(exported, question, image, style)
            assert read["input_ids"].tolist() == batch.prompts.input_ids.tolist(), (style, question)
            assert torch.equal(read["pixel_values"], batch.pixel_values)
    # As each of transformers' ways to a tokeniser reads it, those that take tokenizer.json alone too.
    assert json.loads((folder / "tokenizer_config.json").read_text())["legacy"] is True
    assert json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]["prepend_scheme"] == "always"


def test_a_processor_that_is_written_otherwise_is_refused(large, fails, monkeypatch, tmp_path):
    """transformers 5 writes it so without the package's correction."""
    save = PreTrainedTokenizerBase.save_pretrained

    def forgetful(self, folder, *args, **kwargs):
        self.init_kwargs.pop("legacy", None)
        return save(self, folder, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", forgetful)
    _, checkpoint = large
    line = fails("--output", "out", "--ckpt_path", checkpoint)
    assert re.search("transformers [0-9.]+ has written gives other inputs .*: .*input_ids differ", line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "flags"), [(0o022, ("--merge", "true")), (0o027, ())])
def test_others_may_read_what_the_umask_lets_them(export, umask, flags):
    before = os.umask(umask)
    try:
        folder, _ = export(*flags)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("command", ["validate", "ask"])
def test_an_adapter_is_no_model_to_begin_with(export, run, checkpoint, capfd, tmp_path, command):
    """transformers would load its base model, which would get a new adapter."""
    folder, _ = export()
    SyntheticPages("export", 1)[0].images[0].save(tmp_path / "page.png")
    flags = {"validate": ("--data.source", "synthetic"), "ask": ("--image", "page.png", "--question", "What?")}
    with pytest.raises(SystemExit) as caught:
        run(command, "--model.pretrained", folder, *flags[command], "--model.quantization", "none", *CPU)
    assert caught.value.code == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    base = resolve("tiny")
    assert f"model.pretrained '{folder}' is an adapter (adapter_config.json) on the model {base}: give" in error
    assert f"--model.pretrained {base} --model.adapter {folder}" in error
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
    """It is exported alone, or merged into the base before quantization."""
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


@pytest.fixture
def hub(monkeypatch):
    """A repository on the Hub that has some files; what is created, and the files it has then."""
    repository = {"notes.md": b"", ".gitattributes": b""}
    created = []

    def create_repo(api, repo_id, **options):
        created.append((repo_id, options))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(api, *, repo_id, folder_path, delete_patterns=()):
        for name in list(filter_repo_objects(repository, allow_patterns=list(delete_patterns))):
            del repository[name]
        repository.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return created, repository


def test_push(export, hub):
    created, repository = hub
    folder, printed = export("--push_to_hub", "me/reader")
    assert created == [("me/reader", {"private": True, "exist_ok": True})]
    assert "adapter_model.safetensors" in repository
    assert "uploaded to https://huggingface.co/me/reader" in printed.out
    assert 'PeftModel.from_pretrained(base, "me/reader")' in (folder / "README.md").read_text()


@pytest.mark.parametrize("flags", [(), ("--merge", "true")])
def test_nothing_of_this_machine_is_pushed(export, hub, tmp_path, flags):
    _, repository = hub
    base = shutil.copytree(resolve("tiny"), tmp_path / "models" / "small-idefics")
    private = ("--model.pretrained", base, "--data.source", tmp_path / "clients" / "scans")
    _, printed = export("--push_to_hub", "me/reader", *private, *flags, output=str(tmp_path / "exports" / "out"))
    texts = {name: content.decode() for name, content in repository.items() if not name.endswith(".safetensors")}
    assert not [name for name, text in texts.items() if str(tmp_path) in text or "clients" in text]
    assert "local_files_only" not in texts["tokenizer_config.json"]
    assert json.loads(texts["idefics_lit.json"])["base"] == "small-idefics"
    if not flags:  # others can't have it
        assert json.loads(texts["adapter_config.json"])["base_model_name_or_path"] == "small-idefics"
        assert re.search("warning: the base model is the local folder .*: put its Hub id", printed.err), printed.err


@pytest.mark.parametrize("flags", [(), ("--merge", "true")])
def test_the_facts_hold_no_path_of_this_machine(export, tmp_path, flags):
    """Also if nothing is pushed: the folder may be uploaded later. adapter_config.json must name the base's folder."""
    base = shutil.copytree(resolve("tiny"), tmp_path / "models" / "small-idefics")
    private = ("--model.pretrained", base, "--data.source", tmp_path / "scans", "--model.feature_cache", tmp_path / "c")
    folder, _ = export(*private, *flags, output=str(tmp_path / "out"))
    text = (folder / "idefics_lit.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["base"] == "small-idefics"


def test_a_push_takes_the_place_of_another_kinds_weights(export, hub):
    _, repository = hub
    adapter, _ = export("--push_to_hub", "me/reader", output="adapter")
    repository |= {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b""}  # a larger model's
    merged, _ = export("--push_to_hub", "me/reader", "--merge", "true", output="merged")
    assert repository.keys() == {path.name for path in merged.iterdir()} | {"notes.md", ".gitattributes"}
    export("--push_to_hub", "me/reader", output="again")
    assert repository.keys() == {path.name for path in adapter.iterdir()} | {"notes.md", ".gitattributes"}


def test_the_card_says_on_how_many_questions_it_was_scored(export):
    folder, _ = export("--data.val_in_fit", "1")
    assert "of its run by then, on 1 of the validation questions: " in (folder / "README.md").read_text()


def test_errors(fails, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    for args, message in (
        ([], "output is missing: give --output FOLDER"),
        (["--output", "out", "--push_to_hub", "reader"], "push_to_hub reader: whose[?] Give OWNER/reader"),
        (["--output", "full"], "output full exists already: name a new folder"),
        (["--output", "full/mine.txt"], "output full/mine.txt exists already"),
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
    assert re.search("output out can't be written: .*the output was deleted: make room", line), line
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken(export, tmp_path):
    (tmp_path / "out").mkdir()
    assert (export()[0] / "adapter_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
