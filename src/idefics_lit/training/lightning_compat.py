"""The private names of Lightning and torch that the package uses, each with the reason.

Checked with Lightning 2.6.6 and torch 2.14.1. If an upgrade removes a name, this module's import fails. Without the
check the effect would be silent; for example, a run would no longer react to SIGTERM.
"""

import inspect
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from idefics_lit.errors import InputError, first_line


def require_private(owner: Any, *names: str) -> None:  # noqa: ANN401
    """Check that private names exist.

    Args:
        owner: the class or module that defines the names, or the class whose constructor uses them as attributes.
        names: the names.

    Raises:
        ImportError: one doesn't exist in the installed version.
    """
    classes = inspect.getmro(owner) if inspect.isclass(owner) else ()
    constructors = [inspect.unwrap(vars(kind)["__init__"]) for kind in classes if "__init__" in vars(kind)]
    attributes = {name for init in constructors if inspect.isfunction(init) for name in init.__code__.co_names}
    for name in names:
        if not hasattr(owner, name) and name not in attributes:
            raise ImportError(f"{owner.__name__} has no {name}: install the versions that pyproject.toml allows")


require_private(Trainer, "_signal_connector", "_checkpoint_connector")
require_private(_SignalConnector, "_sigterm_notifier_fn", "_slurm_sigusr_handler_fn", "received_sigterm")
require_private(_TrainingEpochLoop, "_broadcast_sigterm_tensor")
require_private(_CheckpointConnector, "_hpc_resume_path", "resume_start", "restore_datamodule", "restore_callbacks")
require_private(_CheckpointConnector, "restore_training_state")
require_private(_FitLoop, "_combined_loader")
require_private(CSVLogger, "_version")
require_private(WandbLogger, "_wandb_init")
require_private(RichProgressBar, "_get_train_description")
require_private(TensorBoardLogger, "_version")
require_private(LightningModule, "_current_fx_name")
require_private(WeightAveraging, "_average_model", "_swap_models")
require_private(DistributedDataParallel, "_ddp_params_and_buffers_to_ignore")
require_private(torch, "_foreach_mul_")
require_private(Tensor, "_backward_hooks")


def replace_signal_handling(
    trainer: Trainer,
    *,
    on_sigterm: Callable[..., None],
    on_requeue: Callable[..., None],
    before_train_batch: Callable[[], None],
) -> None:
    """Replace what Lightning does on SIGTERM, on SLURM's requeue signal, and before every training batch.

    Lightning calls collectives and saves inside its signal handlers, where the ranks may be in different batches.
    Before every batch it broadcasts whether rank 0 received SIGTERM, and waits for the GPU to read the result
    (Lightning issue 21487). There is no public way to change either.

    Args:
        trainer: the Trainer, before it registers its signal handlers.
        on_sigterm: the handler of SIGTERM, called with the signal's number and the stack frame.
        on_requeue: the handler of the signal that SLURM sends before it requeues a job, called likewise.
        before_train_batch: called without arguments in place of the broadcast.
    """
    connector: Any = trainer._signal_connector
    connector._sigterm_notifier_fn = on_sigterm
    connector._slurm_sigusr_handler_fn = on_requeue
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = before_train_batch  # type: ignore[method-assign]


def save_and_requeue(trainer: Trainer) -> None:
    """Save ``hpc_ckpt_N.ckpt`` and call ``scontrol requeue``, as Lightning's own handler does; called by all ranks."""
    connector: Any = trainer._signal_connector
    type(connector)._slurm_sigusr_handler_fn(connector, signal.SIGUSR1, None)


def set_received_sigterm(trainer: Trainer, value: bool) -> None:
    """Set ``trainer.received_sigterm``, a read-only property that ends Lightning's loops."""
    trainer._signal_connector.received_sigterm = value


class CheckpointConnector(_CheckpointConnector):
    """Lightning's checkpoint connector, but all ranks load the checkpoint of rank 0, and SLURM's only if it is given.

    If no checkpoint is given, Lightning loads ``hpc_ckpt_N.ckpt`` from the output folder, whichever run wrote it, and
    has no option against it.
    """

    _hpc_resume_path = None

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:  # noqa: ANN401
        """Load the checkpoint that rank 0 gives.

        Raises:
            InputError: this rank was given another one.
        """
        path = self.trainer.strategy.broadcast(checkpoint_path)
        if checkpoint_path and checkpoint_path != path:
            raise InputError(f"ckpt_path: rank 0 found {path}, this rank {checkpoint_path}: give it by name")
        super().resume_start(path, weights_only)

    def restore_datamodule(self) -> None:
        """Restore the data module; raise an InputError if its state is damaged, as do the next two."""
        with self._damage_as_input_error():
            super().restore_datamodule()

    def restore_callbacks(self) -> None:
        """Restore the callbacks."""
        with self._damage_as_input_error():
            super().restore_callbacks()

    def restore_training_state(self) -> None:
        """Restore loops, optimizers, schedules and the gradient scaler."""
        with self._damage_as_input_error():
            super().restore_training_state()

    @contextmanager
    def _damage_as_input_error(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"ckpt_path {self.trainer.ckpt_path}: the training's state in it can't be restored "
                f"({type(error).__name__}: {first_line(error)}): the file is damaged, take an earlier checkpoint"
            ) from error


def use_checkpoint_connector(trainer: Trainer) -> None:
    """Give a Trainer a `CheckpointConnector`."""
    trainer._checkpoint_connector = CheckpointConnector(trainer)


def close_train_dataloader(trainer: Trainer) -> None:
    """Close the training dataloader that ``trainer.estimated_stepping_batches`` opens before a checkpoint is restored.

    The fit opens it again, in the state that the checkpoint holds. Lightning would keep the open one.
    """
    trainer.fit_loop._combined_loader = None


def forget_version(logger: CSVLogger | TensorBoardLogger) -> None:
    """Let a logger choose its version again after another run has taken it; ``version`` has no setter."""
    logger._version = None


class FrozenModelExcludedFromDDP(nn.Module):
    """A module with a ``model``, whose frozen parameters and buffers DDP doesn't synchronise.

    DDP reads their names when it wraps the module, so that they are those that are frozen then. It would broadcast
    them from rank 0 at the start, and buffers in every batch. ``DDPStrategy(init_sync=False, broadcast_buffers=False)``
    is the public way, but it needs a strategy object, and ``strategy="ddp"`` would broadcast the frozen model.
    """

    model: Any

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        tensors = chain(self.model.named_parameters(), self.model.named_buffers())
        return [f"model.{name}" for name, tensor in tensors if not tensor.requires_grad]


def is_in_setup_hook(module: LightningModule) -> bool:
    """Whether a Trainer is calling the ``setup`` hooks of the callbacks or the module."""
    return module._current_fx_name == "setup"


def on_average_swap(trainer: Trainer, on_swap: Callable[[], None]) -> None:
    """Call a function when a weight-averaging callback swaps current and averaged weights, around a validation."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback._swap_models = partial(_swap_and_call, callback, on_swap)  # type: ignore[method-assign]


def _swap_and_call(callback: WeightAveraging, on_swap: Callable[[], None], module: LightningModule) -> None:
    type(callback)._swap_models(callback, module)
    on_swap()


def forget_averages(trainer: Trainer) -> None:
    """Make weight-averaging callbacks forget the weights of an earlier fit.

    In ``Trainer.validate`` Lightning would score them instead of the weights that were loaded.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback._average_model = None


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients by a 0-d tensor in one call.

    A loop over the parameters would launch a kernel for each, which takes the CPU as long as the optimizer's step.
    """
    torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], factor)


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether ``tensor.register_hook`` was called; there is no public way to ask."""
    return bool(tensor._backward_hooks)


def remove_wandb_anonymous(trainer: Trainer) -> None:
    """Keep WandbLogger from passing ``anonymous``, which wandb warns about even where the user doesn't set it."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger._wandb_init.pop("anonymous", None)


class TrainDescriptionProgressBar(RichProgressBar):
    """Lightning's progress bar, but a training without ``max_epochs`` is "Epoch 3" instead of "Epoch 3/-2".

    Lightning takes the text from a private method, and has no public text for training as for validation.
    """

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        return description if (self.trainer.max_epochs or -1) > 0 else f"Epoch {current_epoch}"
