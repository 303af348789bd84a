"""The confidence of answers: their probability under the model, calibrated with one number.

The model's probability of an answer is p = exp(log-probability). Its confidence is sigmoid(logit(p) / T), with
logit(p) = log p - log(1 - p) and a temperature T, which is 1 unless it was fitted. This is temperature scaling (Guo et
al., "On Calibration of Modern Neural Networks", 2017, https://arxiv.org/abs/1706.04599) of a binary decision, right or
wrong: Platt scaling without its intercept. It doesn't change the order of the answers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Bounds of 1 / T, which a few separable answers would send to infinity: each would have a confidence of 0 or 1.
MIN_SCALE, MAX_SCALE = 0.1, 10.0
MIN_LOG_PROBABILITY, MAX_LOG_PROBABILITY = -700.0, -1e-9  # whose log-odds are finite in float64


def log_odds(log_probability: float) -> float:
    """Return logit(p) of a probability p that is given as its logarithm."""
    log_p = min(max(log_probability, MIN_LOG_PROBABILITY), MAX_LOG_PROBABILITY)
    return log_p - math.log(-math.expm1(log_p))


def confidence(log_probability: float, temperature: float = 1.0) -> float:
    """Return the confidence, from 0 to 1, of an answer with this log-probability."""
    if temperature == 1:
        return math.exp(log_probability)
    return 1 / (1 + math.exp(-max(log_odds(log_probability) / temperature, -700.0)))


def fit_temperature(log_probabilities: Sequence[float], is_right: Sequence[bool]) -> float:
    """Return the temperature with the smallest cross-entropy of the confidence; 1 if all answers are right or wrong.

    Args:
        log_probabilities: of the answers.
        is_right: whether each answer is right.
    """
    if len({*is_right}) < 2:
        return 1.0
    odds = torch.tensor([log_odds(value) for value in log_probabilities], dtype=torch.float64)
    targets = torch.tensor(is_right, dtype=torch.float64)

    def slope(scale: float) -> Tensor:
        return ((torch.sigmoid(scale * odds) - targets) * odds).sum()

    low, high = math.log(MIN_SCALE), math.log(MAX_SCALE)
    for _ in range(60):  # the cross-entropy is convex in the scale, so its slope has one zero: bisection finds it
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)
