"""The loss of an optimizer step: the mean over all its answer tokens, over micro-batches and ranks.

Lightning averages the gradients over micro-batches and ranks, whatever their numbers of tokens. So the summed loss is
propagated, and the gradients are divided by the number of tokens before the optimizer's step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn

from idefics_lit.training.lightning_compat import scale_gradients
from idefics_lit.utils.distributed import summed

# The summed loss of a micro-batch is divided by this number of answer tokens, which keeps float16 gradients near their
# usual size. A power of two doesn't change the bits of the mantissa.
LOSS_SCALE_TOKENS = 64


class TokenMean:
    """The sums over the micro-batches of an optimizer step on this rank.

    Attributes:
        tokens: the number of answer tokens, 0-d; None before the first micro-batch.
        loss: the summed loss, 0-d.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.loss: Tensor | None = None

    def reset(self) -> None:
        """Begin a new optimizer step."""
        self.tokens = self.loss = None

    def add(self, loss: Tensor, tokens: Tensor) -> Tensor:
        """Add a micro-batch's summed loss and its number of tokens, both 0-d; return the loss to propagate."""
        self.tokens = tokens if self.tokens is None else self.tokens + tokens
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()
        return loss / LOSS_SCALE_TOKENS

    def average_gradients(self, optimizer: torch.optim.Optimizer, trainer: Trainer) -> Tensor:
        """Make the gradients those of the mean over the step's tokens, and return the mean loss (0-d, float32)."""
        assert self.tokens is not None and self.loss is not None
        tokens, loss = summed(trainer, torch.stack([self.tokens.double(), self.loss.double()]))
        self.reset()
        tokens = tokens.clamp(min=1)
        scale_gradients(optimizer, trainer.accumulate_grad_batches * trainer.world_size * LOSS_SCALE_TOKENS / tokens)
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
