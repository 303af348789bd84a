"""What a fit or an evaluation came to, to look at: ``report.html``, and the same answers for the run's loggers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.errors import first_line
from idefics_lit.reporting import charts
from idefics_lit.reporting.charts import Chart, Histogram, smoothed
from idefics_lit.reporting.history import History, mean_score
from idefics_lit.reporting.page_gallery import Card, group_by_page, log_pictures, log_table, show
from idefics_lit.reporting.results import Results
from idefics_lit.training.run_folder import run_folder
from idefics_lit.utils.files import replacing

MOST_BYTES = 5_000_000
MOST_ROWS = 40  # of the table by type of question
LONGEST_TEXT = 300  # characters of a question or an answer

Records = Sequence[dict[str, Any]]


class Report(Callback):
    """Keep a fit's curves, and write ``report.html`` when a fit, a validation or a test ends.

    The file needs no other and no network. Weights & Biases gets a table of the same answers, TensorBoard pictures of
    the worst. The curves are in the checkpoint too, so that a resumed run's are whole. What can't be written is said
    and ends no run.

    Args:
        results: gathers the answers of all ranks, in a callback before this one.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.history = History()

    def state_dict(self) -> dict[str, Any]:
        """Return the curves."""
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's curves, unless it is this fit's best, to be scored once more."""
        if not self.history.steps:
            self.history.load_state_dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """See where the fit goes on from."""
        self.seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: object) -> None:  # noqa: ANN401
        """Keep what an optimizer step logs."""
        if trainer.global_step > self.seen:
            self.seen = trainer.global_step
            self.history.add_step(self.seen, pl_module.step_loss, pl_module.step_lr)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Keep what a validation in a fit came to, or write the report of one by itself."""
        if trainer.state.fn != "fit":
            self._write(trainer, pl_module, "val")
            return
        records = self.results.before if trainer.sanity_checking else self.results.after
        part = trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")
        if records and not part:
            loss = float(trainer.callback_metrics["val/loss"])
            self.history.add_validation(trainer.global_step, loss, records, _by_type(records))

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Write the report."""
        self._write(trainer, pl_module, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Write the report, with the last validation's answers."""
        self.history.settle()
        self._write(trainer, pl_module, "val")

    def _write(self, trainer: Any, module: Any, stage: str) -> None:  # noqa: ANN401
        if not trainer.is_global_zero:
            return
        records, path = self.results.after, run_folder(trainer) / "report.html"
        cards: list[Card] = []
        shown: list[Card] = []
        with _or_warn("pages in the report"):
            examples = trainer.datamodule.examples[stage]
            cards = group_by_page(records, examples)
            shown = show(cards, examples)
        if broken := [card.missing for card in shown if not card.pictures]:
            rank_zero_warn(f"{len(broken)} pages aren't in the report. The first: {broken[0]}")
        with _or_warn("report"):
            title = f"{module.hparams.pretrained} on {trainer.datamodule.hparams.source}"
            made = [path.parent, *([f"with {trainer.ckpt_path}"] if trainer.ckpt_path else [])]
            subtitle = ", ".join(map(str, [*made, f"{datetime.now():%Y-%m-%d %H:%M}"]))
            loss = trainer.callback_metrics.get(f"{stage}/loss")
            parts = {"charts": self._charts(), **(self._scores(records) if records else {})}
            tiles = self._tiles(records, {} if loss is None else {f"{stage}/loss": float(loss)})
            page = _render({"title": title, "subtitle": subtitle, "tiles": tiles, **parts}, cards, shown)
            with replacing(path) as file:
                file.write(page)
            self.results.report = path
        for logger in trainer.loggers if shown else []:
            if isinstance(logger, WandbLogger):
                with _or_warn("table for Weights & Biases"):
                    log_table(logger, f"{stage}/answers", shown, trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                with _or_warn("pictures for TensorBoard"):
                    log_pictures(logger, f"{stage}/worst", shown, trainer.global_step)

    def _tiles(self, records: Records, losses: Mapping[str, float]) -> list[tuple[str, str, str]]:
        """Name, value and a remark of the figures on top."""
        tiles = []
        if records:
            before = [*self.results.compared.values()]
            tiles.append(("ANLS", f"{mean_score(records):.3f}", f"before {mean_score(before):.3f}" if before else ""))
            for name, score in (("right", 1), ("score 0", 0)):
                count = sum(record["score"] == score for record in records)
                tiles.append((name, f"{count / len(records):.0%}", f"{count} of {len(records)} questions"))
        tiles += [(name, f"{loss:.3f}", "a token") for name, loss in losses.items()]
        if self.history.last_step:
            tiles.append(("optimizer steps", f"{self.history.last_step:,}", ""))
        return tiles

    def _charts(self) -> list[Chart]:
        steps, validations = self.history.steps, self.history.validations
        last = self.history.last_step
        found = []
        if steps:
            loss = [(some.step, some.loss) for some in steps]
            train = {"faint": ("", loss), "c1": ("train/loss", smoothed(loss))}
            val = [(some.step, some.loss) for some in validations]
            found.append(Chart("Loss", last, {**train, "c2": ("val/loss", val)}))
            found.append(Chart("Learning rate", last, {"c1": ("lr", [(some.step, some.lr) for some in steps])}))
        if validations:
            lines = {"c0": ("all", [(some.step, some.anls) for some in validations])}
            for number, name in enumerate(validations[-1].types, start=1):
                points = [(some.step, some.types[name]) for some in validations if name in some.types]
                lines[f"c{number}"] = (name, points)
            found.append(Chart("ANLS", last, lines, (0, 1)))
        return found

    def _scores(self, records: Records) -> dict[str, Any]:
        """The histogram, and the table by type of question."""
        before = self.results.compared
        scores = {"c1": [record["score"] for record in records]}
        if before:
            scores = {"before": [record["score"] for record in before.values()], **scores}
        rows = []
        for name, some in [("all", records), *_by_type(records).items()][:MOST_ROWS]:
            was = f"{mean_score([before[record['place']] for record in some]):.3f}" if before else ""
            rows.append((name, len(some), was, f"{mean_score(some):.3f}"))
        return {"before": bool(before), "histogram": Histogram(scores), "rows": rows}


@contextmanager
def _or_warn(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"No {what}: {first_line(error)}")


def _by_type(records: Records) -> dict[str, Records]:
    """The records of each type of question, the most frequent first, where there are several types."""
    types: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        for name in dict.fromkeys(record["question_types"]):
            types.setdefault(name, []).append(record)
    ordered = sorted(types.items(), key=lambda item: (-len(item[1]), item[0]))
    return dict(ordered) if len(types) > 1 else {}


def _render(options: dict[str, Any], cards: Sequence[Card], shown: Sequence[Card]) -> bytes:
    """Return the page, with fewer cards where it would be too large."""
    environment = Environment(autoescape=True)
    environment.filters["short"] = lambda text: text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"
    template = environment.from_string(files("idefics_lit.reporting").joinpath("report.html.jinja").read_text("utf-8"))
    options |= {name.lower(): getattr(charts, name) for name in ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")}
    asked = sum(len(card.records) for card in cards)
    while True:
        records = [record for card in shown for record in card.records]
        extent = f"{len(records)} of {asked} questions, on {len(shown)} of {len(cards)} pages."
        types = sorted({name for record in records for name in record["question_types"]})
        page = template.render(options, cards=shown, extent=extent, types=types).encode(errors="replace")
        if len(page) <= MOST_BYTES or not shown:
            return page
        shown = shown[: len(shown) * 3 // 4]
