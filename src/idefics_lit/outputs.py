"""What a run leaves behind: its config, its predictions, and the table at the end of a fit."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from rich.console import Console
from rich.table import Column, Table

from idefics_lit.distributed import gather_objects


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of this run, the one that Lightning's checkpoints go to: log folder, name, version."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


class SaveConfig(SaveConfigCallback):
    """Save the config in effect as ``config.yaml`` in the run's folder, for a fit."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; called on rank 0 only."""
        if stage == "fit":
            folder = run_folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(folder / "config.yaml"), overwrite=True)


class PredictionWriter(BasePredictionWriter):
    """Write ``submission.json`` (the RRC's form) and ``predictions.jsonl`` when a prediction ends.

    Both hold every question once. The submission is one JSON array of ``{"questionId", "answer"}``; a line of the
    other file is ``{"question_id", "question", "prediction", "references", "score", "question_types"}``.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Gather all ranks' predictions and write them on rank 0."""
        records = [record for batch in predictions for record in batch]
        unique = {record["question_id"]: record for rank in gather_objects(trainer, records) for record in rank}
        if trainer.is_global_zero:
            folder = run_folder(trainer)
            answers = [
                {"questionId": _as_int(question_id), "answer": record["prediction"]}
                for question_id, record in unique.items()
            ]
            _write(folder / "submission.json", [json.dumps(answers, ensure_ascii=False)])
            _write(folder / "predictions.jsonl", (json.dumps(r, ensure_ascii=False) for r in unique.values()))
            Console().print(f"{len(unique)} answers in {folder / 'submission.json'} and {folder / 'predictions.jsonl'}")


class ProgressBar(RichProgressBar):
    """Lightning's bar counting batches where it counts steps, without the run's number or endless epochs."""

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
        """Return what the bar shows."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        return description if (self.trainer.max_epochs or -1) > 0 else f"Epoch {current_epoch}"


class FitTable(Callback):
    """Print what a fit came to: the last scores, the best checkpoint, the run's folder."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the table on rank 0, after the progress bar has gone."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        table = Table("result", Column("value", overflow="fold"))
        for name, value in sorted(trainer.callback_metrics.items()):
            if name.startswith(("train/loss", "val/")):
                table.add_row(name, f"{float(value):.4f}")
        best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "best_model_score", None) is not None), None)
        if best is not None:
            table.add_row(f"best {best.monitor}", f"{float(best.best_model_score):.4f}")  # type: ignore[attr-defined]
            table.add_row("best checkpoint", best.best_model_path)  # type: ignore[attr-defined]
        table.add_row("run", str(run_folder(trainer)))
        Console().print(table)


def _as_int(question_id: int | str) -> int | str:
    return int(question_id) if str(question_id).isdigit() else question_id


def _write(path: Path, lines: Iterable[str]) -> None:
    """Write all lines or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
