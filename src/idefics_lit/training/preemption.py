"""SIGTERM and SLURM's warning, which end a fit or queue it again: all ranks answer behind the same batch.

What is special here: nothing waits for the GPU. Lightning (2.6) broadcasts before every batch whether rank 0 received
SIGTERM and reads that from the GPU, which stands still until it is given new work (its issue 21487); and it broadcasts
and saves in the handlers, wherever each rank happens to be.
"""

import signal
from collections import deque
from functools import partial
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from idefics_lit.training.run_folder import run_folder
from idefics_lit.utils.distributed import summed
from idefics_lit.utils.host_copy import HostCopy


class Signals:
    """What the ranks of a fit received, and did together; one process alone does as Lightning does.

    Args:
        trainer: before it registers its handlers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = cast(Any, trainer)  # much of what follows is private to it
        self.sigterm = self.warned = self.requeued = False
        self._answers: deque[HostCopy] = deque()  # how many ranks received each, step by step
        self._connector = self.trainer._signal_connector
        self._requeue = partial(type(self._connector)._slurm_sigusr_handler_fn, self._connector)
        if trainer.world_size > 1:
            self._connector._sigterm_notifier_fn = self._on_sigterm
            self._connector._slurm_sigusr_handler_fn = self._on_warning
            self.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self._before_batch

    def ask(self) -> None:
        """Ask all ranks in an optimizer step what they received; they answer behind the next one."""
        if self.trainer.world_size > 1:
            self._answers.append(HostCopy(self._counts()))

    def answer(self) -> None:
        """Do in a fit's validation what was asked for; all ranks must call it, behind the last batch or before one.

        Raises:
            SIGTERMException: on all ranks, when one received SIGTERM.
        """
        if self.trainer.world_size > 1 and self.trainer.state.fn == TrainerFn.FITTING:
            self._do(self._counts())

    def _counts(self) -> Tensor:
        # Filled on the GPU: a number that is brought there waits for it.
        device = self.trainer.strategy.root_device
        received = [torch.full((), float(value), device=device) for value in (self.sigterm, self.warned)]
        return summed(self.trainer, torch.stack(received))

    def _do(self, counts: Tensor) -> None:
        sigterm, warned = counts.tolist()
        if warned and not self.requeued:
            self.requeued = True
            self._requeue(signal.SIGUSR1, None)
        if sigterm:
            self._connector.received_sigterm = True
            raise SIGTERMException

    def _before_batch(self) -> None:
        if len(self._answers) > 1:  # the last step's is still on its way
            self._do(self._answers.popleft().result())

    def _on_sigterm(self, signum: int, _: Any) -> None:  # noqa: ANN401
        if not self.sigterm and (launcher := self.trainer.strategy.launcher) is not None:
            launcher.kill(signum)
        self.sigterm = True
        self._connector.received_sigterm = self.trainer.state.fn != TrainerFn.FITTING

    def _on_warning(self, *_: Any) -> None:  # noqa: ANN401
        self.warned = True


class SaveOnSigterm(Callback):
    """Save ``sigterm.ckpt`` when a scheduler asks a fit to end."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, on all ranks, once there is something to save."""
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and trainer.global_step:
            loop = trainer.fit_loop
            if loop.epoch_progress.total.completed == loop.epoch_progress.total.ready:
                # Between epochs Lightning has not yet forgotten the last one's batches, and would skip the next one's.
                loop.epoch_loop.batch_progress.reset_on_run()
            path = run_folder(trainer) / "checkpoints" / "sigterm.ckpt"
            trainer.save_checkpoint(path, weights_only=False)  # more than the weights
            if trainer.is_global_zero:
                print(f"stopped by SIGTERM at step {trainer.global_step}: go on with --ckpt_path {path}, or last")
