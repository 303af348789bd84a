"""What a run leaves behind: its config, its answers, what it skipped, and the tables at the end of a fit."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from idefics_lit.evaluation.records import by_place
from idefics_lit.training.experiment import describe
from idefics_lit.training.run_folder import run_folder
from idefics_lit.utils.distributed import gather_objects
from idefics_lit.utils.files import replacing

SHOWN = 5  # of ids that occur several times
NUMBER = re.compile("0|-?[1-9][0-9]{0,14}")  # the one way to write it, and exact in readers whose numbers are doubles


class SaveConfig(SaveConfigCallback):
    """Save the config in effect as ``config.yaml`` in a fit's folder, and what it trains in its checkpoints."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; called on rank 0 only."""
        if stage == "fit":
            # With what is null, which isn't everywhere the default.
            _write(run_folder(trainer) / "config.yaml", [self.parser.dump(self.config, skip_none=False)])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what the run trains, by which ``--ckpt_path last`` knows it."""
        checkpoint["experiment"] = describe(self.config.as_dict())


class PredictionWriter(BasePredictionWriter):
    """Write ``submission.json`` (the RRC's form) and ``predictions.jsonl`` when a prediction ends.

    Both hold every question of the split once, those that share an id too. The submission is one JSON array of
    ``{"questionId", "answer"}``, its ids numbers where that loses nothing; a line of the other file is
    ``{"question_id", "question", "prediction", "references", "score", "question_types"}``. Where questions have several
    pages, both have ``answer_page`` too, from 0, and the lines ``reference_page`` where it is known.
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
            if any("answer_page" in record for record in records):  # those with one page are answered on that
                records = [{**record, "answer_page": record.get("answer_page", 0)} for record in records]
            answers = [
                {
                    "questionId": question_id,
                    "answer": record["prediction"],
                    **({"answer_page": record["answer_page"]} if "answer_page" in record else {}),
                }
                for question_id, record in zip(_numbers([r["question_id"] for r in records]), records, strict=True)
            ]
            try:
                _write_records(folder / "predictions.jsonl", records)
            finally:  # one of the files is better than none
                _write(folder / "submission.json", [json.dumps(answers, ensure_ascii=False)])
            Console().print(
                f"{len(records)} answers in {folder / 'submission.json'} and {folder / 'predictions.jsonl'}",
                markup=False,
            )


class Results(Callback):
    """Write an evaluation's answers to ``val_predictions.jsonl`` or ``test_predictions.jsonl``; sum up a fit.

    The lines are `PredictionWriter`'s. In a fit the file holds the last validation's answers; where the sanity check
    went through the whole validation set, what is printed compares it with the last validation.
    """

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []
        self.report: Path | None = None  # where there is one

    @property
    def compared(self) -> dict[Any, dict[str, Any]]:
        """The answers before training by place in the set, where the same questions were asked; else none."""
        asked = [{record["place"]: record["question_id"] for record in some} for some in (self.before, self.after)]
        same = asked[0] == asked[1] and None not in asked[0]
        return {record["place"]: record for record in self.before} if same else {}

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
                console.print(f"{len(self.after)} answers in {self.file}", markup=False)
            if self.report:
                console.print(f"report in {self.report}", markup=False)
            return
        if self.after:
            console.print(_scores(self.compared, self.after))
            console.print(_examples(self.compared, self.after))
        console.print(self._places(trainer))

    def _places(self, trainer: Trainer) -> Table:
        folder = run_folder(trainer)
        places = Table(Column(style="bold"), Column(overflow="fold"), show_header=False, box=None)
        places.add_row("run", escape(str(folder)))
        best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "best_model_score", None) is not None), None)
        if best is not None:
            score = f"({best.monitor} {float(best.best_model_score):.4f})"  # type: ignore[attr-defined]
            places.add_row("best checkpoint", escape(f"{best.best_model_path} {score}"))  # type: ignore[attr-defined]
        if self.after:
            places.add_row("answers", escape(str(self.file)))
        if self.report:
            places.add_row("report", escape(str(self.report)))
        for name in ("train/loss", "val/loss"):
            if name in trainer.callback_metrics:
                places.add_row(name, f"{float(trainer.callback_metrics[name]):.4f}")
        return places


class SkippedExamples(Callback):
    """Write what is wrong with the examples that are left out to ``skipped.txt``, a line each, as it is met."""

    def __init__(self) -> None:
        self.written: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write what the data module knows from the start."""
        # Ranks' loggers may number runs differently.
        self.file = Path(trainer.strategy.broadcast(run_folder(trainer))) / "skipped.txt"
        if trainer.is_global_zero:
            self._write(getattr(trainer.datamodule, "skipped", ()))  # type: ignore[attr-defined]

    def _write(self, lines: Iterable[str]) -> None:
        new = [line for line in dict.fromkeys(lines) if line not in self.written]
        if new:
            self.written.update(new)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in new)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:  # noqa: ANN401
        """Write a batch's."""
        self._write(getattr(batch, "skipped", ()))

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end  # type: ignore[assignment]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count them, on rank 0."""
        if trainer.is_global_zero and self.file.exists():
            count = len(set(self.file.read_text(encoding="utf-8").splitlines()))
            Console().print(f"{count} examples were skipped: {self.file}", markup=False)


def _scores(before: Mapping[Any, dict[str, Any]], after: Sequence[dict[str, Any]]) -> Table:
    """ANLS in all and by type of question."""
    table = Table("ANLS", *(["before"] if before else []), "after", "questions")

    def add(name: str, records: Sequence[dict[str, Any]]) -> None:
        scores = [[before[record["place"]]["score"] for record in records]] if before else []
        scores.append([record["score"] for record in records])
        table.add_row(escape(name), *(f"{sum(some) / len(some):.3f}" for some in scores), str(len(records)))

    add("all", after)
    for kind in sorted({kind for record in after for kind in record["question_types"]}):
        add(kind, [record for record in after if kind in record["question_types"]])
    return table


def _examples(before: Mapping[Any, dict[str, Any]], after: Sequence[dict[str, Any]]) -> Table:
    """Three questions from all over the set."""
    table = Table("question", "expected", *(["before"] if before else []), "after")
    for record in after[:: max(-(-len(after) // 3), 1)]:
        answers = [before[record["place"]]["prediction"]] if before else []
        table.add_row(*map(escape, (record["question"], record["references"][0], *answers, record["prediction"])))
    return table


def _unique(trainer: Trainer, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gather all ranks' records, each question once as `ANLS` counts it, in the set's order."""
    unique: dict[Any, dict[str, Any]] = {}
    for rank in gather_objects(trainer, by_place(records)):
        for key, record in rank.items():
            unique.setdefault(key, record)  # the first rank's: its score is the one that counts
    times = Counter(record["question_id"] for record in unique.values())
    if twice := [str(question_id) for question_id, count in times.items() if count > 1]:
        more = f" and {len(twice) - SHOWN} more" if len(twice) > SHOWN else ""
        rank_zero_warn(
            f"Several questions have the id {', '.join(twice[:SHOWN])}{more}: each of them is counted and written, but "
            f"who reads the files by id can't tell them apart: see data.columns for another column of ids"
        )
    return sorted(unique.values(), key=lambda record: record["place"] or 0)


def _write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = ({key: value for key, value in record.items() if key != "place"} for record in records)
    _write(path, (json.dumps(line, ensure_ascii=False) for line in lines))


def _numbers(question_ids: Sequence[int | str]) -> Sequence[int | str]:
    """Return ids with numbers for the texts that are written as numbers are, if as many differ as before."""
    numbers = [int(text) if NUMBER.fullmatch(text := str(some)) else some for some in question_ids]
    return numbers if len({*numbers}) == len({*question_ids}) else question_ids


def _write(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as file:
        file.writelines(f"{line}\n".encode() for line in lines)
