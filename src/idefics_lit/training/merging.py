"""Merge an adapter into 16-bit weights: those of the 4-bit base model that it was trained on, or the original ones."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from idefics_lit.model.loading import load_model
from idefics_lit.model.lora import ADAPTER, LoRA
from idefics_lit.model.quiet_imports import Linear4bit, bitsandbytes, peft

if TYPE_CHECKING:
    from idefics_lit.training.module import Idefics2Module

MergeBase = Literal["dequantized", "original"]


@torch.no_grad()
def copy_to_merge(module: "Idefics2Module", base: MergeBase) -> tuple[peft.PeftModel, str]:
    """Return a copy of a module's model in bfloat16 on the CPU, whose adapter can be merged, and its differences.

    Args:
        module: the module with its model and adapter; it isn't changed.
        base: of a 4-bit base model, take the "dequantized" weights, with which validation scored the adapter, or the
            "original" ones. Without quantization both are the same.

    Returns:
        The copy, and a sentence with the relative differences (root mean square over all linear layers) of both choices
        from the weights that validation used; the sentence is empty without quantization.
    """
    options = module.hparams
    model = load_model(
        options.pretrained,
        quantization="none",
        lora=LoRA(**options.lora),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        prepare_base=module.prepare_base,
    )
    adapter = {name.removeprefix("model."): value for name, value in module.state_dict().items()}
    model.load_state_dict(adapter, strict=False)
    if options.quantization == "none":
        return model, ""
    squares = dict.fromkeys(("validated", "dequantized", "original"), 0.0)
    for name, layer in module.model.named_modules():
        if not isinstance(layer, nn.Linear) or ".lora_" in name:
            continue
        original: Any = model.get_submodule(name).weight
        parent: Any = model.get_submodule(name.removesuffix(".base_layer"))
        update = parent.get_delta_weight(ADAPTER) if name.endswith(".base_layer") else 0.0
        dequantized = _dequantized(layer)
        validated = dequantized + update
        squares["validated"] += float(validated.square().sum())
        for kind, weight in (("dequantized", dequantized), ("original", original.float())):
            merged = weight.to(original.dtype) + update
            squares[kind] += float((merged.to(original.dtype).float() - validated).square().sum())
        if base == "dequantized":
            original.copy_(dequantized)
    differences = {kind: (squares[kind] / squares["validated"]) ** 0.5 for kind in ("dequantized", "original")}
    other = "original" if base == "dequantized" else "dequantized"
    return model, (
        f"merged into the {base} weights: they differ by {differences[base]:.2%} from those that validation used; "
        f"merged into the {other} weights, they would differ by {differences[other]:.2%}"
    )


def _dequantized(layer: nn.Linear) -> Tensor:
    """Return a layer's weight (out, in) in float32 on the CPU."""
    weight: Any = layer.weight
    if isinstance(layer, Linear4bit):
        weight = bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)
    return weight.detach().float().cpu()
