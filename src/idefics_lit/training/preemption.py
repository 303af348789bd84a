"""Callbacks for signals: all ranks act on Ctrl-C, SIGTERM and SLURM's requeue signal after the same batch, and save.

`PreemptionSync` never waits for the GPU, which Lightning does before every batch.
"""

import os
import signal
import threading
from collections import deque
from functools import partial
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from idefics_lit.training.lightning_compat import replace_signal_handling, save_and_requeue, set_received_sigterm
from idefics_lit.training.run_folder import run_folder
from idefics_lit.utils.distributed import summed
from idefics_lit.utils.host_copy import HostCopy


class PreemptionSync(Callback):
    """Make all ranks of a fit act on a signal after the same batch, whichever of them receive it.

    On SIGTERM and, once training has started, on SIGINT (Ctrl-C), all ranks raise ``SIGTERMException``, whose ``code``
    is the exit code: 143 or 130. A second SIGINT ends the process at once. On the signal that SLURM sends before it
    requeues a job, all ranks save, the job is requeued, and training continues. The signal handlers only set a flag.
    The ranks sum their flags in every optimizer step and read the sum after the next one; during a validation the sum
    is read at its end, or at the batch in which a rank receives SIGTERM or SIGINT.

    In a fit with one process, Lightning's own handling of SIGTERM and of SLURM's signal applies.
    """

    def __init__(self) -> None:
        self._received_sigterm = self._received_sigint = self._received_requeue = self._requeued = False
        self._pending: deque[HostCopy] = deque()  # for each optimizer step, how many ranks have received each signal

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handling."""
        self._received_sigterm = self._received_sigint = self._received_requeue = self._requeued = False
        self._pending.clear()
        if trainer.world_size > 1:
            replace_signal_handling(
                trainer,
                on_sigterm=partial(self._on_sigterm, trainer),
                on_requeue=self._on_requeue,
                before_train_batch=partial(self._before_train_batch, trainer),
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle SIGINT until the fit ends, when Lightning restores the handlers; before, nothing would be lost.

        A program's own handler stays, and so does that of background jobs, which ignore SIGINT.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, partial(self._on_sigint, trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Set the exit code of a fit with one process, where Lightning raises the exception."""
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = _exit_code(self._received_sigint)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Start to sum the flags of all ranks."""
        if trainer.world_size > 1:
            self._pending.append(HostCopy(self._sum_flags(trainer)))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Stop a validation in which this rank receives SIGTERM or SIGINT; the other ranks stop at its end."""
        if self._received_sigterm or self._received_sigint:
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
        flags = (self._received_sigterm, self._received_sigint, self._received_requeue)
        return summed(trainer, torch.stack([torch.full((), float(flag), device=device) for flag in flags]))

    def _act(self, trainer: Trainer, counts: Tensor) -> None:
        sigterm, sigint, requeue = counts.tolist()
        if requeue and not self._requeued:
            self._requeued = True
            save_and_requeue(trainer)
        if sigterm or sigint:
            set_received_sigterm(trainer, True)
            raise SIGTERMException(_exit_code(bool(sigint)))

    def _before_train_batch(self, trainer: Trainer) -> None:
        if len(self._pending) > 1:  # the sum of the last step may not be on the CPU yet
            self._act(trainer, self._pending.popleft().result())

    def _on_sigterm(self, trainer: Trainer, signum: int, _: Any) -> None:  # noqa: ANN401
        launcher = trainer.strategy.launcher
        if not self._received_sigterm and launcher is not None:
            launcher.kill(signum)
        self._received_sigterm = True
        set_received_sigterm(trainer, trainer.state.fn != TrainerFn.FITTING)

    def _on_sigint(self, trainer: Trainer, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._received_sigint = True
        if trainer.world_size == 1:
            set_received_sigterm(trainer, True)  # Lightning raises after the batch
        if trainer.is_global_zero:
            # print raises a RuntimeError if the signal interrupts another print.
            os.write(2, b"\nstopping after this batch; press Ctrl-C again to stop at once\n")

    def _on_requeue(self, *_: object) -> None:
        self._received_requeue = True


def _exit_code(by_sigint: bool) -> int:
    return 128 + (signal.SIGINT if by_sigint else signal.SIGTERM)


class SaveOnInterrupt(Callback):
    """Save ``interrupted.ckpt`` in the run's checkpoint folder when a fit is stopped by SIGTERM or SIGINT."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on all ranks, unless no optimizer step was made."""
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != TrainerFn.FITTING:
            return
        by = "Ctrl-C" if exception.code == _exit_code(by_sigint=True) else "SIGTERM"
        if not trainer.global_step:
            rank_zero_only(print)(f"stopped by {by} before the first optimizer step: nothing to save")
            return
        loop = trainer.fit_loop
        if loop.epoch_progress.total.completed == loop.epoch_progress.total.ready:
            # Between epochs Lightning still counts the last epoch's batches, and a resumed run would skip as many.
            loop.epoch_loop.batch_progress.reset_on_run()
        path = run_folder(trainer) / "checkpoints" / "interrupted.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            print(f"stopped by {by} at step {trainer.global_step}: resume with --ckpt_path {path}, or last")
