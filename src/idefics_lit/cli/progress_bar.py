"""The progress bar."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.progress import ProgressColumn, Task
from rich.text import Text

from idefics_lit.evaluation.answer import mean_anls
from idefics_lit.training.lightning_compat import TrainDescriptionProgressBar


class SpeedColumn(ProcessingSpeedColumn):
    """Batches per second, from the first batch on; Lightning's column shows 0 until the second."""

    def render(self, task: Task) -> Text:
        """Return the speed, on average until there is a current one."""
        speed = task.speed or (task.completed / task.elapsed if task.elapsed else 0.0)
        return Text(f"{speed:.2f}it/s", style=self.style)


class ProgressBar(TrainDescriptionProgressBar):
    """Lightning's progress bar, which counts batches correctly with ``max_steps`` and shows no run version.

    In validation and test it shows the mean ANLS so far and the questions per second.
    """

    def __init__(self) -> None:
        super().__init__()
        self._metrics: dict[str, Any] = {}
        self._metrics_time = 0.0

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Return Lightning's columns with `SpeedColumn`."""
        columns = super().configure_columns(trainer)
        return [SpeedColumn(c.style) if isinstance(c, ProcessingSpeedColumn) else c for c in columns]

    @property
    def total_train_batches(self) -> int | float:
        """The batches of this epoch. Lightning's property compares optimizer steps with batches."""
        trainer = self.trainer
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        # At the start of an epoch the progress still counts the batches of the previous one.
        completed = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        completed %= max(int(trainer.num_training_batches), 1)
        remaining = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, completed + remaining)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics to show, in training at most once a second: reading them waits for the GPU."""
        if not trainer.training or time.perf_counter() - self._metrics_time > 1:
            metrics = super().get_metrics(trainer, pl_module)
            self._metrics = {name: value for name, value in metrics.items() if name != "v_num"}
            self._metrics_time = time.perf_counter()
        return self._metrics

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_validation_start(trainer, pl_module)
        self._evaluation_start = time.perf_counter()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_test_start(trainer, pl_module)
        self._evaluation_start = time.perf_counter()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Show the score so far, except in the sanity check."""
        super().on_validation_batch_end(trainer, pl_module, *args)
        if not trainer.sanity_checking:
            self._show_score(self.val_progress_bar_id, pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Show the score so far."""
        super().on_test_batch_end(trainer, pl_module, *args)
        self._show_score(self.test_progress_bar_id, pl_module)

    def _show_score(self, bar_id: Any, module: Any) -> None:  # noqa: ANN401
        if self.progress is None or bar_id is None or not module.answers:
            return
        rate = len(module.answers) / (time.perf_counter() - self._evaluation_start)
        self.progress.update(bar_id, description=f"ANLS {mean_anls(module.answers):.3f}, {rate:.0f}/s")
