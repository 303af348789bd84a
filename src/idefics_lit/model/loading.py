"""Load Idefics2, quantized to 4 bits or not, and add LoRA.

peft's ``prepare_model_for_kbit_training`` is not used: it casts embeddings, norms and head to float32 and puts the
frozen vision tower into autograd. LoRA weights are float32 under mixed precision. On a CPU, bitsandbytes' inference
kernels are disabled: they have no gradient and repack a layer's weight permanently.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from lightning.pytorch.utilities import rank_zero_warn
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from idefics_lit.errors import InputError
from idefics_lit.model.compat import configure_compile
from idefics_lit.model.lora import LoRA, Quantization
from idefics_lit.pretrained import cannot_load, refuse_adapter, resolve


def load_model(
    pretrained: str,
    *,
    quantization: Quantization,
    quantize_vision: bool = True,
    dequantize: bool = False,
    lora: LoRA,
    dtype: torch.dtype,
    device: torch.device,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
) -> PeftModel:
    """Load Idefics2 onto a device, in train mode, with all weights frozen but those of a new adapter.

    Args:
        pretrained: a Hub id or a folder, see `idefics_lit.pretrained.resolve`.
        quantization: ``nf4`` (4 bits, double quantization, https://arxiv.org/abs/2305.14314) or ``none``.
        quantize_vision: quantize the vision tower too.
        dequantize: dequantize the 4-bit weights once, instead of at every use.
        lora: the adapter.
        dtype: of weights that aren't quantized, and of computation.
        device: the target device.
        gradient_checkpointing: store one activation a layer and recompute the others.
        compiled: compile the layers, each kind once, and the other modules that process all patches.

    Raises:
        InputError: the model doesn't exist, is an adapter or lacks a weight, or ``target_modules`` matches no layer.
    """
    refuse_adapter(pretrained)
    # Run no code of a model repository: neither Python modules nor pickles.
    options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
    options |= {"dtype": dtype, "device_map": {"": device}}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head"] if quantize_vision else ["lm_head", "model.vision_model"],
        )
    options |= {"output_loading_info": True}
    try:
        with _quiet():  # `_check_complete` reports missing and unexpected weights
            loaded: Any = AutoModelForImageTextToText.from_pretrained(resolve(pretrained), **options)
    except Exception as error:
        raise cannot_load("model", pretrained, error) from error
    base: PreTrainedModel = loaded[0]
    _check_complete(pretrained, loaded[1])
    _check_finite(pretrained, base)
    if device.type == "cpu":
        for layer in base.modules():
            if isinstance(layer, Linear4bit):
                # The first evaluation would permanently repack the weight for a kernel without autograd.
                layer.support_avx512bf16_for_cpu = False
    if dequantize and quantization != "none":
        with _quiet():  # it warns about dequantization
            base = base.dequantize(dtype)
    model = add_lora(base, lora)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # Its hooks make the inputs of every sub-model require gradients, also those of the frozen vision tower.
        model.disable_input_require_grads()
    if compiled:
        configure_compile()
        resampler = base.model.connector.perceiver_resampler
        for module in (
            *base.model.vision_model.encoder.layers,
            base.model.connector.modality_projection,
            *(layer.input_context_norm for layer in resampler.layers),
            *base.model.text_model.layers,
        ):
            module.compile(dynamic=True)
    # transformers loads in eval mode, which disables gradient checkpointing, and Lightning restores each module's mode.
    return model.train()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _check_complete(pretrained: str, report: Mapping[str, Collection[str]]) -> None:
    """Raise if weights are missing, which would be random, and warn of unexpected ones.

    Args:
        pretrained: the model that was loaded.
        report: transformers' loading info; it lists no weights that are tied to others.

    Raises:
        InputError: weights are missing; the message names the first.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    others = f"{len(unexpected)} weights that the model doesn't use, such as {unexpected[0]}" if unexpected else ""
    if missing:
        instead = f", and has {others}" if others else ""
        raise InputError(
            f"model.pretrained {pretrained!r} lacks {len(missing)} of the model's weights, such as {missing[0]}"
            f"{instead}: fetch or convert it again"
        )
    if others:
        rank_zero_warn(f"model.pretrained {pretrained!r} has {others}; they are ignored.")


def _check_finite(pretrained: str, base: nn.Module) -> None:
    """Refuse a base model with weights that aren't finite; 4-bit weights are checked by the maxima of their blocks.

    Raises:
        InputError: with the first such weight.
    """
    for name, weight in base.named_parameters():
        value: Any = weight
        if isinstance(weight, Params4bit):
            state: Any = weight.quant_state
            value = torch.stack([state.state2.absmax.sum(), state.offset]) if state.nested else state.absmax
        # The minimum and maximum are NaN if a value is; unlike isfinite, they need no tensor of the weight's size.
        if value.is_floating_point() and value.numel() and not torch.stack(value.detach().aminmax()).isfinite().all():
            raise InputError(
                f"model.pretrained {pretrained!r}: {name} holds numbers that aren't finite in {weight.dtype}: fetch or "
                f"convert it again, or give another trainer.precision"
            )


def add_lora(base: nn.Module, lora: LoRA) -> PeftModel:
    """Freeze a model and add a new adapter.

    Raises:
        InputError: ``target_modules`` is not a regular expression or matches no layer.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        init_lora_weights=lora.init,  # type: ignore[arg-type]
        target_modules=lora.target_modules,
    )
    try:
        return get_peft_model(base, config)
    except re.error as error:
        pattern = lora.target_modules
        raise InputError(f"model.lora.target_modules {pattern!r} is not a regular expression: {error}") from error
    except Exception as error:
        raise InputError(f"model.lora: {error}") from error


def is_vision_trained(model: PeftModel) -> bool:
    """Whether the vision tower has an adapter."""
    base: Any = model.get_base_model()
    return any(parameter.requires_grad for parameter in base.model.vision_model.parameters())
