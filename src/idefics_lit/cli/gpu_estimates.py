"""What `check` estimates the time of a fit from: measured throughput, and whether it holds for a model."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig


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
    return config.model_type == "idefics2" and sizes == (4096, 32, 1152, 27)  # Idefics3-8B has these sizes too
