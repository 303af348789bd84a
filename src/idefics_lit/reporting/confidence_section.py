"""The part of the report on confidence: whether it tells right answers from wrong ones, and is a probability."""

from collections.abc import Sequence
from math import floor
from typing import Any

import torch
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from idefics_lit.evaluation.answer import mean_anls
from idefics_lit.evaluation.confidence import confidence
from idefics_lit.reporting.charts import Line, LineChart
from idefics_lit.reporting.prediction_writers import Answers

COVERAGE = 0.8  # of the sentence that names a threshold
NUM_BINS = 10
MAX_POINTS = 200


def confidence_section(answers: Answers, temperature: float, source: str) -> dict[str, Any]:
    """Return a sentence, charts and figures.

    Args:
        answers: scored answers, at least one.
        temperature: of the confidence, see `idefics_lit.evaluation.confidence`.
        source: says where the temperature is from.

    Returns:
        ``threshold``, what `threshold_sentence` returns; ``confidence_charts``, the risk by coverage and the
        reliability diagram; and ``confidence_figures``, pairs of a name and a text.
    """
    values = [confidence(answer.log_probability, temperature) for answer in answers.values()]
    unscaled = [confidence(answer.log_probability) for answer in answers.values()]
    scores = [float(answer.score or 0) for answer in answers.values()]
    is_right = [answer.is_right for answer in answers.values()]
    series = [("c1", "probability" if temperature == 1 else f"at the temperature {temperature:.2f}", values)]
    if temperature != 1:
        series.append(("c2", "probability", unscaled))
    figures = [
        (f"expected calibration error, {name}", f"{_calibration_error(v, is_right):.3f}") for _, name, v in series
    ]
    if len({*is_right}) == 2:
        auroc = binary_auroc(torch.tensor(values, dtype=torch.float64), torch.tensor(is_right).long())
        figures.insert(0, ("AUROC of right against wrong", f"{float(auroc):.3f}"))
    if temperature != 1:
        figures.append((f"temperature, {source}", f"{temperature:.2f}"))
    diagonal = Line("faint", "", [(0, 0), (1, 1)])
    bins = [Line(css_class, name, reliability(value, is_right)) for css_class, name, value in series]
    risk = [Line("c1", "1 - ANLS", risk_by_coverage(values, scores))]
    return {
        "threshold": threshold_sentence(answers, values),
        "confidence_charts": [
            LineChart("Risk", 1, risk, x_name="coverage", integer=False),
            LineChart("Share of right answers", 1, [diagonal, *bins], (0, 1), x_name="confidence", integer=False),
        ],
        "confidence_figures": figures,
    }


def risk_by_coverage(confidences: Sequence[float], scores: Sequence[float]) -> list[tuple[float, float]]:
    """Return points of (coverage, risk): the share of questions with the most confidence, and 1 - their mean score."""
    order = sorted(range(len(scores)), key=lambda i: -confidences[i])
    totals = torch.tensor([scores[i] for i in order], dtype=torch.float64).cumsum(0)
    counts = sorted({max(round(len(order) * i / MAX_POINTS), 1) for i in range(1, MAX_POINTS + 1)})
    # Answers with equal confidence are answered together.
    counts = [n for n in counts if n == len(order) or confidences[order[n - 1]] != confidences[order[n]]]
    return [(n / len(order), 1 - float(totals[n - 1]) / n) for n in counts]


def reliability(confidences: Sequence[float], is_right: Sequence[bool]) -> list[tuple[float, float]]:
    """Return points of (mean confidence, share of right answers) for each bin of confidence that has answers."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for value, right in zip(confidences, is_right, strict=True):
        bins.setdefault(min(int(value * NUM_BINS), NUM_BINS - 1), []).append((value, right))
    return [
        (sum(value for value, _ in bins[i]) / len(bins[i]), sum(right for _, right in bins[i]) / len(bins[i]))
        for i in sorted(bins)
    ]


def threshold_sentence(answers: Answers, confidences: Sequence[float]) -> str:
    """Return the threshold above which `COVERAGE` of the questions are answered, and their ANLS."""
    pairs = list(zip(answers.values(), confidences, strict=True))
    lowest = sorted(confidences, reverse=True)[max(round(COVERAGE * len(pairs)), 1) - 1]
    threshold = floor(lowest * 1000) / 1000  # as it is printed
    kept = [answer for answer, value in pairs if value >= threshold]
    coverage, score = len(kept) / len(pairs), mean_anls(kept)
    every = mean_anls(answers.values())
    return (
        f"Answer {coverage:.0%} of the questions at {score:.1%} ANLS: threshold {threshold:.3f}. "
        f"All questions: {every:.1%} ANLS."
    )


def _calibration_error(confidences: Sequence[float], is_right: Sequence[bool]) -> float:
    values, targets = torch.tensor(confidences), torch.tensor(is_right).long()
    return float(binary_calibration_error(values, targets, n_bins=NUM_BINS, norm="l1"))
