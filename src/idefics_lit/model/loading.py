"""Load a model, quantized to 4 bits or not, and add LoRA.

peft's ``prepare_model_for_kbit_training`` is not used: it casts embeddings, norms and head to float32 and puts the
frozen vision tower into autograd. LoRA weights are float32 under mixed precision. On a CPU, bitsandbytes' inference
kernels are disabled: they have no gradient and repack a layer's weight permanently.
"""

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel, ProcessorMixin

from idefics_lit.errors import InputError
from idefics_lit.model.adapter import add_lora, load_adapter, take_adapter
from idefics_lit.model.architecture import backbone_class
from idefics_lit.model.compat import configure_compile
from idefics_lit.model.lora import LoRA, Quantization, unquantized_modules
from idefics_lit.model.quiet_imports import Linear4bit, Params4bit, peft
from idefics_lit.model.vision_mlp import fuse_vision_mlps
from idefics_lit.pretrained import cannot_load, quiet_transformers, refuse_adapter, resolve


def load_model(
    pretrained: str,
    *,
    quantization: Quantization,
    quantize_vision: bool = True,
    dequantize: bool = False,
    lora: LoRA,
    adapter: str | None = None,
    dtype: torch.dtype,
    device: torch.device,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
    prepare_base: Callable[[PreTrainedModel], None] | None = None,
    model: PreTrainedModel | peft.PeftModel | None = None,
) -> peft.PeftModel:
    """Load a model onto a device, in train mode, with all weights frozen but those of an adapter.

    Args:
        pretrained: a Hub id or a folder, see `idefics_lit.pretrained.resolve`.
        quantization: ``nf4`` (4 bits, double quantization, https://arxiv.org/abs/2305.14314) or ``none``.
        quantize_vision: quantize the vision tower too.
        dequantize: dequantize the 4-bit weights once, instead of at every use.
        lora: the adapter.
        adapter: the folder or Hub id of a saved adapter with the options ``lora``, to start from its weights.
        dtype: of weights that aren't quantized, and of computation.
        device: the target device.
        gradient_checkpointing: store one activation a layer and recompute the others.
        compiled: compile the layers, each kind once, and other modules that process all patches.
        prepare_base: called with the base model before the adapter is added.
        model: a base model that is loaded already, or one with a LoRA adapter of peft's, to use instead of loading.

    Raises:
        InputError: the model doesn't exist, is an adapter or lacks a weight, ``target_modules`` matches no layer, or
            the saved adapter doesn't fit.
    """
    if isinstance(model, peft.PeftModel):
        adapted, base = take_adapter(model), model.get_base_model()
        _disable_inference_kernels(base)
    else:
        if model is None:
            model = _load_base(pretrained, quantization, quantize_vision, dequantize, dtype, device)
        _disable_inference_kernels(model)
        tokens = _embedding_rows(model)
        if prepare_base is not None:
            with torch.random.fork_rng():
                torch.manual_seed(0)  # new weights are the same each time: checkpoints hold only those that are trained
                prepare_base(model)
        adapted, base = add_lora(model, lora), model
        added = _embedding_rows(base) - tokens
        if added and not any(parameter.requires_grad for parameter in base.get_input_embeddings().parameters()):
            rank_zero_warn(
                f"prepare_base added {added} rows to the embedding, which are neither trained nor in checkpoints: name "
                f"embed_tokens and lm_head in model.lora.options.modules_to_save."
            )
        if adapter is not None:
            load_adapter(adapted, adapter)
    if gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable. is deprecated")  # peft calls it
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        # Its hooks make the inputs of every sub-model require gradients, also those of the frozen vision tower.
        adapted.disable_input_require_grads()
    fuse_vision_mlps(base)
    if compiled:
        _compile(base)
    # transformers loads in eval mode, which disables gradient checkpointing, and Lightning restores each module's mode.
    return adapted.train()


def _load_base(
    pretrained: str,
    quantization: Quantization,
    quantize_vision: bool,
    dequantize: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
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
            llm_int8_skip_modules=list(unquantized_modules(quantize_vision=quantize_vision)),
        )
    options |= {"output_loading_info": True}
    try:
        with quiet_transformers():  # `_check_complete` reports missing and unexpected weights
            loaded: Any = AutoModelForImageTextToText.from_pretrained(resolve(pretrained), **options)
    except Exception as error:
        raise cannot_load("model", pretrained, error) from error
    base: PreTrainedModel = loaded[0]
    _check_complete(pretrained, loaded[1])
    _check_finite(pretrained, base)
    if dequantize and quantization != "none":
        with quiet_transformers():  # it warns about dequantization
            base = base.dequantize(dtype)
    return base


def _embedding_rows(model: Any) -> int:  # noqa: ANN401
    """Return the number of tokens of the embedding, which peft may have wrapped."""
    return int(model.get_input_embeddings().weight.shape[0])


def _disable_inference_kernels(base: nn.Module) -> None:
    """Keep the first evaluation from permanently repacking 4-bit weights on a CPU, for a kernel without autograd."""
    for layer in base.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def _compile(base: Any) -> None:  # noqa: ANN401
    configure_compile()
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with suppress(OSError, RuntimeError):  # there may be no home; torch's default is below /tmp, for one boot
            folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "idefics_lit" / "compiled"
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    for module in backbone_class(base.config).compiled_modules(base):
        module.compile(dynamic=True)


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


def check_vocabulary(pretrained: str, processor: ProcessorMixin, model: peft.PeftModel) -> None:
    """Check that the embedding has a row for each token of the tokenizer.

    Raises:
        InputError: it doesn't.
    """
    tokens, rows = len(processor.tokenizer), _embedding_rows(model)
    if tokens > rows:
        raise InputError(
            f"model.pretrained {pretrained!r}: its tokenizer has {tokens} tokens but its embedding only {rows} rows: "
            f"give a model that was trained with them (idefics2-8b, not idefics2-8b-base)"
        )
