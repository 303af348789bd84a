"""Communication between ranks."""

from typing import TypeVar

import torch.distributed
from lightning import Trainer
from torch import Tensor

T = TypeVar("T")


def gather_objects(trainer: Trainer, value: T) -> list[T]:
    """Gather a value of every rank on every rank. All ranks must call it."""
    if trainer.world_size == 1:
        return [value]
    gathered: list[T] = [value] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def summed(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Sum a tensor over ranks, on every rank. All ranks must call it.

    Unlike Lightning's ``reduce`` it has no barrier, at which the CPU would wait for the GPU.
    """
    if trainer.world_size > 1:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
    return tensor
