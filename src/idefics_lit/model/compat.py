"""Private names of torch and transformers without a public equivalent, checked on torch 2.14 and transformers 5.24.

Also an import of bitsandbytes that is several times as fast.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch


def import_bitsandbytes() -> None:
    """Import bitsandbytes without Inductor, which takes longer to import than transformers, peft and it together.

    bitsandbytes passes two functions to ``torch.compile`` on import. They replace kernels on devices for which it has
    none; there they run uncompiled. Call this before peft is imported, which imports bitsandbytes.
    """

    def keep(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
        return function

    with patch.object(torch, "compile", keep):
        import bitsandbytes  # noqa: F401


def configure_compile() -> None:
    """Set options of torch.compile that only ``torch._dynamo.config`` has."""
    options = torch._dynamo.config
    for name in ("specialize_float", "optimize_ddp"):
        assert hasattr(options, name), f"torch._dynamo.config.{name} is gone in torch {torch.__version__}"
    # With dynamic shapes, floats such as an epsilon become CPU tensors, whose C++ code takes a minute to compile.
    options.specialize_float = True
    # DDP's buckets would split the graphs of layers with large adapters.
    options.optimize_ddp = False


def attention_implementation(config: Any) -> str:  # noqa: ANN401
    """Return the name of a transformers configuration's attention implementation; its JSON leaves it out."""
    assert hasattr(config, "_attn_implementation"), "transformers' configurations have no _attn_implementation any more"
    return str(config._attn_implementation)
