"""What a checkpoint must agree in with the run that loads it, and where the run wins."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from idefics_lit.errors import InputError


def check_weights(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of trained weights.

    Raises:
        InputError: with the first that differ.
    """
    shapes = [{name: tuple(value.shape) for name, value in weights.items()} for weights in (saved, own)]
    theirs, ours = shapes
    if differing := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        first = (f"{name}: {theirs.get(name, 'none')} saved, {ours.get(name, 'none')} here" for name in differing[:3])
        raise InputError(
            f"the checkpoint belongs to another adapter, {len(differing)} weights differ ({'; '.join(first)}): "
            f"give model.pretrained and model.lora as it was trained with"
        )


def check_hyperparameters(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare what gives the weights their meaning and doesn't show in their shapes.

    Raises:
        InputError: when the adapter had another scale.
    """
    alpha, own_alpha = saved.get("lora", {}).get("alpha"), own["lora"]["alpha"]
    if alpha not in (None, own_alpha):
        raise InputError(f"the checkpoint was trained with model.lora.alpha {alpha}, this run has {own_alpha}")
    if saved.get("pretrained", own["pretrained"]) != own["pretrained"]:
        rank_zero_warn(f"The adapter was trained on {saved['pretrained']}, not on {own['pretrained']}.")


def set_rates(checkpoint: dict[str, Any], lr: float, weight_decay: float) -> None:
    """Put this run's learning rate and weight decay into the states of optimizer and schedule.

    Both remember the rates they were saved with, which would otherwise win over what the user gives.
    """
    for optimizer in checkpoint.get("optimizer_states", []):
        for group in optimizer["param_groups"]:
            group["lr"] *= lr / group["initial_lr"]
            group["initial_lr"] = lr
            group["weight_decay"] = weight_decay if group["weight_decay"] else 0.0
    for scheduler in checkpoint.get("lr_schedulers", []):
        scheduler["base_lrs"] = [lr for _ in scheduler["base_lrs"]]
