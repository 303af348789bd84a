"""The vision tower's MLP with the first product and GELU in one kernel: a kernel of its own takes a third as long."""

from typing import Any

import torch
from torch import Tensor, nn

from idefics_lit.model.compat import addmm_gelu


class VisionMLP(nn.Module):
    """An MLP of transformers' vision towers, whose layers it shares.

    The kernels are one where ``fc1`` is frozen, and neither quantized nor adapted.
    """

    def __init__(self, mlp: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.config, self.fc1, self.activation_fn, self.fc2 = mlp.config, mlp.fc1, mlp.activation_fn, mlp.fc2
        self.train(mlp.training)

    def forward(self, states: Tensor) -> Tensor:
        """Return the MLP's output (..., width) for states (..., width)."""
        fc1 = self.fc1
        can_fuse = type(fc1) is nn.Linear and self.config.hidden_act == "gelu_pytorch_tanh"
        if can_fuse and states.is_cuda and states.dtype == fc1.weight.dtype and not torch.is_grad_enabled():
            hidden = addmm_gelu(fc1.bias, states.flatten(0, -2), fc1.weight).unflatten(0, states.shape[:-1])
        else:
            hidden = self.activation_fn(fc1(states))
        outputs: Tensor = self.fc2(hidden)
        return outputs


def fuse_vision_mlps(base: Any) -> None:  # noqa: ANN401
    """Replace the MLPs of a base model's vision tower."""
    for layer in base.model.vision_model.encoder.layers:
        layer.mlp = VisionMLP(layer.mlp)
