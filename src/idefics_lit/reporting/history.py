"""The curves of a fit, small enough to be part of every checkpoint."""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idefics_lit.evaluation.answer import Answer, by_question_type, mean_anls

MAX_POINTS, MAX_VALIDATIONS = 1000, 400
MAX_QUESTION_TYPES = 8
MAX_PENDING = 100


class StepMean(NamedTuple):
    """The means over ``num_steps`` consecutive optimizer steps."""

    step: float
    loss: float
    lr: float
    num_steps: int


class Validation(NamedTuple):
    """The results of a validation after an optimizer step; ``types`` is the mean ANLS by question type."""

    step: int
    loss: float
    anls: float
    types: dict[str, float]


class History:
    """Loss and learning rate by optimizer step, and the results of validations.

    The number of points is limited to ``MAX_POINTS``: when it is exceeded, pairs of neighbours are averaged, so that
    each point is the mean over twice as many steps as before. Of more than ``MAX_VALIDATIONS`` validations every second
    one is dropped.
    """

    def __init__(self) -> None:
        self.steps: list[StepMean] = []
        self.validations: list[Validation] = []
        self._pending: list[tuple[int, Tensor, float]] = []

    @property
    def last_step(self) -> int:
        """The last optimizer step; 0 before the first."""
        return round(self.steps[-1].step + (self.steps[-1].num_steps - 1) / 2) if self.steps else 0

    def add_step(self, step: int, loss: Tensor, lr: float) -> None:
        """Add an optimizer step; the 0-d loss is read, which waits for a GPU, only once in ``MAX_PENDING`` steps."""
        self._pending.append((step, loss, lr))
        if len(self._pending) == MAX_PENDING:
            self.flush()

    def flush(self) -> None:
        """Read the pending losses and add them to the curve."""
        if not self._pending:
            return
        losses = torch.stack([loss for _, loss, _ in self._pending]).tolist()
        for (step, _, lr), loss in zip(self._pending, losses, strict=True):
            if self.steps and self.steps[-1].num_steps < self.steps[0].num_steps:
                self.steps[-1] = _merge(self.steps[-1], StepMean(step, loss, lr, 1))
            else:
                self.steps.append(StepMean(step, loss, lr, 1))
            if len(self.steps) > MAX_POINTS:
                *complete, last = self.steps
                self.steps = [*map(_merge, complete[::2], complete[1::2]), last]
        self._pending = []

    def add_validation(self, step: int, loss: float, answers: Mapping[Hashable, Answer]) -> None:
        """Add a validation; those of the same or a later step, from before a resume, are dropped.

        Args:
            step: the number of optimizer steps before the validation.
            loss: the validation loss.
            answers: the answers by question, at least one.
        """
        groups = by_question_type(answers)
        names = list(groups)[:MAX_QUESTION_TYPES] if len(groups) > 1 else []
        types = {name: mean_anls(groups[name].values()) for name in names}
        self.validations = [validation for validation in self.validations if validation.step < step]
        self.validations.append(Validation(step, loss, mean_anls(answers.values()), types))
        if len(self.validations) > MAX_VALIDATIONS:
            self.validations = self.validations[::2]

    def state_dict(self) -> dict[str, Any]:
        """Return the curves as plain lists, which load with ``weights_only``."""
        self.flush()
        return {"steps": [*map(list, self.steps)], "validations": [*map(list, self.validations)]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the curves of a checkpoint."""
        self.steps = [StepMean(*values) for values in state_dict["steps"]]
        self.validations = [Validation(*values) for values in state_dict["validations"]]


def _merge(a: StepMean, b: StepMean) -> StepMean:
    num_steps = a.num_steps + b.num_steps
    step, loss, lr = ((x * a.num_steps + y * b.num_steps) / num_steps for x, y in zip(a[:3], b[:3], strict=True))
    return StepMean(step, loss, lr, num_steps)
