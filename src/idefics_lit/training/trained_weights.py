"""State dicts of a module that hold its trained weights alone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from idefics_lit.training.checkpoint_checks import check_weights


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def keep_trained(module: nn.Module, state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Delete what isn't trained from a state dict.

    Args:
        module: the module.
        state: the state dict of the module and, if it is a child, of its parents.
        prefix: of the module's names in it.
    """
    trained = {prefix + name for name in trained_parameters(module)}
    for name in [name for name in state if name.startswith(prefix) and name not in trained]:
        del state[name]
    return state


def before_loading(module: Any, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:  # noqa: ANN401
    """Load the model and check that a state dict holds its trained weights, all of them; a pre-hook.

    Raises:
        InputError: it doesn't.
    """
    module.configure_model()
    saved = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    check_weights(saved, trained_parameters(module))
    module.state_prefix = prefix


def after_loading(module: Any, incompatible_keys: Any) -> None:  # noqa: ANN401
    """Don't report the frozen weights as missing, neither here nor in a module that this is a child of; a post-hook."""
    missing: list[str] = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if not name.startswith(module.state_prefix)]
