"""The trained weights of a module, which alone are saved, copied for weight averaging, and synchronised by DDP."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn

from idefics_lit.errors import InputError
from idefics_lit.training.checkpoint_checks import check_weights
from idefics_lit.training.lightning_compat import (
    FrozenModelExcludedFromDDP,
    forget_averages,
    is_in_setup_hook,
    on_average_swap,
)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def copy_trained(module: nn.Module) -> nn.Module:
    """Return a module with copies of the trained parameters alone, under the same names and in the same order."""
    copied = nn.Module()
    for name, parameter in trained_parameters(module).items():
        *path, last = name.split(".")
        parent = copied
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(last, nn.Parameter(parameter.detach().clone()))
    return copied


class TrainedWeightsModule(FrozenModelExcludedFromDDP, LightningModule):
    """A LightningModule whose ``model`` is mostly frozen; a subclass loads it in ``configure_model``.

    - A state dict holds the trained weights alone, also as part of a parent's. ``load_state_dict`` loads the model if
      necessary and refuses a state dict that lacks trained weights or holds others.
    - Lightning's callbacks that average weights copy, average and save the trained weights alone. They deep-copy the
      module, pair the parameters of module and copy in order, and save the copy's state dict. The 4-bit weights of a
      base model have no average.
    - DDP synchronises the trained weights alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._averaged_names: list[str] = []  # of the weights that a callback averages, in the order of its copy
        self._holds_average = False  # during a validation
        self.state_prefix = ""  # of the names in the state dict that is being loaded
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)

    @property
    def attached_trainer(self) -> Trainer | None:
        """The Trainer, or None; ``trainer`` raises without one."""
        try:
            return self.trainer
        except RuntimeError:  # Lightning's: there is none
            return None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ANN401
        """Return the trained weights alone."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix: str = kwargs.get("prefix", "")
        trained = {prefix + name for name in trained_parameters(self)}
        for name in [name for name in state if name.startswith(prefix) and name not in trained]:
            del state[name]
        return state

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return all parameters, those that a callback averages first."""
        parameters = dict(self.named_parameters(recurse=recurse))
        yield from [parameters.pop(name) for name in self._averaged_names if name in parameters]
        yield from parameters.values()

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Return all buffers; none in a fit in which a callback averages weights, since they have no average."""
        trainer = self.attached_trainer
        fits = (
            trainer is not None
            and trainer.state.fn == TrainerFn.FITTING
            and trainer.state.status == TrainerStatus.RUNNING
        )
        return iter(()) if fits and self._averaged_names else super().buffers(recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Return a copy; a callback that averages weights gets the trained weights alone."""
        if self._is_copied_to_average():
            self.configure_model()
            copied = copy_trained(self)
            # The callbacks pair the parameters, and then the buffers, of the copy and this module in order.
            self._averaged_names = [name for name, _ in copied.named_parameters()]
            self._holds_average = False
            on_average_swap(self.trainer, self._on_average_swap)
            return copied
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(deepcopy(self.__getstate__(), memo))
        return other

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save averaged weights as averaged ones also while the module holds them, in a validation that is stopped."""
        if self._holds_average and "current_model_state" in checkpoint:
            averaged, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = averaged, current

    def _on_average_swap(self) -> None:
        self._holds_average = not self._holds_average

    def _is_copied_to_average(self) -> bool:
        trainer: Any = self.attached_trainer
        if trainer is None or trainer.lightning_module is None or not is_in_setup_hook(trainer.lightning_module):
            return False
        if not any(isinstance(c, WeightAveraging | StochasticWeightAveraging) for c in trainer.callbacks):
            return False
        root = trainer.lightning_module
        if root is not self and any(not parameter.is_floating_point() for parameter in self.parameters()):
            raise InputError(
                f"trainer.callbacks: the weights of a {type(root).__name__} can't be averaged, since its "
                f"{type(self).__name__} is quantized: give it quantization='none'"
            )
        return root is self


def _before_loading(module: TrainedWeightsModule, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Load the model and check that a state dict holds its trained weights, all of them."""
    module.configure_model()
    trainer = module.attached_trainer
    if trainer is not None and trainer.state.fn != TrainerFn.FITTING:
        forget_averages(trainer)
    saved = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    check_weights(saved, trained_parameters(module))
    module.state_prefix = prefix


def _after_loading(module: TrainedWeightsModule, incompatible_keys: Any) -> None:  # noqa: ANN401
    """Don't report the frozen weights as missing, neither here nor in a module that this is a child of."""
    missing: list[str] = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if not name.startswith(module.state_prefix)]
