"""The content of ``report.html``: figures, charts and the table by question type, rendered with a jinja2 template."""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from idefics_lit.evaluation.answer import by_question_type, mean_anls
from idefics_lit.evaluation.confidence import confidence
from idefics_lit.evaluation.error_classes import DESCRIPTIONS, error_classes
from idefics_lit.reporting import charts
from idefics_lit.reporting.charts import Histogram, Line, LineChart, smooth
from idefics_lit.reporting.history import History
from idefics_lit.reporting.page_gallery import Card
from idefics_lit.reporting.prediction_writers import Answers
from idefics_lit.training.experiment import flatten

MAX_BYTES = 5_000_000
MAX_TABLE_ROWS = 40
MAX_TEXT_LENGTH = 300  # characters of a question or an answer
# Those after the first two concern a fit alone.
TRAINER_OPTIONS = (
    *("precision", "world_size", "max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val"),
    *("gradient_clip_algorithm", "val_check_interval"),
)


def tiles(
    answers: Answers, baseline: Answers, losses: Mapping[str, float], last_step: int
) -> list[tuple[str, str, str]]:
    """Return name, value and remark of the figures at the top of the page."""
    figures = []
    if answers:
        before = f"before {mean_anls(baseline.values()):.3f}" if baseline else ""
        figures.append(("ANLS", f"{mean_anls(answers.values()):.3f}", before))
        for name, score in (("score 1", 1), ("score 0", 0)):
            count = sum(answer.score == score for answer in answers.values())
            figures.append((name, f"{count / len(answers):.0%}", f"{count} of {len(answers)} questions"))
    figures += [(name, f"{loss:.3f}", "per token") for name, loss in losses.items()]
    if last_step:
        figures.append(("optimizer steps", f"{last_step:,}", ""))
    return figures


def hyperparameters(trainer: Trainer, module: LightningModule) -> list[tuple[str, Any]]:
    """Return name and value of the options of a run that are set: the model's, the data's and some of the Trainer's."""
    data = getattr(trainer, "datamodule", None)
    options = flatten({"model": module.hparams, "data": data.hparams if data is not None else {}})
    names = TRAINER_OPTIONS if trainer.state.fn == TrainerFn.FITTING else TRAINER_OPTIONS[:2]
    options |= {f"trainer.{name}": getattr(trainer, name) for name in names}
    as_in_yaml = {True: "true", False: "false"}
    return [
        (name, as_in_yaml[value] if isinstance(value, bool) else value)
        for name, value in options.items()
        if value is not None
    ]


def training_charts(history: History) -> list[LineChart]:
    """Return the charts of loss, learning rate and ANLS that the history has values for."""
    steps, validations, last_step = history.steps, history.validations, history.last_step
    result = []
    if steps:
        train_loss = [(mean.step, mean.loss) for mean in steps]
        smoothed = smooth(train_loss)
        val_loss = [(validation.step, validation.loss) for validation in validations]
        losses = [
            Line("faint", "", train_loss),
            Line("c1", "train/loss" if smoothed == train_loss else "train/loss, smoothed", smoothed),
            Line("c2", "val/loss", val_loss),
        ]
        result.append(LineChart("Loss", last_step, losses))
        result.append(
            LineChart("Learning rate", last_step, [Line("c1", "lr", [(mean.step, mean.lr) for mean in steps])])
        )
    if validations:
        lines = [Line("c0", "all", [(validation.step, validation.anls) for validation in validations])]
        for number, name in enumerate(validations[-1].types, start=1):
            points = [
                (validation.step, validation.types[name]) for validation in validations if name in validation.types
            ]
            lines.append(Line(f"c{number}", name, points))
        result.append(LineChart("ANLS", last_step, lines, (0, 1)))
    return result


def score_section(answers: Answers, baseline: Answers) -> dict[str, Any]:
    """Return the histogram of the scores, and the rows of the table by question type.

    Args:
        answers: scored answers, at least one.
        baseline: the answers before training, to the same questions; may be empty.
    """
    scores: dict[str, Any] = {"before": [answer.score for answer in baseline.values()]} if baseline else {}
    scores["c1"] = [answer.score for answer in answers.values()]
    groups = by_question_type(answers)
    rows = []
    for name, group in [("all", answers), *(groups.items() if len(groups) > 1 else ())][:MAX_TABLE_ROWS]:
        before = f"{mean_anls([baseline[key] for key in group]):.3f}" if baseline else ""
        rows.append((name, len(group), before, f"{mean_anls(group.values()):.3f}"))
    return {"has_baseline": bool(baseline), "histogram": Histogram(scores), "rows": rows}


def class_section(cards: Sequence[Card]) -> dict[str, Any]:
    """Return the error class of each answer by its index, and the rows of their table with count and share in %."""
    classes = {
        answer.index: name
        for card in cards
        for answer, name in zip(card.answers, error_classes(card.answers), strict=True)
    }
    counts = Counter(classes.values())
    rows = [(name, counts[name], 100 * counts[name] / len(classes)) for name in DESCRIPTIONS if counts[name]]
    return {"classes": classes, "class_rows": rows, "descriptions": DESCRIPTIONS}


def render_report(
    context: dict[str, Any], cards: Sequence[Card], selected: Sequence[Card], temperature: float
) -> bytes:
    """Return the page, of ``MAX_BYTES`` at most: cards are dropped from the end until it is small enough.

    Args:
        context: the template's variables: title, subtitle, tiles, hyperparameters, charts, baseline and those of
            `score_section` and `confidence_section`.
        cards: the cards of all pages.
        selected: the cards to show, with images.
        temperature: of the answers' confidence.
    """
    environment = Environment(autoescape=True)
    environment.filters["short"] = lambda text: text if len(text) <= MAX_TEXT_LENGTH else f"{text[:MAX_TEXT_LENGTH]} …"
    environment.filters["grade"] = lambda score: "good" if score == 1 else "bad" if score == 0 else "fair"
    environment.filters["confidence"] = lambda answer: f"{confidence(answer.log_probability, temperature):.0%}"
    template = environment.from_string(files("idefics_lit.reporting").joinpath("report.html.jinja").read_text("utf-8"))
    geometry = {name.lower(): getattr(charts, name) for name in ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")}
    question_count = sum(len(card.answers) for card in cards)
    while True:
        answers = [answer for card in selected for answer in card.answers]
        extent = f"{len(answers)} of {question_count} questions, on {len(selected)} of {len(cards)} pages."
        question_types = sorted({name for answer in answers for name in answer.question_types})
        page = template.render(
            context, **geometry, **class_section(cards), cards=selected, extent=extent, question_types=question_types
        ).encode(errors="replace")
        if len(page) <= MAX_BYTES or not selected:
            return page
        selected = selected[: len(selected) * 3 // 4]
