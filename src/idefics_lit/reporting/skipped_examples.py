"""Write the examples that were skipped to a file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from idefics_lit.training.run_folder import run_folder


class SkippedExamples(Callback):
    """Write one line per skipped example, with the reason, to ``skipped.txt``; print their number at the end."""

    def __init__(self) -> None:
        self.written: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the examples that the data module knows to be skipped before it loads any."""
        # Rank 0's folder: loggers on other ranks may have another version.
        self.path = Path(trainer.strategy.broadcast(run_folder(trainer))) / "skipped.txt"
        if trainer.is_global_zero:
            self._write(getattr(trainer.datamodule, "skipped", ()))  # type: ignore[attr-defined]

    def _write(self, lines: Iterable[str]) -> None:
        new = [line for line in dict.fromkeys(lines) if line not in self.written]
        if new:
            self.written.update(new)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in new)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:  # noqa: ANN401
        """Write the examples that were skipped for this batch."""
        self._write(getattr(batch, "skipped", ()))

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end  # type: ignore[assignment]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the number of skipped examples on rank 0."""
        if trainer.is_global_zero and self.path.exists():
            count = len(set(self.path.read_text(encoding="utf-8").splitlines()))
            Console().print(f"{count} examples were skipped: {self.path}", markup=False)
