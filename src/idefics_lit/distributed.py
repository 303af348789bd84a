"""What ranks tell one another besides tensors."""

from typing import TypeVar

import torch.distributed
from lightning import Trainer

T = TypeVar("T")


def gather_objects(trainer: Trainer, value: T) -> list[T]:
    """Return every rank's value, on every rank; all ranks must call it."""
    if trainer.world_size == 1:
        return [value]
    gathered: list[T] = [value] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered
