"""The report's figures on confidence, against definitions that are written out here."""

import math
import re

import pytest
import torch

from idefics_lit.evaluation.answer import Answer
from idefics_lit.evaluation.confidence import confidence
from idefics_lit.reporting.confidence_section import confidence_section, reliability, risk_by_coverage


def answers(pairs):
    """Answers with these (probability, score)."""
    return {i: Answer(i, "?", "x", ["x"], score, [], math.log(p), 4, index=i) for i, (p, score) in enumerate(pairs)}


@pytest.fixture(scope="module")
def drawn():
    """Answers that are right with the probability at the temperature 2, which are 300."""
    generator = torch.Generator().manual_seed(0)
    p = (0.02 + 0.97 * torch.rand(300, generator=generator)).tolist()
    right = [
        u < confidence(math.log(v), 2.0) for v, u in zip(p, torch.rand(300, generator=generator).tolist(), strict=True)
    ]
    return [(v, 1.0 if r else 0.5 * (i % 2)) for i, (v, r) in enumerate(zip(p, right, strict=True))]


def test_risk_by_coverage():
    points = risk_by_coverage([0.9, 0.2, 0.8, 0.8], [1.0, 0.0, 1.0, 0.5])
    assert points == [
        (0.25, 0.0),
        (0.75, pytest.approx(0.5 / 3)),
        (1.0, pytest.approx(1.5 / 4)),
    ]  # equals are one point


def test_reliability():
    points = reliability([0.05, 0.31, 0.39, 1.0], [False, True, False, True])
    assert points == [(0.05, 0.0), (pytest.approx(0.35), 0.5), (1.0, 1.0)]


def test_the_threshold_keeps_the_questions_that_the_sentence_says(drawn):
    text = confidence_section(answers(drawn), 1.0, "")["threshold"]
    coverage, score, threshold, every = map(float, re.findall(r"(\d+\.?\d*)(?=%| ?\.|\. )", text))
    kept = [s for p, s in drawn if p >= threshold]
    assert len(kept) / len(drawn) == pytest.approx(coverage / 100, abs=0.005) and 79 <= coverage <= 82
    assert sum(kept) / len(kept) == pytest.approx(score / 100, abs=0.0006)
    assert sum(s for _, s in drawn) / len(drawn) == pytest.approx(every / 100, abs=0.0006) and score > every + 3


def test_auroc_and_calibration_error(drawn):
    """At the temperature that the answers were drawn with the error is smaller; the AUROC is the same."""
    figures = dict(confidence_section(answers(drawn), 2.0, "of the checkpoint")["confidence_figures"])
    right, wrong = [p for p, s in drawn if s == 1], [p for p, s in drawn if s != 1]
    above = sum(r > w for r in right for w in wrong) / (len(right) * len(wrong))
    assert float(figures["AUROC of right against wrong"]) == pytest.approx(above, abs=0.001)
    bins = [[(p, s == 1) for p, s in drawn if i <= p * 10 < i + 1] for i in range(10)]
    error = sum(abs(sum(p for p, _ in of) - sum(r for _, r in of)) for of in bins) / len(drawn)
    assert float(figures["expected calibration error, probability"]) == pytest.approx(error, abs=0.001)
    assert float(figures["expected calibration error, at the temperature 2.00"]) < error - 0.02
    assert figures["temperature, of the checkpoint"] == "2.00"
    alone = dict(confidence_section(answers(drawn), 1.0, "")["confidence_figures"])
    assert set(alone) == {"AUROC of right against wrong", "expected calibration error, probability"}


def test_answers_that_are_all_right_have_no_auroc():
    figures = dict(confidence_section(answers([(0.5, 1.0), (0.9, 1.0)]), 1.0, "")["confidence_figures"])
    assert set(figures) == {"expected calibration error, probability"}
