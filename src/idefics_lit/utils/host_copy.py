"""A GPU's numbers on their way to the CPU, which goes on meanwhile."""

import torch
from torch import Tensor


class HostCopy:
    """A tensor that is being copied to the CPU.

    Args:
        value: on any device; what is done to it later in the same stream doesn't change what arrives.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value.detach().to("cpu", non_blocking=True, copy=True)
        self._event: torch.cuda.Event | None = None
        if value.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def ready(self) -> bool:
        """Whether nothing has to be waited for."""
        return self._event is None or self._event.query()

    def result(self) -> Tensor:
        """Return it, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._value
