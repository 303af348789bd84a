"""The loss of an optimizer step: the mean over all its answer tokens, over micro-batches and ranks.

Lightning averages gradients over micro-batches and ranks, whatever their numbers of tokens. So each micro-batch's loss
is weighted with its number of tokens in the backward pass, and the gradients are divided by the step's number of tokens
before the optimizer's step.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn

from idefics_lit.errors import InputError
from idefics_lit.training.lightning_compat import scale_gradients
from idefics_lit.utils.distributed import summed

# The weights of micro-batches are divided by this number, which keeps float16 gradients near their usual size.
SCALE_TOKENS = 64


class TokenMean:
    """The sums over the micro-batches of an optimizer step on this rank.

    Attributes:
        tokens: the number of answer tokens, 0-d; None before the first micro-batch.
        loss: the summed loss, 0-d.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.loss: Tensor | None = None
        self._weight: Tensor | None = None  # of the micro-batch whose backward pass hasn't been run

    def begin(self, *, is_first: bool) -> None:
        """Begin a new optimizer step.

        Args:
            is_first: it is the first of an epoch; the one before may be unfinished.

        Raises:
            InputError: the step before was made without `average_gradients`.
        """
        if self.tokens is not None and not is_first:
            raise InputError(
                "on_before_optimizer_step of a subclass of Idefics2Module doesn't call "
                "super().on_before_optimizer_step(optimizer), which divides the gradients by the number of tokens"
            )
        self.reset()

    def reset(self) -> None:
        """Forget the micro-batches."""
        self.tokens = self.loss = self._weight = None

    def add(self, loss: Tensor, tokens: Tensor) -> Tensor:
        """Add a micro-batch's summed loss and its number of tokens, both 0-d; return its mean loss."""
        self.tokens = tokens if self.tokens is None else self.tokens + tokens
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()
        self._weight = tokens / SCALE_TOKENS
        return loss / tokens.clamp(min=1)

    def weighted(self, loss: Tensor) -> Tensor:
        """Return the loss to propagate for a micro-batch: with the weight of its tokens, if it was added."""
        weight, self._weight = self._weight, None
        return loss if weight is None else loss * weight

    def average_gradients(self, parameters: Iterable[nn.Parameter], trainer: Trainer) -> Tensor:
        """Make the gradients those of the mean over the step's tokens, and return the mean loss (0-d, float32).

        Raises:
            InputError: a loss was propagated without its weight.
        """
        assert self.tokens is not None and self.loss is not None
        if self._weight is not None:
            raise InputError("the backward of a subclass of Idefics2Module doesn't call super().backward(loss)")
        tokens, loss = summed(trainer, torch.stack([self.tokens.double(), self.loss.double()]))
        self.reset()
        tokens = tokens.clamp(min=1)
        scale_gradients(parameters, trainer.accumulate_grad_batches * trainer.world_size * SCALE_TOKENS / tokens)
        return (loss / tokens).float()

    def state(self, parameters: Mapping[str, nn.Parameter], trainer: Trainer) -> dict[str, Any]:
        """Return the sums and gradients of an unfinished optimizer step as means over ranks; all ranks must call it."""
        assert self.tokens is not None and self.loss is not None
        ranks = trainer.world_size
        return {
            "step": [summed(trainer, value) / ranks for value in (self.tokens, self.loss)],
            "gradients": {
                name: summed(trainer, p.grad) / ranks for name, p in parameters.items() if p.grad is not None
            },
        }

    def restore(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        """Continue the unfinished optimizer step of `state`."""
        self.tokens, self.loss = (value.to(device) for value in state["step"])
        for name, parameter in parameters.items():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter)
