"""Non-blocking GPU-to-CPU copies."""

import torch
from torch import Tensor


class HostCopy:
    """A non-blocking copy of a tensor to the CPU.

    Args:
        value: a tensor on any device; later operations on it in the same stream don't change the copy.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value.detach().to("cpu", non_blocking=True, copy=True)
        self._event: torch.cuda.Event | None = None
        if value.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def ready(self) -> bool:
        """Whether the copy is done, so that `result` doesn't block."""
        return self._event is None or self._event.query()

    def result(self) -> Tensor:
        """Wait for the copy and return it."""
        if self._event is not None:
            self._event.synchronize()
        return self._value
