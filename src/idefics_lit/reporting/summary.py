"""Print the results of a run: scores, example answers and the paths of its files."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from idefics_lit.evaluation.answer import by_question_type, mean_anls
from idefics_lit.reporting.prediction_writers import Answers, EvaluationWriter
from idefics_lit.reporting.report import Report
from idefics_lit.training.run_folder import run_folder

EXAMPLES = 3


class Summary(Callback):
    """Print a fit's scores, three answers and the paths of its files; after a validation or test, metrics and paths.

    Lightning prints the metrics too, with all their digits, unless it is called with ``verbose=False``. If the sanity
    check covered the whole validation set, its scores are printed beside those of the last validation.

    Args:
        writer: the `EvaluationWriter` of the same Trainer.
        report: the `Report` of the same Trainer, if it has one.
    """

    def __init__(self, writer: EvaluationWriter, report: Report | None = None) -> None:
        self.writer, self.report = writer, report

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print on rank 0; the progress bar is closed by now."""
        if not trainer.is_global_zero:
            return
        console, answers = Console(), self.writer.answers
        report_path = self.report.path if self.report else None
        if stage == "fit":
            if answers:
                console.print(score_table(self.writer.baseline, answers))
                console.print(example_table(self.writer.baseline, answers))
            console.print(self._path_table(trainer))
        else:
            if metrics := trainer.callback_metrics:
                table = Table(f"{TrainerFn(stage).value} metric", Column("value", justify="right"))
                for name, value in metrics.items():
                    table.add_row(escape(name), f"{float(value):.4f}")
                console.print(table)
            if answers:
                console.print(f"{len(answers)} answers in {self.writer.path}", markup=False)
            if report_path:
                console.print(f"report in {report_path}", markup=False)

    def _path_table(self, trainer: Trainer) -> Table:
        table = Table(Column(style="bold"), Column(overflow="fold"), show_header=False, box=None)
        table.add_row("run", escape(str(run_folder(trainer))))
        best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "best_model_score", None) is not None), None)
        if best is not None:
            score = f"({best.monitor} {float(best.best_model_score):.4f})"  # type: ignore[attr-defined]
            table.add_row("best checkpoint", escape(f"{best.best_model_path} {score}"))  # type: ignore[attr-defined]
        elif not self.writer.answers and any(getattr(c, "monitor", None) for c in trainer.checkpoint_callbacks):
            table.add_row("best checkpoint", "none: no validation ran (data.val_every_n_steps says how often)")
            paths = [getattr(c, "best_model_path", "") for c in trainer.checkpoint_callbacks]
            if path := next(filter(None, paths), None):
                table.add_row("last checkpoint", escape(path))
        if self.writer.answers:
            table.add_row("answers", escape(str(self.writer.path)))
        if self.report and self.report.path:
            table.add_row("report", escape(str(self.report.path)))
        for name in ("train/loss", "val/loss"):
            if name in trainer.callback_metrics:
                table.add_row(name, f"{float(trainer.callback_metrics[name]):.4f}")
        return table


def score_table(baseline: Answers, answers: Answers) -> Table:
    """Return a table of the mean ANLS over all questions and by question type.

    Args:
        baseline: the answers before training, to the same questions; may be empty.
        answers: the answers after training, at least one.
    """
    table = Table("ANLS", *(["before"] if baseline else []), "after", "questions")
    for name, group in [("all", answers), *sorted(by_question_type(answers).items())]:
        means = [mean_anls([baseline[key] for key in group])] if baseline else []
        means.append(mean_anls(group.values()))
        table.add_row(escape(name), *(f"{mean:.3f}" for mean in means), str(len(group)))
    return table


def example_table(baseline: Answers, answers: Answers) -> Table:
    """Return a table of up to three questions, evenly spaced over the split, with their answers."""
    table = Table("question", "expected", *(["before"] if baseline else []), "after")
    spacing = max(-(-len(answers) // EXAMPLES), 1)
    for key, answer in [*answers.items()][::spacing]:
        before = [baseline[key].prediction] if baseline else []
        table.add_row(*map(escape, (answer.question, answer.references[0], *before, answer.prediction)))
    return table
