"""Whether training's numbers are still numbers, found out without waiting for a GPU."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from idefics_lit.errors import InputError
from idefics_lit.utils.host_copy import HostCopy

MOST_SKIPPED = 20  # float16's scale starts at 65,536: twenty halvings are past 1, where scaling is over


class _Loss(NamedTuple):
    value: HostCopy
    question_ids: Sequence[int | str]


class FiniteLossCheck:
    """Ends a run whose loss isn't finite, and says which questions it was of."""

    def __init__(self) -> None:
        self._pending: deque[_Loss] = deque()

    def add(self, loss: Tensor, question_ids: Sequence[int | str]) -> None:
        """Look at a batch's loss, 0-d, as soon as it is there.

        Raises:
            InputError: when this loss or one before it isn't finite.
        """
        self._pending.append(_Loss(HostCopy(loss), question_ids))
        self.check()

    def check(self, *, wait: bool = False) -> None:
        """Look at the losses that have arrived, or wait for all.

        Raises:
            InputError: when one isn't finite.
        """
        while self._pending and (wait or self._pending[0].value.ready):
            arriving, question_ids = self._pending.popleft()
            value = arriving.result()
            if not value.isfinite():
                raise InputError(
                    f"the loss of questions {', '.join(map(str, question_ids))} is {float(value)}: lower model.lr or "
                    f"give --trainer.precision bf16-mixed; the checkpoints that were written are from before it"
                )


class OverflowCheck:
    """Ends a run in float16 whose optimizer steps are all skipped: the scaler can't help any more."""

    def __init__(self) -> None:
        self.scale, self.skipped = 0.0, 0

    def step(self, scale: float) -> None:
        """Take the loss' scale, before every optimizer step: it falls when the last was skipped.

        Raises:
            InputError: after `MOST_SKIPPED` in a row.
        """
        self.skipped = self.skipped + 1 if scale < self.scale else 0
        self.scale = scale
        if self.skipped == MOST_SKIPPED:
            raise InputError(
                f"float16 overflowed in {MOST_SKIPPED} optimizer steps in a row, which were skipped: give "
                f"--trainer.precision bf16-mixed where the GPU has it, else lower model.lr"
            )
