"""The options of the adapter and of quantization."""

from dataclasses import dataclass
from typing import Literal

Quantization = Literal["nf4", "none"]

# From the recipe: the attention projections of text model and resampler, the modality projection, and the head.
TARGET_MODULES = r".*(text_model|modality_projection|perceiver_resampler).*(k_proj|q_proj|v_proj|o_proj).*|lm_head$"


@dataclass
class LoRA:
    """Low-rank adaptation, https://arxiv.org/abs/2106.09685; the defaults are those of the recipe.

    Args:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: dropout probability of the adapter's input.
        init: initialization of the adapter, see peft's ``init_lora_weights``.
        target_modules: regular expression of the layers that get an adapter.
    """

    r: int = 8
    alpha: int = 8
    dropout: float = 0.1
    init: str = "gaussian"
    target_modules: str = TARGET_MODULES
