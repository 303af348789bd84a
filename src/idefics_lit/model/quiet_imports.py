"""bitsandbytes and peft, imported faster and without the message that bitsandbytes logs on some CPUs.

The message reports an optional kernel for inference, which has no gradient and isn't used (see
`idefics_lit.model.loading`). bitsandbytes passes two functions to ``torch.compile`` on import. That imports Inductor,
which takes longer than transformers, peft and bitsandbytes together. These functions replace kernels on devices for
which bitsandbytes has none; there they run uncompiled. peft imports bitsandbytes, so both are imported here.
"""

import logging
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch


def _uncompiled(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
    return function


_logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
_was_disabled, _logger.disabled = _logger.disabled, True
try:
    with patch.object(torch, "compile", _uncompiled):
        import bitsandbytes
        import peft
        from bitsandbytes.nn.modules import Linear4bit, Params4bit
finally:
    _logger.disabled = _was_disabled

__all__ = ["Linear4bit", "Params4bit", "bitsandbytes", "peft"]
