"""Private names of torch and transformers without a public equivalent, checked on torch 2.14 and transformers 5.24."""

from typing import Any

import torch
from torch import Tensor


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


def set_attention_implementation(config: Any, name: str) -> None:  # noqa: ANN401
    """Set the attention implementation of modules that have this transformers configuration."""
    attention_implementation(config)  # checks that the name exists
    config._attn_implementation = name


def addmm_gelu(bias: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return GELU, in its tanh form, of ``inputs @ weight.T + bias`` in one kernel of a GPU; inputs are (N, K)."""
    assert hasattr(torch, "_addmm_activation"), f"torch._addmm_activation is gone in torch {torch.__version__}"
    return torch._addmm_activation(bias, inputs, weight.t(), use_gelu=True)
