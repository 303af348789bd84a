"""`export_adapter`: an adapter that was trained in Python, as plain peft and transformers load it."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from idefics_lit import Idefics2Collator, Idefics2Module, InputError, LoRA, export_adapter, load_processor
from idefics_lit.data.example import Example
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.pretrained import resolve

OWN_COLLATOR = {"prompt_style": "idefics", "image_splitting": False, "image_size": 400}


def collate(train):
    processor = load_processor("tiny", image_size=400)
    return Idefics2Collator(processor, train=train, prompt_style="idefics")


@pytest.fixture(scope="module")
def examples():
    pages = SyntheticPages("export", 2, families=("form",))
    examples = [pages[0], pages[len(pages) - 1]]
    for example in examples:
        del example.answers[1:]  # one is drawn at random
    return examples


@pytest.fixture(scope="module", params=["none", "nf4"])
def module(request, examples):
    """A module that a user's own loader trained for a few steps."""
    module = Idefics2Module("tiny", quantization=request.param, lora=LoRA(dropout=0), lr=0.01, warmup_steps=0)
    trainer = Trainer(
        accelerator="cpu", precision="32-true", max_steps=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(examples, batch_size=1, collate_fn=collate(train=True)))
    return module


@torch.no_grad()
def logits(model, folder, examples):
    """The logits of the tokens that the exported processor makes of two questions."""
    batch = Idefics2Collator(AutoProcessor.from_pretrained(folder), train=True, prompt_style="idefics")(examples)
    names = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
    mask = batch.attention_mask.bool()
    return model.eval()(**{name: getattr(batch, name) for name in names}).logits.float()[mask]


def test_plain_peft_loads_the_adapter_and_gives_equal_logits(module, examples, tmp_path):
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    export_adapter(module, tmp_path / "out", **OWN_COLLATOR)
    folder = tmp_path / "out"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    alone = logits(model, folder, examples)
    if module.hparams.quantization == "none":
        loaded = logits(PeftModel.from_pretrained(model, folder), folder, examples)
        assert torch.equal(loaded, logits(module.model, folder, examples))
        assert (loaded - alone).abs().max() > 1  # the adapter changes the model
    facts = json.loads((folder / "idefics_lit.json").read_text())
    assert (facts["prompt_style"], facts["image_tokens"], facts["steps"]) == ("idefics", 64, 3)
    assert AutoProcessor.from_pretrained(folder).image_processor.size["longest_edge"] == 400
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


def test_the_merged_model_gives_the_adapters_logits(module, examples, tmp_path):
    export_adapter(module, tmp_path / "adapter", **OWN_COLLATOR)
    export_adapter(module, tmp_path / "merged", merge=True, merge_into="original", **OWN_COLLATOR)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    exact = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value.float(), exact[name], rtol=2**-7, atol=1e-4)
    assert any("lora_" in name for name in module.state_dict())  # the module itself isn't merged


def test_a_base_that_others_cannot_load_is_an_error(tmp_path):
    module = Idefics2Module("tiny", quantization="none")
    base = AutoModelForImageTextToText.from_pretrained(resolve("tiny"), dtype=torch.float32)
    base.model.text_model.layers[0].mlp.up_proj.weight.data += 1
    module.configure_model(base)
    with pytest.raises(InputError, match=r"trained on another base model than model\.pretrained 'tiny'"):
        export_adapter(module, tmp_path / "out")


def test_trained_weights_that_would_be_lost_are_an_error(tmp_path):
    module = Idefics2Module("tiny", quantization="none")
    module.configure_model()
    module.classifier = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"classifier\.weight is trained but isn't part of the adapter"):
        export_adapter(module, tmp_path / "out")
    del module.classifier
    next(p for p in module.parameters() if p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(InputError, match="aren't finite"):
        export_adapter(module, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_removes_what_a_killed_one_left(tmp_path):
    left, running = (tmp_path / f".out.{number:016x}.tmp" for number in range(2))
    for folder in (left, running):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    two_hours_ago = time.time() - 7200
    for path in (left, left / "model.safetensors", running):
        os.utime(path, (two_hours_ago, two_hours_ago))
    export_adapter(Idefics2Module("tiny", quantization="none"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", running.name}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("style", ["recipe", "idefics"])
def test_the_cards_code_asks_idefics3_and_smolvlm_as_training_does(
    stand_in, tmp_path, monkeypatch, capfd, merge, style
):
    """With one BOS, splitting on, and the ends of the base model's generation_config."""
    base = shutil.copytree(stand_in, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["architectures"] = ["VLlama3ForCausalLM"]  # by which llama.cpp converts SmolVLM
    (base / "config.json").write_text(json.dumps(config))
    module = Idefics2Module(str(base), quantization="none", max_new_tokens=4)
    export_adapter(module, tmp_path / "out", merge=merge, prompt_style=style)
    page = Image.effect_noise((300, 400), 80)
    page.save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    card = Path("out/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    exec(code, names := {})
    collate = module.collator(train=False, prompt_style=style)
    batch = collate([Example(1, "What is the date?", [page], [])])
    assert names["inputs"]["input_ids"].tolist() == batch.prompts.input_ids.tolist()
    torch.testing.assert_close(names["inputs"]["pixel_values"].float(), batch.pixel_values, rtol=0, atol=2e-3)
    facts = json.loads(Path("out/idefics_lit.json").read_text())
    assert (facts["image_splitting"], facts["image_tokens"]) == (True, 17 * 16)
    ends = GenerationConfig.from_pretrained(base).eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    written = json.loads(code.split("eos_token_id=")[1].split("]")[0] + "]")
    assert {*ends, module.processor.tokenizer.eos_token_id} == {*written}
    suppressed = json.loads(code.split("bad_words_ids=")[1].split("]]")[0] + "]]")
    vocabulary = module.processor.tokenizer.get_vocab()
    tags = [token for name, token in vocabulary.items() if re.match("<row_|<global-img>|<fake_token_|<image>", name)]
    assert sorted(suppressed) == [[token] for token in sorted(tags)]
    assert f"- {config['model_type']}\n" in card and "Idefics2" not in card
    if merge:
        saved = json.loads(Path("out/config.json").read_text())
        assert saved["text_config"]["architectures"] == ["VLlama3ForCausalLM"]
        assert {*GenerationConfig.from_pretrained("out").eos_token_id} == {*written}


def test_idefics3_and_smolvlm_have_equal_logits_in_plain_peft_and_merged(stand_in, examples, tmp_path):
    """Also their connector's adapter."""
    module = Idefics2Module(stand_in, quantization="none", lora=LoRA(dropout=0))
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    for name, options in {"adapter": {}, "merged": {"merge": True, "merge_into": "original"}}.items():
        export_adapter(module, tmp_path / name, image_size=224, prompt_style="idefics", **options)
    folder = tmp_path / "adapter"
    assert any("modality_projection.proj" in name for name in load_file(folder / "adapter_model.safetensors"))
    base = AutoModelForImageTextToText.from_pretrained(stand_in, dtype=torch.float32)
    alone = logits(base, folder, examples)
    model = PeftModel.from_pretrained(base, folder)
    loaded = logits(model, folder, examples)
    assert torch.equal(loaded, logits(module.model, folder, examples)) and (loaded - alone).abs().max() > 1
    merged, exact = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"), model.merge_and_unload()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value.float(), exact.state_dict()[name], rtol=2**-7, atol=5e-4)


def test_a_server_that_needs_tiles_is_named_when_there_are_none(stand_in, tmp_path):
    module = Idefics2Module(stand_in, quantization="none")
    export_adapter(module, tmp_path / "out", image_splitting=False)
    assert re.search("splitting off, 16 image tokens a page.*vLLM can't", (tmp_path / "out" / "README.md").read_text())
