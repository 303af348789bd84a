"""Which architecture a model has: the only place that asks."""

from typing import TYPE_CHECKING

from idefics_lit.errors import InputError
from idefics_lit.model.forward import Backbone
from idefics_lit.model.idefics2 import Idefics2Backbone
from idefics_lit.model.idefics3 import Idefics3Backbone

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BACKBONES: dict[str, type[Backbone]] = {
    "idefics2": Idefics2Backbone,
    "idefics3": Idefics3Backbone,
    "smolvlm": Idefics3Backbone,
}


def backbone_class(config: "PretrainedConfig") -> type[Backbone]:
    """Return the class of a model's forward.

    Raises:
        InputError: the package has none for the model.
    """
    if config.model_type not in BACKBONES:
        raise InputError(
            f"model.pretrained {config.name_or_path!r} is a {config.model_type}: give an Idefics2, Idefics3 or SmolVLM"
        )
    return BACKBONES[config.model_type]
