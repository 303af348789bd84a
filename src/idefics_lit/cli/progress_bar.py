"""The progress bar."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from idefics_lit.evaluation.answer import mean_anls


class ProgressBar(RichProgressBar):
    """Lightning's bar counting batches where it counts steps, without the run's number or endless epochs.

    An evaluation's says the score so far and the questions a second.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, Any] = {}
        self.read_at = 0.0

    @property
    def total_train_batches(self) -> int | float:
        """Return the batches of this epoch; Lightning takes the optimizer steps that are left for batches."""
        trainer = self.trainer
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        # At an epoch's start the last epoch's batches still stand there.
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed % max(int(trainer.num_training_batches), 1)
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, done + left)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what the bar shows, in training a second old at most: to read it is to wait for the GPU."""
        if not trainer.training or time.perf_counter() - self.read_at > 1:
            self.shown = {k: value for k, value in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
            self.read_at = time.perf_counter()
        return self.shown

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count seconds."""
        super().on_validation_start(trainer, pl_module)
        self.started = time.perf_counter()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count seconds."""
        super().on_test_start(trainer, pl_module)
        self.started = time.perf_counter()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Say how it goes."""
        super().on_validation_batch_end(trainer, pl_module, *args)
        if not trainer.sanity_checking:
            self._describe(self.val_progress_bar_id, pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Say how it goes."""
        super().on_test_batch_end(trainer, pl_module, *args)
        self._describe(self.test_progress_bar_id, pl_module)

    def _describe(self, bar: Any, module: Any) -> None:  # noqa: ANN401
        if self.progress is None or bar is None or not module.answers:
            return
        rate = len(module.answers) / (time.perf_counter() - self.started)
        self.progress.update(bar, description=f"ANLS {mean_anls(module.answers):.3f}, {rate:.0f}/s")

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        return description if (self.trainer.max_epochs or -1) > 0 else f"Epoch {current_epoch}"
