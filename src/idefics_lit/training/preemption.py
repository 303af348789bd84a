"""Callbacks for preemption: all ranks act on SIGTERM and SLURM's requeue signal after the same batch, and save.

`PreemptionSync` never waits for the GPU, which Lightning does before every batch.
"""

from collections import deque
from functools import partial
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from idefics_lit.training.lightning_compat import replace_signal_handling, save_and_requeue, set_received_sigterm
from idefics_lit.training.run_folder import run_folder
from idefics_lit.utils.distributed import summed
from idefics_lit.utils.host_copy import HostCopy


class PreemptionSync(Callback):
    """Make all ranks of a fit act on a signal after the same batch, whichever of them receive it.

    On SIGTERM all ranks raise ``SIGTERMException``. On the signal that SLURM sends before it requeues a job, all ranks
    save, the job is requeued, and training continues. The signal handlers only set a flag. The ranks sum their flags in
    every optimizer step and read the sum after the next one; during a validation the sum is read at its end, or at the
    batch in which a rank receives SIGTERM.

    In a fit with one process the callback does nothing, and Lightning's own handling applies.
    """

    def __init__(self) -> None:
        self._received_sigterm = self._received_requeue = self._requeued = False
        self._pending: deque[HostCopy] = deque()  # for each optimizer step, how many ranks have received each signal

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handling."""
        self._received_sigterm = self._received_requeue = self._requeued = False
        self._pending.clear()
        if trainer.world_size > 1:
            replace_signal_handling(
                trainer,
                on_sigterm=partial(self._on_sigterm, trainer),
                on_requeue=self._on_requeue,
                before_train_batch=partial(self._before_train_batch, trainer),
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Start to sum the flags of all ranks."""
        if trainer.world_size > 1:
            self._pending.append(HostCopy(self._sum_flags(trainer)))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Stop a validation in which this rank receives SIGTERM; the other ranks stop at its end."""
        if self._received_sigterm:
            self._synchronize(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on the signals that any rank received during a validation."""
        self._synchronize(trainer)

    def _synchronize(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and trainer.state.fn == TrainerFn.FITTING:
            self._act(trainer, self._sum_flags(trainer))

    def _sum_flags(self, trainer: Trainer) -> Tensor:
        # torch.full fills on the GPU; a copy from the CPU would wait for it.
        device = trainer.strategy.root_device
        flags = (self._received_sigterm, self._received_requeue)
        return summed(trainer, torch.stack([torch.full((), float(flag), device=device) for flag in flags]))

    def _act(self, trainer: Trainer, counts: Tensor) -> None:
        sigterm, requeue = counts.tolist()
        if requeue and not self._requeued:
            self._requeued = True
            save_and_requeue(trainer)
        if sigterm:
            set_received_sigterm(trainer, True)
            raise SIGTERMException

    def _before_train_batch(self, trainer: Trainer) -> None:
        if len(self._pending) > 1:  # the sum of the last step may not be on the CPU yet
            self._act(trainer, self._pending.popleft().result())

    def _on_sigterm(self, trainer: Trainer, signum: int, _: Any) -> None:  # noqa: ANN401
        launcher = trainer.strategy.launcher
        if not self._received_sigterm and launcher is not None:
            launcher.kill(signum)
        self._received_sigterm = True
        set_received_sigterm(trainer, trainer.state.fn != TrainerFn.FITTING)

    def _on_requeue(self, *_: object) -> None:
        self._received_requeue = True


class SaveOnSigterm(Callback):
    """Save ``sigterm.ckpt`` in the run's checkpoint folder when a fit is stopped by SIGTERM."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on all ranks, unless no optimizer step was made."""
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and trainer.global_step:
            loop = trainer.fit_loop
            if loop.epoch_progress.total.completed == loop.epoch_progress.total.ready:
                # Between epochs Lightning still counts the last epoch's batches, and a resumed run would skip as many.
                loop.epoch_loop.batch_progress.reset_on_run()
            path = run_folder(trainer) / "checkpoints" / "sigterm.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            if trainer.is_global_zero:
                print(f"stopped by SIGTERM at step {trainer.global_step}: resume with --ckpt_path {path}, or last")
