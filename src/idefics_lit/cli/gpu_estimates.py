"""What a fit would take of a GPU: weights are counted, the rest is as it was measured on another machine."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from idefics_lit.errors import first_line
from idefics_lit.pretrained import DTYPES, resolve

# Bytes of a weight: 4 bits, 8 of a scale that 64 share, 32 of one that 256 scales share.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# A fit within 0.5 GiB of each of the 28 peaks in benchmarks/results/memory.json: one H100 80GB, torch 2.11,
# transformers 5.17, 16-mixed, LoRA of rank 8 on attention. With gradient checkpointing or without: GiB beside the
# weights, MiB a patch of 14 x 14 pixels, MiB a token of the text, padding included; one of the two is the peak.
PEAKS = {False: (0.18, 0.0, 6.35), True: (0.08, 0.0449, 0.0)}
# Questions a second in training, one H100 80GB, pages around 1700 x 2200 pixels, from benchmarks/results:
# train_throughput.json, train_throughput_small_cards.json, full_size.json and train_throughput_splitting.json.
RATES = {
    False: {"gpu_80gb.yaml": 116.4, "gpu_15gb.yaml": 64.3, "docvqa.yaml": 5.1},
    True: {"gpu_80gb.yaml with one question a page": 9.7},
}


def measured_model(config: PretrainedConfig) -> bool:
    """Tell whether it is a model of Idefics2-8b's size, the one that was measured."""
    text, vision = config.text_config, config.vision_config
    sizes = (text.hidden_size, text.num_hidden_layers, vision.hidden_size, vision.num_hidden_layers)
    return sizes == (4096, 32, 1152, 27)


def load_config(pretrained: str) -> PretrainedConfig | str:
    """Return the model's configuration, or why there is none."""
    try:
        return AutoConfig.from_pretrained(resolve(pretrained))
    except Exception as error:
        return first_line(error)


def weights_gib(config: PretrainedConfig, options: Mapping[str, Any], precision: str) -> float:
    """Count the GiB of weights, adapter, its gradients and AdamW's two moments, without loading any.

    Args:
        config: the model's.
        options: `Idefics2Module`'s.
        precision: the Trainer's.

    Raises:
        InputError: ``lora.target_modules`` match nothing.
    """
    from idefics_lit.model.loading import LoRA, add_lora  # bitsandbytes talks when it is imported

    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config)
    packed = 0
    if options["quantization"] == "nf4" and not options["dequantize"]:
        left_out = ("lm_head",) if options["quantize_vision"] else ("lm_head", "model.vision_model")
        layers = [layer for name, layer in base.named_modules() if not name.startswith(left_out)]
        packed = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    whole = sum(p.numel() for p in base.parameters()) - packed
    adapted = add_lora(base, LoRA(**options["lora"]))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    width = DTYPES.get(precision, torch.float32).itemsize
    return (packed * NF4_BYTES + whole * width + trained * 16) / 2**30


def peak_gib(weights: float, patches: int, tokens: int, gradient_checkpointing: bool) -> float:
    """Estimate the peak of training Idefics2-8b in 16 bits on a batch.

    Args:
        weights: `weights_gib`.
        patches: of all its images.
        tokens: of all its rows, padding included.
        gradient_checkpointing: as the module's.
    """
    fixed, patch, token = PEAKS[gradient_checkpointing]
    return weights + fixed + (patches * patch + tokens * token) / 1024
