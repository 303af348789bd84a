"""The LoRA adapter of a base model: a new one, a saved one, or that of a peft model."""

import re
import warnings
from typing import Any

import torch
from torch import nn

from idefics_lit.errors import InputError, first_line
from idefics_lit.model.lora import ADAPTER, LoRA
from idefics_lit.model.quiet_imports import peft
from idefics_lit.utils.hub import prepare_hub

# Other initializations change the base model's weights, which neither checkpoints nor adapters hold.
INITIALIZATIONS = (True, False, "gaussian", "orthogonal")


def add_lora(base: nn.Module, lora: LoRA) -> peft.PeftModel:
    """Freeze a model and add a new adapter, in float32.

    Raises:
        InputError: an option is wrong, ``target_modules`` is not a regular expression or matches no layer, or it
            matches a weight that is tied to another.
    """
    if lora.init not in INITIALIZATIONS:
        raise InputError(
            f"model.lora.init {lora.init}: it may change the base model's weights, which checkpoints don't hold: "
            f"choose gaussian, orthogonal, true or false"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated")  # peft reads it
            adapted = _train_in_float32(peft.get_peft_model(base, lora.to_peft()))
    except re.error as error:
        pattern = lora.target_modules
        raise InputError(f"model.lora.target_modules {pattern!r} is not a regular expression: {error}") from error
    except Exception as error:
        raise InputError(f"model.lora: {first_line(error)}") from error
    _check_tied(adapted)
    return adapted


def take_adapter(model: peft.PeftModel) -> peft.PeftModel:
    """Return a peft model with its adapter trained, in float32.

    Raises:
        InputError: it has other adapters than one LoRA with peft's default name, or one on a weight that is tied to
            another.
    """
    configs = model.peft_config
    if [*configs] != [ADAPTER] or not isinstance(configs[ADAPTER], peft.LoraConfig):
        kinds = ", ".join(f"{name} ({_kind(config)})" for name, config in configs.items())
        raise InputError(f"the peft model has the adapters {kinds}: give one with a LoRA adapter named {ADAPTER}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        model.set_adapter(ADAPTER)  # peft loads adapters frozen
    _check_tied(model)
    return _train_in_float32(model)


def read_adapter_options(adapter: str) -> LoRA:
    """Return the options of a saved adapter.

    Args:
        adapter: a folder or Hub id that peft reads, such as one that ``export`` wrote.

    Raises:
        InputError: there is no LoRA adapter.
    """
    prepare_hub(adapter)
    try:
        config = peft.PeftConfig.from_pretrained(adapter)
    except Exception as error:
        raise InputError(
            f"model.adapter {adapter!r}: no adapter can be read ({first_line(error)}): give a folder or Hub id with "
            f"adapter_config.json, such as one that `export` writes"
        ) from error
    if not isinstance(config, peft.LoraConfig):
        raise InputError(f"model.adapter {adapter!r} is of the kind {_kind(config)}: only LoRA can be trained")
    return LoRA.from_peft(config)


def load_adapter(model: peft.PeftModel, adapter: str) -> None:
    """Load the weights of a saved adapter.

    Args:
        model: a model with an adapter of the options of `read_adapter_options`.
        adapter: see `read_adapter_options`.

    Raises:
        InputError: the weights can't be read, don't fit the model, or aren't finite.
    """
    try:
        weights = peft.load_peft_weights(adapter, device="cpu")
        result: Any = peft.set_peft_model_state_dict(model, weights)
    except Exception as error:
        raise InputError(
            f"model.adapter {adapter!r} doesn't fit model.pretrained ({first_line(error)}): give the base model that "
            f"it was trained on"
        ) from error
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if wrong := [*result.unexpected_keys, *(name for name in result.missing_keys if name in trained)]:
        raise InputError(
            f"model.adapter {adapter!r} doesn't fit model.pretrained, {len(wrong)} weights have no counterpart, such "
            f"as {wrong[0]}: give the base model that it was trained on"
        )
    if broken := next((name for name, value in weights.items() if not value.isfinite().all()), None):
        raise InputError(f"model.adapter {adapter!r}: {broken} holds numbers that aren't finite")


def is_trained(module: nn.Module) -> bool:
    """Whether any weight of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def set_input_casts(enabled: bool, model: nn.Module, *_: object) -> None:
    """Let the adapter's layers cast their inputs to the dtype of their weights, or not; a hook can call it."""
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.cast_input_dtype_enabled = enabled


def _check_tied(model: peft.PeftModel) -> None:
    """Raise if the embedding or the head has LoRA although they share their weight.

    Merging would add the update to both, and a saved model would lose the head's.

    Raises:
        InputError: with the name of the layer.
    """
    base: Any = model.get_base_model()
    layers = {"embed_tokens": base.get_input_embeddings(), "lm_head": base.get_output_embeddings()}
    weights = {getattr(layer, "weight", None) for layer in layers.values()}
    adapted = [name for name, layer in layers.items() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    if len(weights) == 1 and adapted:
        raise InputError(
            f"model.lora.target_modules matches {adapted[0]}, but the model's embed_tokens and lm_head are one weight "
            f"(tie_word_embeddings), which LoRA can't change for one of them: leave {adapted[0]} out"
        )


def _kind(config: Any) -> str:  # noqa: ANN401
    """Return the name of an adapter's method, which is an enum or a string."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def _train_in_float32(model: peft.PeftModel) -> peft.PeftModel:
    """Convert what is trained to float32, as mixed precision needs; peft does it for LoRA's own matrices only."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model
