"""The options of the adapter and of quantization."""

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

Quantization = Literal["nf4", "none"]

# From the recipe: the attention projections of the text model and of Idefics2's resampler, and the head. Added for
# Idefics3 and SmolVLM: the connector's only layer, which the recipe's pattern doesn't match.
TARGET_MODULES = (
    r".*(text_model|modality_projection|perceiver_resampler).*(k_proj|q_proj|v_proj|o_proj).*"
    r"|.*modality_projection\.proj|lm_head$"
)

ADAPTER = "default"  # peft's name of an adapter that is given none
# peft's names of the options that `LoRA` has itself.
NAMES = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "init": "init_lora_weights",
    "target_modules": "target_modules",
}
# Fields of a LoraConfig that describe a saved adapter instead of the one to add.
DESCRIPTION = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    "runtime_config",
}


def unquantized_modules(*, quantize_vision: bool) -> tuple[str, ...]:
    """Return the modules that keep 16 bits under NF4: the head, the connector of Idefics3 and SmolVLM, which is small.

    Args:
        quantize_vision: quantize the vision tower.
    """
    small = ("lm_head", "model.connector.modality_projection.proj")
    return small if quantize_vision else (*small, "model.vision_model")


@dataclass
class LoRA:
    """Low-rank adaptation, https://arxiv.org/abs/2106.09685; the defaults are those of the recipe.

    Args:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: dropout probability of the adapter's input.
        init: initialization of the adapter, see peft's ``init_lora_weights``.
        target_modules: regular expression, or list of names, of the layers that get an adapter.
        options: further arguments of peft's LoraConfig, such as use_rslora, use_dora or modules_to_save.
    """

    r: int = 8
    alpha: int = 8
    dropout: float = 0.1
    init: bool | str = "gaussian"
    target_modules: str | list[str] = TARGET_MODULES
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_peft(cls, config: "PeftConfig") -> "LoRA":
        """Return the options of a peft ``LoraConfig`` as plain types, which checkpoints hold."""
        defaults = type(config)()
        own = {name: _plain(getattr(config, theirs)) for name, theirs in NAMES.items()}
        others = {item.name for item in fields(config)} - {*NAMES.values()} - DESCRIPTION
        changed = {name for name in others if getattr(config, name) != getattr(defaults, name)}
        return cls(**own, options={name: _plain(getattr(config, name)) for name in sorted(changed)})

    def to_peft(self) -> "LoraConfig":
        """Return the options as a peft ``LoraConfig``.

        Raises:
            TypeError: ``options`` names an argument that the installed peft doesn't have.
            ValueError: an option has a wrong value.
        """
        from idefics_lit.model.quiet_imports import peft  # takes seconds to import

        options: dict[str, Any] = {theirs: getattr(self, name) for name, theirs in NAMES.items()}
        return peft.LoraConfig(**options, **self.options)


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value
