"""Checks of the options of `Idefics2Module`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from idefics_lit.errors import InputError
from idefics_lit.model.lora import LoRA
from idefics_lit.pretrained import resolve


def check_options(options: Any) -> None:  # noqa: ANN401
    """Check the hyperparameters of an `Idefics2Module`.

    Raises:
        InputError: one is out of range, or two exclude each other.
    """
    for name, minimum in (("warmup_steps", 0), ("max_new_tokens", 1)):
        if options[name] < minimum:
            raise InputError(f"model.{name} {options[name]}: give {minimum} or more")
    if options.cuda_graphs and options.gradient_checkpointing:
        raise InputError("model.cuda_graphs can't capture model.gradient_checkpointing: leave one of them out")
    if options.lr <= 0:
        raise InputError(f"model.lr {options.lr}: give a learning rate above 0")
    if options.weight_decay < 0:
        raise InputError(f"model.weight_decay {options.weight_decay}: give 0 or more")
    if options.feature_cache_gb <= 0:
        raise InputError(f"model.feature_cache_gb {options.feature_cache_gb}: give more than 0")
    if options.lora["alpha"] <= 0:
        raise InputError(f"model.lora.alpha {options.lora['alpha']}: give more than 0, the adapter's scale")


def plain_lora_options(lora: Any, adapter: str | None) -> dict[str, Any]:  # noqa: ANN401
    """Return the adapter's options in plain types, since checkpoints load with weights_only.

    Args:
        lora: a `LoRA`, a peft ``LoraConfig``, or the options of a `LoRA` by name.
        adapter: a saved adapter, whose options replace ``lora``.

    Raises:
        InputError: ``adapter`` isn't an adapter, or ``lora`` has other options than it.
    """
    if not isinstance(lora, LoRA):
        lora = LoRA(**lora) if isinstance(lora, Mapping) else LoRA.from_peft(lora)
    if adapter is not None:
        from idefics_lit.model.adapter import read_adapter_options  # imports peft

        saved = read_adapter_options(adapter)
        if lora not in (LoRA(), saved):
            raise InputError(f"model.lora: model.adapter {adapter} has other options, {saved}: leave model.lora out")
        lora = saved
    return asdict(lora)


def read_training_options(name: str) -> dict[str, Any]:
    """Return the options that an adapter or merged model of ``export`` was trained with; empty for others.

    Args:
        name: its folder or Hub id.
    """
    facts = _read_facts(name)
    try:
        saved = {"hyper_parameters": facts["model"], "datamodule_hyper_parameters": facts["data"]}
        return {**saved, "temperature": float(facts.get("temperature", 1.0))}
    except (LookupError, TypeError, ValueError):
        return {}


def is_merged(pretrained: str) -> bool:
    """Return whether a folder or Hub id is a merged model that ``export`` wrote."""
    facts = _read_facts(pretrained)
    return isinstance(facts, Mapping) and facts.get("merged") is True


def _read_facts(name: str) -> Any:  # noqa: ANN401
    """Return ``idefics_lit.json`` of a folder or Hub id; None if there is none."""
    try:
        return json.loads(Path(str(cached_file(resolve(name), "idefics_lit.json"))).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
