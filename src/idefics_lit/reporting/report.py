"""`Report`, the callback that writes ``report.html`` and logs the same answers to the run's loggers."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.errors import first_line
from idefics_lit.reporting.confidence_section import confidence_section
from idefics_lit.reporting.history import History
from idefics_lit.reporting.logger_media import log_answers
from idefics_lit.reporting.page_gallery import Card, add_images, group_by_page
from idefics_lit.reporting.prediction_writers import EvaluationWriter
from idefics_lit.reporting.report_page import hyperparameters, render_report, score_section, tiles, training_charts
from idefics_lit.training.run_folder import run_folder
from idefics_lit.utils.files import replacing


class Report(Callback):
    """Record the curves of a fit, and write ``report.html`` at the end of a fit, a validation or a test.

    The file is self-contained. Weights & Biases, MLflow, Comet and TensorBoard get a table of the same answers and
    images of the pages with the lowest scores. The curves are part of checkpoints, so the report of a resumed run
    covers all its steps. If the report can't be written, it warns and the run goes on. Requires `Idefics2Module`; pages
    require `DocVQADataModule`.

    Args:
        writer: the `EvaluationWriter` of the same Trainer, before this callback in its list.

    Attributes:
        path: the report; None before it is written.
    """

    def __init__(self, writer: EvaluationWriter) -> None:
        self.writer = writer
        self.history = History()
        self.path: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the curves."""
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint's curves, unless this process trained: then it evaluates its own best checkpoint."""
        if not self.history.steps:
            self.history.load_state_dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Record the step from which the fit starts."""
        self.last_global_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: object) -> None:  # noqa: ANN401
        """Record loss and learning rate after each optimizer step."""
        if trainer.global_step > self.last_global_step:
            self.last_global_step = trainer.global_step
            if pl_module.step_loss is not None:
                self.history.add_step(trainer.global_step, pl_module.step_loss, pl_module.step_lr)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Record a validation of a fit; write the report of ``Trainer.validate``."""
        if trainer.state.fn != "fit":
            self._write(trainer, pl_module, "val")
            return
        answers = self.writer.sanity_check_answers if trainer.sanity_checking else self.writer.answers
        is_partial = trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")
        if answers and not is_partial:
            self.history.add_validation(trainer.global_step, float(trainer.callback_metrics["val/loss"]), answers)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Write the report."""
        self._write(trainer, pl_module, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Write the report with the answers of the last validation."""
        self.history.flush()
        self._write(trainer, pl_module, "val")

    def _write(self, trainer: Any, module: Any, stage: str) -> None:  # noqa: ANN401
        if not trainer.is_global_zero:
            return
        path = run_folder(trainer) / "report.html"
        answers, baseline = self.writer.answers, self.writer.baseline
        cards: list[Card] = []
        selected: list[Card] = []
        data = trainer.datamodule
        if data is not None:
            with _warn_on_error("pages in the report"):
                cards = group_by_page(answers.values(), data.examples[stage])
                selected = add_images(cards, data.examples[stage])
        if notes := [card.note for card in selected if not card.jpegs]:
            rank_zero_warn(f"{len(notes)} pages are missing from the report. The first: {notes[0]}")
        with _warn_on_error("report"):
            checkpoint = [f"with {trainer.ckpt_path}"] if trainer.ckpt_path else []
            loss = trainer.callback_metrics.get(f"{stage}/loss")
            source = "fitted on these questions" if trainer.state.fn == TrainerFn.FITTING else "of the checkpoint"
            losses = {} if loss is None else {f"{stage}/loss": float(loss)}
            context = {
                "title": f"{module.hparams.pretrained}" + (f" on {data.hparams.source}" if data is not None else ""),
                "subtitle": ", ".join([str(path.parent), *checkpoint, f"{datetime.now():%Y-%m-%d %H:%M}"]),
                "tiles": tiles(answers, baseline, losses, self.history.last_step),
                "hyperparameters": hyperparameters(trainer, module),
                "charts": training_charts(self.history),
                "baseline": baseline,
                **(score_section(answers, baseline) if answers else {}),
                **(confidence_section(answers, module.temperature, source) if answers else {}),
            }
            page = render_report(context, cards, selected, module.temperature)
            with replacing(path) as file:
                file.write(page)
            self.path = path
        for logger in trainer.loggers if selected else []:
            with _warn_on_error(f"answers in {type(logger).__name__}"):
                log_answers(logger, stage, selected, trainer.global_step)


@contextmanager
def _warn_on_error(what: str) -> Iterator[None]:
    """Turn an exception into a warning: a report is no reason to lose a fit."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"No {what}: {first_line(error)}")
