"""The curves of a fit, kept small enough to go into every checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_STEPS, MOST_VALIDATIONS = 1000, 400
MOST_TYPES = 8  # of questions

Records = Sequence[Mapping[str, Any]]


class Step(NamedTuple):
    """The means over some optimizer steps, so many."""

    step: float
    loss: float
    lr: float
    number: int


class Validation(NamedTuple):
    """What a validation came to at a step; ``types`` has the ANLS by type of question."""

    step: int
    loss: float
    anls: float
    types: dict[str, float]


class History:
    """Loss and learning rate by optimizer step, and what validations came to.

    There are never more than ``MOST_STEPS`` points: each is the mean over twice as many steps when there would be.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.validations: list[Validation] = []
        self._coming: list[tuple[int, Tensor, float]] = []

    @property
    def last_step(self) -> int:
        """The last optimizer step, 0 before the first."""
        return round(self.steps[-1].step + (self.steps[-1].number - 1) / 2) if self.steps else 0

    def add_step(self, step: int, loss: Tensor, lr: float) -> None:
        """Add a step's, whose loss, 0-d, may still be computed: a GPU is waited for every hundredth time."""
        self._coming.append((step, loss, lr))
        if len(self._coming) == 100:
            self.settle()

    def settle(self) -> None:
        """Bring the losses to the CPU."""
        if not self._coming:
            return
        losses = torch.stack([loss for _, loss, _ in self._coming]).tolist()
        for (step, _, lr), loss in zip(self._coming, losses, strict=True):
            if self.steps and self.steps[-1].number < self.steps[0].number:
                self.steps[-1] = _mean(self.steps[-1], Step(step, loss, lr, 1))
            else:
                self.steps.append(Step(step, loss, lr, 1))
            if len(self.steps) > MOST_STEPS:
                *whole, last = self.steps
                self.steps = [*map(_mean, whole[::2], whole[1::2]), last]
        self._coming = []

    def add_validation(self, step: int, loss: float, records: Records, types: Mapping[str, Records]) -> None:
        """Add what a validation came to.

        Args:
            step: behind which; what is there already is from before a resume, and forgotten.
            loss: its loss.
            records: of all questions.
            types: the records of each type of question.
        """
        scores = {name: mean_score(some) for name, some in list(types.items())[:MOST_TYPES]}
        self.validations = [some for some in self.validations if some.step < step]
        self.validations.append(Validation(step, loss, mean_score(records), scores))
        if len(self.validations) > MOST_VALIDATIONS:
            self.validations = self.validations[::2]

    def state_dict(self) -> dict[str, Any]:
        """Return the curves as plain lists: checkpoints load with ``weights_only``."""
        self.settle()
        return {"steps": [list(some) for some in self.steps], "validations": [list(some) for some in self.validations]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a checkpoint's curves."""
        self.steps = [Step(*some) for some in state_dict["steps"]]
        self.validations = [Validation(*some) for some in state_dict["validations"]]


def mean_score(records: Records) -> float:
    """Return the ANLS of some questions."""
    return float(sum(record["score"] for record in records) / len(records))


def _mean(one: Step, other: Step) -> Step:
    number = one.number + other.number
    step, loss, lr = ((a * one.number + b * other.number) / number for a, b in zip(one[:3], other[:3], strict=True))
    return Step(step, loss, lr, number)
