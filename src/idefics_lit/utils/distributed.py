"""What ranks tell one another."""

from typing import TypeVar

import torch.distributed
from lightning import Trainer
from torch import Tensor

T = TypeVar("T")


def gather_objects(trainer: Trainer, value: T) -> list[T]:
    """Return every rank's value, on every rank; all ranks must call it."""
    if trainer.world_size == 1:
        return [value]
    gathered: list[T] = [value] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def summed(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the sum of all ranks' tensors, on every rank; all ranks must call it.

    Without the barrier of Lightning's ``reduce``, at which the CPU waits for the GPU.
    """
    if trainer.world_size > 1:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
    return tensor
