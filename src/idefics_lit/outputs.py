"""What a run leaves behind: its config, its answers, and the tables at the end of a fit."""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from rich.console import Console
from rich.markup import escape
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
        records = _unique(trainer, [record for batch in predictions for record in batch])
        if trainer.is_global_zero:
            folder = run_folder(trainer)
            answers = [
                {"questionId": _as_int(record["question_id"]), "answer": record["prediction"]} for record in records
            ]
            _write(folder / "submission.json", [json.dumps(answers, ensure_ascii=False)])
            _write_records(folder / "predictions.jsonl", records)
            Console().print(
                f"{len(records)} answers in {folder / 'submission.json'} and {folder / 'predictions.jsonl'}"
            )


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
        if self.progress is None or bar is None:
            return
        scores = [record["score"] for record in module.records]
        rate = len(scores) / (time.perf_counter() - self.started)
        self.progress.update(bar, description=f"ANLS {sum(scores) / len(scores):.3f}, {rate:.0f}/s")

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        return description if (self.trainer.max_epochs or -1) > 0 else f"Epoch {current_epoch}"


class Results(Callback):
    """Write an evaluation's answers to ``val_predictions.jsonl`` or ``test_predictions.jsonl``; sum up a fit.

    The lines are `PredictionWriter`'s. In a fit the file holds the last validation's answers; where the sanity check
    went through the whole validation set, what is printed compares it with the last validation.
    """

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a fit's answers, write them unless they are the sanity check's."""
        records = _unique(trainer, pl_module.records)  # type: ignore[arg-type]
        if trainer.sanity_checking:
            self.before = records
            return
        self._keep(trainer, records, "val_predictions.jsonl")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the answers."""
        self._keep(trainer, _unique(trainer, pl_module.records), "test_predictions.jsonl")  # type: ignore[arg-type]

    def _keep(self, trainer: Trainer, records: list[dict[str, Any]], name: str) -> None:
        self.after, self.file = records, run_folder(trainer) / name
        if trainer.is_global_zero:
            _write_records(self.file, records)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print a fit's scores, three examples and where things lie, on rank 0, after the progress bar has gone."""
        if not trainer.is_global_zero:
            return
        console = Console()
        if stage != "fit":
            if self.after:
                console.print(f"{len(self.after)} answers in {self.file}")
            return
        if self.after:
            before = {record["question_id"]: record for record in self.before}
            if before.keys() != {record["question_id"] for record in self.after}:
                before = {}
            console.print(_scores(before, self.after))
            console.print(_examples(before, self.after))
        console.print(self._places(trainer))

    def _places(self, trainer: Trainer) -> Table:
        folder = run_folder(trainer)
        places = Table(Column(style="bold"), Column(overflow="fold"), show_header=False, box=None)
        places.add_row("run", str(folder))
        best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "best_model_score", None) is not None), None)
        if best is not None:
            score = f"({best.monitor} {float(best.best_model_score):.4f})"  # type: ignore[attr-defined]
            places.add_row("best checkpoint", f"{best.best_model_path} {score}")  # type: ignore[attr-defined]
        if self.after:
            places.add_row("answers", str(self.file))
        for name in ("train/loss", "val/loss"):
            if name in trainer.callback_metrics:
                places.add_row(name, f"{float(trainer.callback_metrics[name]):.4f}")
        return places


def _scores(before: Mapping[Any, dict[str, Any]], after: Sequence[dict[str, Any]]) -> Table:
    """ANLS in all and by type of question."""
    table = Table("ANLS", *(["before"] if before else []), "after", "questions")

    def add(name: str, records: Sequence[dict[str, Any]]) -> None:
        scores = [[before[record["question_id"]]["score"] for record in records]] if before else []
        scores.append([record["score"] for record in records])
        table.add_row(name, *(f"{sum(some) / len(some):.3f}" for some in scores), str(len(records)))

    add("all", after)
    for kind in sorted({kind for record in after for kind in record["question_types"]}):
        add(kind, [record for record in after if kind in record["question_types"]])
    return table


def _examples(before: Mapping[Any, dict[str, Any]], after: Sequence[dict[str, Any]]) -> Table:
    """Three questions from all over the set."""
    table = Table("question", "expected", *(["before"] if before else []), "after")
    for record in after[:: max(-(-len(after) // 3), 1)]:
        answers = [before[record["question_id"]]["prediction"]] if before else []
        table.add_row(*map(escape, (record["question"], record["references"][0], *answers, record["prediction"])))
    return table


def _unique(trainer: Trainer, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gather all ranks' records, each question once, in the set's order."""
    ranks = gather_objects(trainer, records)
    unique = {record["question_id"]: record for rank in ranks for record in rank}
    return sorted(unique.values(), key=lambda record: record["place"])


def _write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = ({key: value for key, value in record.items() if key != "place"} for record in records)
    _write(path, (json.dumps(line, ensure_ascii=False) for line in lines))


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
