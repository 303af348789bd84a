"""Callbacks that stop training on a NaN or infinite loss, or on repeated float16 overflow."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from idefics_lit.errors import InputError
from idefics_lit.utils.host_copy import HostCopy

# The initial scale of float16 is 65,536 = 2**16. After 20 halvings it is below 1, where scaling no longer helps.
MAX_SKIPPED_STEPS = 20


class FiniteLossCheck(Callback):
    """Stop training when a loss is NaN or infinite, and name the batch's questions, if it has ``question_ids``.

    The loss is copied to the CPU without waiting for the GPU, so that the error may be raised some batches later. A
    checkpoint is only saved once all losses before it are known to be finite.

    Raises:
        InputError: a loss isn't finite.
    """

    def __init__(self) -> None:
        self._batch_name = ""
        self._pending: deque[tuple[HostCopy, str]] = deque()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the losses of an earlier fit."""
        self._pending.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Remember the batch for the error message."""
        ids = batch.get("question_ids") if isinstance(batch, Mapping) else getattr(batch, "question_ids", None)
        self._batch_name = f"questions {', '.join(map(str, ids))}" if ids else f"batch {batch_idx}"

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Start to copy the loss and check those that have been copied."""
        self._pending.append((HostCopy(loss), self._batch_name))
        self._check(wait=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check all losses before a checkpoint is written."""
        self._check(wait=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the last losses."""
        self._check(wait=True)

    def _check(self, *, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][0].ready):
            copy, batch_name = self._pending.popleft()
            loss = copy.result()
            if not loss.isfinite():
                raise InputError(
                    f"the loss of {batch_name} is {float(loss)}: lower model.lr or give --trainer.precision "
                    f"bf16-mixed; the checkpoints written so far are from before it"
                )


class OverflowCheck(Callback):
    """Stop float16 training when `MAX_SKIPPED_STEPS` optimizer steps in a row overflow and are skipped.

    Raises:
        InputError: they did.
    """

    def __init__(self) -> None:
        self._scale, self._skipped_steps = 0.0, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._scale, self._skipped_steps = 0.0, 0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Count the skipped steps; the gradient scaler lowers its scale when it skips one."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return
        scale = scaler.get_scale()
        self._skipped_steps = self._skipped_steps + 1 if scale < self._scale else 0
        self._scale = scale
        if self._skipped_steps == MAX_SKIPPED_STEPS:
            raise InputError(
                f"float16 overflowed in {MAX_SKIPPED_STEPS} optimizer steps in a row, which were skipped: give "
                f"--trainer.precision bf16-mixed if the GPU supports it, otherwise lower model.lr"
            )
