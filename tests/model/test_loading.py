import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, Idefics2Config, LlavaConfig

from idefics_lit.errors import InputError
from idefics_lit.model.architecture import backbone_class
from idefics_lit.model.loading import LoRA, add_lora, load_model
from idefics_lit.model.memory import count_weights
from idefics_lit.model.quiet_imports import Params4bit

CPU = torch.device("cpu")


def load(tiny, **kwargs):
    options = {"quantization": "nf4", "lora": LoRA(dropout=0.0), "dtype": torch.float32, "device": CPU}
    return load_model(tiny, **{**options, **kwargs})


@pytest.fixture(scope="module")
def idefics2_8b():
    """The real architecture, without memory for weights."""
    config = AutoConfig.for_model(**json.loads((DATA / "idefics2-8b-files" / "config.json").read_text()))
    assert isinstance(config, Idefics2Config)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def test_the_recipe_trains_as_many_parameters_as_the_article_prints(idefics2_8b, capsys):
    assert sum(p.numel() for p in idefics2_8b.parameters()) == 8_402_768_112
    add_lora(idefics2_8b, LoRA()).print_trainable_parameters()
    expected = "trainable params: 7,589,912 || all params: 8,410,358,024 || trainable%: 0.0902"
    assert capsys.readouterr().out.strip() == expected


@pytest.mark.parametrize(
    ("name", "parameters", "trainable"),
    [
        ("Idefics3-8B-Llama3", 8_462_086_384, 7_944_216),
        ("SmolVLM-Instruct", 2_246_272_880, 3_654_680),
        ("SmolVLM-500M-Instruct", 507_482_304, 2_146_304),
        ("SmolVLM-256M-Instruct", 256_484_928, 1_423_360),
        ("SmolVLM2-2.2B-Instruct", 2_246_784_880, 3_655_680),
        ("SmolVLM2-500M-Video-Instruct", 507_482_304, 2_146_304),
        ("SmolVLM2-256M-Video-Instruct", 256_484_928, 1_423_360),
    ],
)
def test_the_recipe_adapts_the_connector_of_idefics3_and_smolvlm_too(name, parameters, trainable):
    config = AutoConfig.from_pretrained(DATA / "idefics3-files" / name)
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for p in base.parameters()) == parameters
    model = add_lora(base, LoRA())
    assert model.get_nb_trainable_parameters()[0] == trainable
    # Nothing else is adapted than what the recipe names.
    modules = {
        re.sub(r"\.\d+\.", ".N.", name.split(".lora_")[0]) for name, p in model.named_parameters() if p.requires_grad
    }
    attention = {f"model.text_model.layers.N.self_attn.{kind}_proj" for kind in "qkvo"}
    expected = {*attention, "model.connector.modality_projection.proj", "lm_head"}
    assert modules == {f"base_model.model.{name}" for name in expected}


def test_everything_is_frozen_but_float32_adapters(tiny):
    for quantization in ("nf4", "none"):
        model = load(tiny, quantization=quantization, dtype=torch.float16)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
        assert all(module.training for module in model.modules())


def test_nf4_quantizes_every_linear_layer_but_the_head(tiny):
    model = load(tiny)
    linear = {name: type(m).__name__ for name, m in model.named_modules() if "Linear" in type(m).__name__}
    kinds = {name: kind for name, kind in linear.items() if "lora_" not in name}
    assert {name for name, kind in kinds.items() if kind == "Linear"} <= {
        name for name in kinds if re.search("lm_head", name)
    }
    assert sum("Linear4bit" in kind for kind in kinds.values()) > 50


@pytest.mark.parametrize("quantize_vision", [False, True])
def test_nf4_leaves_the_small_connector_in_16_bits(stand_in, quantize_vision):
    model = load(stand_in, quantize_vision=quantize_vision)
    whole = {name for name, m in model.named_modules() if type(m) is torch.nn.Linear and "lora_" not in name}
    vision = {name for name in whole if ".vision_model." in name}
    assert {name.removeprefix("base_model.model.") for name in whole - vision} == {
        "lm_head.base_layer",
        "model.connector.modality_projection.proj.base_layer",
    }
    assert bool(vision) != quantize_vision
    options = {"quantize_vision": quantize_vision, "lora": asdict(LoRA())}
    counted = count_weights(AutoConfig.from_pretrained(stand_in), options)
    packed = [p for p in model.parameters() if isinstance(p, Params4bit)]
    assert counted.quantizable == sum(p.quant_state.shape.numel() for p in packed) and packed


def test_a_model_of_another_architecture_is_refused_by_name(tmp_path):
    LlavaConfig(name_or_path="llava").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is a llava: give an Idefics2, Idefics3 or SmolVLM"):
        backbone_class(AutoConfig.from_pretrained(tmp_path))


def test_unpacked_weights_are_the_4_bit_ones(tiny, capfd):
    """The same function, and the same adapter: a checkpoint of one is one of the other."""
    found = []
    for dequantize in (False, True):
        torch.manual_seed(0)
        model = load(tiny, dequantize=dequantize)
        ids = torch.arange(20, 52)[None]
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kinds = {type(m).__name__ for m in model.modules()}
        assert ("Linear4bit" in kinds) == (not dequantize)
        found.append((logits, trained))
    (packed, packed_trained), (unpacked, unpacked_trained) = found
    assert torch.equal(packed, unpacked)
    assert packed_trained.keys() == unpacked_trained.keys()
    for name, parameter in packed_trained.items():
        assert torch.equal(parameter, unpacked_trained[name])
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, unpacked_trained[name].grad, atol=1e-7)
    assert "dequantized" not in "".join(capfd.readouterr())


def test_a_pattern_that_matches_nothing_is_an_error(tiny):
    with pytest.raises(InputError, match=r"model\.lora: .*no_such_layer"):
        load(tiny, lora=LoRA(target_modules="no_such_layer"))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", ["text_model.layers.1.self_attn.q_proj", "text_model.layers.1.input_layernorm"])
def test_a_model_without_one_of_its_weights_is_an_error(tiny, tmp_path, quantization, name):
    folder = shutil.copytree(tiny, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    del weights[f"model.{name}.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"lacks 1 of the model's weights, such as model\.{name}\.weight: fetch"):
        load(str(folder), quantization=quantization)


def test_a_weight_that_the_model_has_no_place_for_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "head.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"has 1 weights that the model doesn.t use, such as head\.weight; they"):
        load(str(folder), quantization="none")


def test_a_model_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no model can be loaded"):
        load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("given", "cache", "expected"),
    [(None, "cache", "cache/idefics_lit/compiled"), ("mine", "cache", "mine"), (None, "a_file", "torch's default")],
)
def test_compiled_code_is_kept_where_the_next_run_finds_it(tiny, tmp_path, monkeypatch, given, cache, expected):
    (tmp_path / "a_file").write_text("in which there is no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if given:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / given))
    load(tiny, compiled=True)
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/tmp"))  # torch sets its default when it is imported
    assert (
        folder.relative_to(tmp_path).as_posix() if folder.is_relative_to(tmp_path) else "torch's default"
    ) == expected
