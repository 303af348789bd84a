"""CUDA graphs: thousands of kernels, forward and backward, launched at once.

What is special here: shapes are captured when they come for the second time, the first call being the warm-up; other
threads, such as the loader's, may go on meanwhile; and gradients are copies, so that they can be accumulated. A
function's call is to be followed by its backward before it is called again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

MOST = 64  # shapes of a function that are captured; each takes memory
ROOM = 0.5  # the share of the free memory that a new shape may need


class CudaGraphCache(nn.Module):
    """A function of tensors that runs as a CUDA graph where it can.

    Args:
        function: of tensors, to one; what it does may depend on their shapes, not on their values.
        module: whose parameters it uses; those that require gradients get them.
    """

    def __init__(self, function: Callable[..., Tensor], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module
        self.trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        self.calls = 0
        self._graphs: dict[Any, _Graph | None] = {}
        # One pool: of a function's graphs only one is at work at a time. Another function's is another pool, since
        # what its forward keeps for its backward has to survive this one's.
        self._pool = torch.cuda.graph_pool_handle()
        self._kept = 0  # bytes of it

    def forward(self, *arguments: Tensor) -> Tensor:
        """Call the function as it is."""
        return self.function(*arguments)

    def replay(self, *arguments: Tensor) -> Tensor:
        """Call the function; gradients flow to its arguments and parameters."""
        try:
            return self._replay(arguments)
        except torch.OutOfMemoryError:
            if not any(self._graphs.values()):
                raise
        self.forget()
        return self._replay(arguments)

    def forget(self) -> None:
        """Give back the memory of all graphs; they are captured again when their shapes come again."""
        self._graphs.clear()
        self._kept = 0
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def _replay(self, arguments: tuple[Tensor, ...]) -> Tensor:
        key = (torch.is_grad_enabled(), *((x.shape, x.dtype, x.requires_grad) for x in arguments))
        if key not in self._graphs:
            if len(self._graphs) < MOST:
                # It lies beside the memory that the other shapes' graphs keep for themselves, and takes about as much.
                if self._kept > ROOM * _free():
                    self.forget()
                self._graphs[key] = None
            with _autocast():
                return self(*arguments)
        graph = self._graphs[key]
        if graph is None:
            free = _free()
            graph = self._graphs[key] = _Graph(self, arguments, self.trained, self._pool)
            self._kept += free - _free()
        result: Tensor = _Replay.apply(graph, *arguments, *self.trained.values())
        return result


class _Graph:
    """Forward and backward for arguments of one shape."""

    def __init__(
        self,
        function: CudaGraphCache,
        arguments: tuple[Tensor, ...],
        trained: dict[str, nn.Parameter],
        pool: tuple[int, int],
    ) -> None:
        self.graphed = function
        self.arguments = [x.detach().clone().requires_grad_(x.requires_grad) for x in arguments]
        # The same memory with a history of its own: what is left of another step's would bind the graph to its stream.
        aliases: dict[str, Tensor] = {name: nn.Parameter(p.detach()) for name, p in trained.items()}
        wanted = [x for x in (*self.arguments, *aliases.values()) if x.requires_grad]
        self.requires_grad = [x.requires_grad for x in (*arguments, *trained.values())]
        # thread_local: other threads, such as the one that pins a loader's batches, allocate memory meanwhile.
        capture: dict[str, Any] = {"pool": pool, "capture_error_mode": "thread_local"}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _autocast(), torch.cuda.graph(self.forward, **capture):
            result = functional_call(function, aliases, tuple(self.arguments))
        self.result = result.detach()
        if result.requires_grad:
            self.grad_result = torch.empty_like(result)
            with torch.cuda.graph(self.backward, **capture):
                self.grads = torch.autograd.grad(result, wanted, self.grad_result)
                self.flat = torch.cat([grad.flatten() for grad in self.grads if grad.dtype == torch.float32])

    def run(self, arguments: tuple[Tensor, ...]) -> Tensor:
        for static, given in zip(self.arguments, arguments, strict=False):
            static.detach().copy_(given)
        self.forward.replay()
        return self.result.clone()

    def gradients(self, grad_result: Tensor) -> list[Tensor | None]:
        self.grad_result.copy_(grad_result)
        self.backward.replay()
        # One copy for all the parameters', which are small and many.
        flat = iter(self.flat.clone().split([grad.numel() for grad in self.grads if grad.dtype == torch.float32]))
        grads = iter(next(flat).view_as(grad) if grad.dtype == torch.float32 else grad.clone() for grad in self.grads)
        return [next(grads) if wanted else None for wanted in self.requires_grad]


class CudaGraphRunner:
    """A function that changes tensors which stay where they are: one CUDA graph from its second call on.

    Args:
        graph: false calls it every time.
    """

    def __init__(self, *, graph: bool) -> None:
        self.wanted, self.calls = graph, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], None]) -> None:
        """Do what the function does, the same at every call."""
        self.calls += 1
        if not self.wanted or self.calls == 1:
            with _autocast() if self.wanted else nullcontext():
                function()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with _autocast(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                function()
        self._graph.replay()


def _free() -> int:
    """Bytes that can be allocated."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _autocast() -> AbstractContextManager[None]:
    """Autocast as it is, but without its cache: copies of weights must be made in the graph, at every replay."""
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", dtype, enabled, cache_enabled=False)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *arguments: Tensor) -> Tensor:  # noqa: ANN401
        graph.graphed.calls += 1
        ctx.graph, ctx.call = graph, graph.graphed.calls
        return graph.run(arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_result: Tensor) -> Any:  # noqa: ANN401
        if ctx.call != ctx.graph.graphed.calls:
            raise RuntimeError("model.cuda_graphs: a batch's backward must come before the next batch's forward")
        return None, *ctx.graph.gradients(grad_result)
