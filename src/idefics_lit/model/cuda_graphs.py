"""Capture functions as CUDA graphs: forward and backward, thousands of kernels, are one launch each.

A shape is captured at its fourth call: a capture takes as long as about 20 calls without a graph take more than with
one, and many shapes come only once or twice. Other threads, such as a loader's, may use the GPU during a capture.
Gradients are copies, so that they can be accumulated. The backward of a call must come before the function's next call.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from idefics_lit.model.memory import free_gpu_bytes

CALLS_BEFORE_CAPTURE = 3  # of a shape; benchmarks/NOTES.md: which number takes the least time
MAX_SHAPES = 64  # captured for a function; each takes memory
MAX_MEMORY_SHARE = 0.5  # of the free memory, that a new shape may need


class CudaGraphCache(nn.Module):
    """A function of tensors with a CUDA graph for each shape of its arguments.

    Args:
        function: from tensors to a tensor; its control flow may depend on shapes, but not on values.
        module: the module whose parameters it uses; those that require gradients get them.
    """

    def __init__(self, function: Callable[..., Tensor], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module
        self.trainable = {name: p for name, p in self.named_parameters() if p.requires_grad}
        self.calls = 0
        self._graphs: dict[Any, _Graph] = {}
        self._uncaptured_calls: Counter[Any] = Counter()  # by shape
        # A function's graphs share a pool, since only one of them runs at a time. Each function has its own pool: what
        # its forward saves for its backward must survive the other functions' graphs.
        self._pool = torch.cuda.graph_pool_handle()
        self._pool_bytes = 0

    def forward(self, *arguments: Tensor) -> Tensor:
        """Call the function without a graph."""
        return self.function(*arguments)

    def replay(self, *arguments: Tensor, calls_before_capture: int = CALLS_BEFORE_CAPTURE) -> Tensor:
        """Call the function as a graph if its shape is captured; gradients flow to its arguments and parameters.

        Args:
            arguments: the function's.
            calls_before_capture: calls with a shape that run without a graph, 1 or more.
        """
        try:
            return self._replay(arguments, calls_before_capture)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        self.forget()
        return self._replay(arguments, calls_before_capture)

    def forget(self) -> None:
        """Free the memory of all graphs; their shapes are captured again when they are used again."""
        self._graphs.clear()
        self._uncaptured_calls.clear()
        self._pool_bytes = 0
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def _replay(self, arguments: tuple[Tensor, ...], calls_before_capture: int) -> Tensor:
        key = (torch.is_grad_enabled(), *((x.shape, x.dtype, x.requires_grad) for x in arguments))
        if key not in self._graphs:
            # The new graph needs about as much memory as the others' pool, and can't use the pool's.
            if not self._uncaptured_calls[key] and self._is_memory_short():
                self.forget()
            self._uncaptured_calls[key] += 1
            if self._uncaptured_calls[key] <= calls_before_capture or len(self._graphs) >= MAX_SHAPES:
                with _autocast():
                    return self(*arguments)
            torch.cuda.empty_cache()  # as a capture does: what is reserved in addition is the pool's
            reserved_bytes = torch.cuda.memory_reserved()
            self._graphs[key] = _Graph(self, arguments, self.trainable, self._pool)
            self._pool_bytes += torch.cuda.memory_reserved() - reserved_bytes
        result: Tensor = _Replay.apply(self._graphs[key], *arguments, *self.trainable.values())
        return result

    def _is_memory_short(self) -> bool:
        if self._pool_bytes <= MAX_MEMORY_SHARE * free_gpu_bytes():
            return False
        torch.cuda.empty_cache()  # takes time; what it releases is free too
        return self._pool_bytes > MAX_MEMORY_SHARE * free_gpu_bytes()


class _Graph:
    """The graphs of forward and backward for arguments of one shape."""

    def __init__(
        self,
        function: CudaGraphCache,
        arguments: tuple[Tensor, ...],
        trainable: dict[str, nn.Parameter],
        pool: tuple[int, int],
    ) -> None:
        self.function = function
        self.arguments = [x.detach().clone().requires_grad_(x.requires_grad) for x in arguments]
        # Aliases of the parameters' memory with their own autograd history: the history of an earlier step would bind
        # the graph to that step's stream.
        aliases: dict[str, Tensor] = {name: nn.Parameter(p.detach()) for name, p in trainable.items()}
        inputs = [x for x in (*self.arguments, *aliases.values()) if x.requires_grad]
        self.requires_grad = [x.requires_grad for x in (*arguments, *trainable.values())]
        # thread_local: other threads, such as the one that pins a loader's batches, may allocate memory during capture.
        capture: dict[str, Any] = {"pool": pool, "capture_error_mode": "thread_local"}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _autocast(), torch.cuda.graph(self.forward, **capture):
            result = functional_call(function, aliases, tuple(self.arguments))
        self.result = result.detach()
        if result.requires_grad:
            self.grad_result = torch.empty_like(result)
            with torch.cuda.graph(self.backward, **capture):
                self.grads = torch.autograd.grad(result, inputs, self.grad_result)
                self.flat = torch.cat([grad.flatten() for grad in self.grads if grad.dtype == torch.float32])

    def run(self, arguments: tuple[Tensor, ...]) -> Tensor:
        for static, argument in zip(self.arguments, arguments, strict=False):
            static.detach().copy_(argument)
        self.forward.replay()
        return self.result.clone()

    def gradients(self, grad_result: Tensor) -> list[Tensor | None]:
        self.grad_result.copy_(grad_result)
        self.backward.replay()
        # One copy for the gradients of all parameters, which are many and small.
        flat = iter(self.flat.clone().split([grad.numel() for grad in self.grads if grad.dtype == torch.float32]))
        grads = iter(next(flat).view_as(grad) if grad.dtype == torch.float32 else grad.clone() for grad in self.grads)
        return [next(grads) if required else None for required in self.requires_grad]


class CudaGraphRunner:
    """Run a function that changes tensors with fixed addresses; from its second call on, as a CUDA graph.

    Args:
        graph: False runs the function without a graph.
    """

    def __init__(self, *, graph: bool) -> None:
        self.use_graph, self.calls = graph, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], None]) -> None:
        """Run the function, which must do the same at every call."""
        self.calls += 1
        if not self.use_graph or self.calls == 1:
            with _autocast() if self.use_graph else nullcontext():
                function()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with _autocast(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                function()
        self._graph.replay()


def _autocast() -> AbstractContextManager[None]:
    """Return the current autocast without its cache: casts of weights must be part of the graph, at every replay."""
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", dtype, enabled, cache_enabled=False)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *arguments: Tensor) -> Tensor:  # noqa: ANN401
        graph.function.calls += 1
        ctx.graph, ctx.call = graph, graph.function.calls
        return graph.run(arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_result: Tensor) -> Any:  # noqa: ANN401
        if ctx.call != ctx.graph.function.calls:
            raise RuntimeError("model.cuda_graphs: a batch's backward must come before the next batch's forward")
        return None, *ctx.graph.gradients(grad_result)
