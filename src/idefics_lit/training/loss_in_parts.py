"""The loss of a training batch, computed in parts of its rows where memory doesn't suffice for all of them.

The gradients of a batch are computed before Lightning's backward pass, which then hands them to the parameters. So if
memory runs out in the middle, no gradient has been accumulated and the batch's activations can be freed. With DDP the
ranks reduce their gradients once, whether a rank has computed its batch in parts or not.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from idefics_lit.errors import InputError
from idefics_lit.model.batch import Batch
from idefics_lit.model.fsdp import FSDP2Strategy
from idefics_lit.training.lightning_compat import has_gradient_hooks
from idefics_lit.training.trained_weights import trained_parameters

if TYPE_CHECKING:
    from idefics_lit.training.module import Idefics2Module

Gradients = Sequence[Tensor | None]


class LossInParts:
    """The loss of a module's training batches.

    Args:
        enabled: False raises OutOfMemoryError, for which a search for the largest batch size waits.

    Attributes:
        max_rows: the rows that are computed at a time; None until a batch didn't fit.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.max_rows: int | None = None
        self._loss: Tensor | None = None  # of the last batch, until its gradients are computed
        self._gradients: _BatchGradients | None = None

    def forward(self, module: "Idefics2Module", batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what ``module.loss`` does. Call `backward` before the loss is propagated.

        Raises:
            InputError: a single row doesn't fit into memory.
        """
        parameters = [*trained_parameters(module).values()]
        if not (self.enabled and isinstance(batch, Batch) and _can_be_repeated(module, parameters)):
            return module.loss(batch)
        values = graph = None
        while values is None:
            rows = self._rows(batch)
            try:
                if rows == len(batch.input_ids):
                    graph, tokens = module.loss(batch)
                    values = graph.detach(), tokens
                else:
                    values = _sum_of_parts(module, batch, rows)
            except torch.OutOfMemoryError as error:
                _check_splittable(rows, error)
            if values is None:  # outside the handler, whose traceback still references the tensors
                self._split(module, rows)
        self._gradients = _BatchGradients(batch, parameters, graph)
        self._loss = _HandOver.apply(self._gradients, values[0], *parameters)
        return self._loss, values[1]

    def backward(self, module: "Idefics2Module", loss: Tensor) -> None:
        """Compute the gradients of the last batch, which `loss.backward()` will accumulate.

        Args:
            module: the module.
            loss: depends on the batch's loss.

        Raises:
            InputError: a single row doesn't fit into memory.
        """
        if self._loss is None or self._gradients is None:
            return
        (weight,) = torch.autograd.grad(loss, self._loss, retain_graph=True, allow_unused=True)
        gradients, self._loss, self._gradients = self._gradients, None, None
        while weight is not None and gradients.values is None:
            rows = self._rows(gradients.batch)
            try:
                gradients.compute(module, rows, weight)
            except torch.OutOfMemoryError as error:
                _check_splittable(rows, error)
            if gradients.values is None:
                self._split(module, rows)

    def _rows(self, batch: Batch) -> int:
        return min(self.max_rows or len(batch.input_ids), len(batch.input_ids))

    def _split(self, module: "Idefics2Module", rows: int) -> None:
        self.max_rows = -(-rows // 2)
        module.backbone.forget_graphs()
        torch.cuda.empty_cache()
        warnings.warn(
            f"{module.device}: memory doesn't suffice for {rows} rows of a batch: batches are computed in parts of "
            f"{self.max_rows} from now on, with the same loss; a smaller data.batch_size is faster",
            stacklevel=2,
        )


class _BatchGradients:
    """The gradients of a batch.

    Args:
        batch: the batch.
        parameters: what they are the gradients of.
        graph: the batch's loss with its autograd graph, if the batch was computed as a whole.

    Attributes:
        values: one for each parameter; None before they are computed and after they are accumulated.
    """

    def __init__(self, batch: Batch, parameters: Sequence[nn.Parameter], graph: Tensor | None) -> None:
        self.batch, self.parameters = batch, parameters
        self.values: Gradients | None = None
        self._graph = graph

    def compute(self, module: "Idefics2Module", rows: int, weight: Tensor) -> None:
        """Compute them from the graph, which is freed, or else in parts.

        Args:
            module: computes the loss of a part.
            rows: of each part.
            weight: the gradient of the batch's loss, 0-d.
        """
        graph, self._graph = self._graph, None
        if graph is not None:
            self.values = torch.autograd.grad(graph, self.parameters, weight, allow_unused=True)
            return
        total: Gradients = [None] * len(self.parameters)
        for part in _parts(self.batch, rows):
            gradients = self._of_part(module, part, weight)
            total = [
                new if old is None else old if new is None else old + new
                for old, new in zip(total, gradients, strict=True)
            ]
        self.values = total

    def _of_part(self, module: "Idefics2Module", part: Batch, weight: Tensor) -> Gradients:
        with module.trainer.precision_plugin.forward_context():
            loss, _ = module.loss(part)
        return torch.autograd.grad(loss, self.parameters, weight, allow_unused=True)


class _HandOver(torch.autograd.Function):
    """A loss whose backward pass returns gradients that have been computed before."""

    @staticmethod
    def forward(ctx: Any, gradients: _BatchGradients, loss: Tensor, *parameters: Tensor) -> Tensor:  # noqa: ANN401
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> Any:  # noqa: ANN401
        values, ctx.gradients.values = ctx.gradients.values, None
        if values is None:
            raise InputError(
                "the backward of a subclass of Idefics2Module doesn't call super().backward(loss), or a loss is "
                "propagated twice, or after that of the next batch"
            )
        return None, None, *values


def _can_be_repeated(module: "Idefics2Module", parameters: Sequence[nn.Parameter]) -> bool:
    """Whether a batch can be computed again after memory ran out."""
    trainer = module.trainer
    return (
        trainer.lightning_module is module  # whose `backward` is called
        and not isinstance(trainer.strategy, FSDP2Strategy)  # whose forward passes have collectives
        and not any(map(has_gradient_hooks, parameters))  # which would be called twice
    )


def _check_splittable(rows: int, error: torch.OutOfMemoryError) -> None:
    if rows == 1:
        raise InputError(
            "memory doesn't suffice for a page with its questions: give --model.gradient_checkpointing true, "
            "--model.quantize_vision true, a smaller --data.questions_per_page or a smaller --data.image_size"
        ) from error


def _parts(batch: Batch, rows: int) -> Iterator[Batch]:
    return (batch.rows(start, start + rows) for start in range(0, len(batch.input_ids), rows))


def _sum_of_parts(module: "Idefics2Module", batch: Batch, rows: int) -> tuple[Tensor, Tensor]:
    losses, tokens = zip(*(_without_graph(*module.loss(part)) for part in _parts(batch, rows)), strict=True)
    return torch.stack(losses).sum(), torch.stack(tokens).sum()


def _without_graph(loss: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), tokens
