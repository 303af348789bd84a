"""Estimates of the GPU memory and time of a fit: weights are counted, the rest is scaled from measurements."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from idefics_lit.errors import first_line
from idefics_lit.pretrained import DTYPES, resolve

# NF4 with double quantization (QLoRA, arXiv:2305.14314, section 3): 4 bits per weight, an 8-bit scale per 64 weights
# and a 32-bit scale per 256 of those scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@cache
def _measurements() -> dict[str, Any]:
    measurements: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("gpu_measurements.yaml").read_text())
    return measurements


def questions_per_second(*, image_splitting: bool) -> dict[str, float]:
    """Return the measured training throughput on one H100 by the config that it was measured with."""
    rates: dict[str, float] = _measurements()["questions_per_second"][
        "image_splitting" if image_splitting else "no_image_splitting"
    ]
    return rates


def is_measured_model(config: PretrainedConfig) -> bool:
    """Return whether a model has the size of Idefics2-8b, which was measured."""
    text, vision = config.text_config, config.vision_config
    sizes = (text.hidden_size, text.num_hidden_layers, vision.hidden_size, vision.num_hidden_layers)
    return sizes == (4096, 32, 1152, 27)


def load_config(pretrained: str) -> PretrainedConfig | str:
    """Return the model's configuration, or the reason why it can't be loaded."""
    try:
        return AutoConfig.from_pretrained(resolve(pretrained), trust_remote_code=False)
    except Exception as error:
        return first_line(error)


def weights_gib(config: PretrainedConfig, options: Mapping[str, Any], precision: str) -> float:
    """Count the GiB of weights, adapter, its gradients and AdamW's two moments, without loading any.

    Args:
        config: the model's configuration.
        options: the options of `Idefics2Module`.
        precision: the Trainer's precision.

    Raises:
        InputError: ``lora.target_modules`` match no layer.
    """
    from idefics_lit.model.loading import add_lora  # after the noise filter: bitsandbytes logs on import
    from idefics_lit.model.lora import LoRA

    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config)
    quantized = 0
    if options["quantization"] == "nf4" and not options["dequantize"]:
        unquantized = ("lm_head",) if options["quantize_vision"] else ("lm_head", "model.vision_model")
        layers = [layer for name, layer in base.named_modules() if not name.startswith(unquantized)]
        quantized = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    unquantized_weights = sum(p.numel() for p in base.parameters()) - quantized
    adapted = add_lora(base, LoRA(**options["lora"]))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    bytes_per_weight = DTYPES.get(precision, torch.float32).itemsize
    # A trainable weight has four float32 values: itself, its gradient and AdamW's two moments.
    return (quantized * NF4_BYTES + unquantized_weights * bytes_per_weight + trainable * 16) / 2**30


def peak_gib(weights: float, patches: int, tokens: int, gradient_checkpointing: bool) -> float:
    """Estimate the peak memory of training Idefics2-8b on a batch in 16 bits.

    Args:
        weights: `weights_gib`.
        patches: image patches of the batch.
        tokens: tokens of the batch with padding.
        gradient_checkpointing: the module's option.
    """
    key = "gradient_checkpointing" if gradient_checkpointing else "no_gradient_checkpointing"
    peak = _measurements()["peak_memory"][key]
    return weights + peak["fixed_gib"] + (patches * peak["mib_per_patch"] + tokens * peak["mib_per_token"]) / 1024
