"""How a batch is evaluated: its rows are read once, for loss and answers, as many at a time as there is memory for."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import ProcessorMixin

from idefics_lit.collator import take_rows
from idefics_lit.forward import Idefics2Forward
from idefics_lit.generation import Answering, Memory
from idefics_lit.metrics import anls


class Evaluation:
    """Answers and scores the questions of `Idefics2Collator`'s batches for evaluation.

    Args:
        parts: of a model in eval mode.
        processor: the model's.
        max_new_tokens: the longest answer.
        strip_period: see `idefics_lit.metrics.anls`.
    """

    def __init__(
        self, parts: Idefics2Forward, processor: ProcessorMixin, *, max_new_tokens: int, strip_period: bool
    ) -> None:
        self.parts, self.processor = parts, processor
        self.max_new_tokens, self.strip_period = max_new_tokens, strip_period
        self.answering: Answering | None = None
        self.most_rows: int | None = None  # that there is memory for, where it didn't suffice for a batch

    def forget(self) -> None:
        """Give back the memory that answering takes."""
        self.answering = None

    def records(self, batch: Mapping[str, Any], loss: MeanMetric | None = None) -> list[dict[str, Any]]:
        """Return a record a question: id, text, prediction, references, score where there are any, place in the set.

        Args:
            batch: the collator's.
            loss: takes the batch's, weighted by its labelled tokens.
        """
        if "input_ids" not in batch:  # bad examples alone
            return []
        rows = len(batch["input_ids"])
        most = self.most_rows or rows
        if most < rows:
            parts = (take_rows(batch, start, start + most) for start in range(0, rows, most))
            return [record for part in parts for record in self.records(part, loss)]
        try:
            return self._records(batch, loss)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        # Behind the handler, which still holds what was too much.
        self.forget()
        torch.cuda.empty_cache()
        self.most_rows = -(-rows // 2)
        return self.records(batch, loss)

    @torch.no_grad()
    def read_and_answer(self, batch: Mapping[str, Any]) -> tuple[Tensor, list[str]]:
        """Return the last hidden states of a batch's rows (R, T, width), and the B answers to the prompts in them."""
        if self.answering is None:
            graphs = self.parts.has_graphs
            self.answering = Answering(self.parts, self.processor, self.max_new_tokens, graphs=graphs)
        memory = Memory()
        with torch.compiler.set_stance("force_eager"):  # layers are compiled for training's shapes
            hidden = self.parts.read(batch, self.parts.see(batch), memory)
            return hidden, self.answering.answer(batch, hidden, memory)

    def _records(self, batch: Mapping[str, Any], loss: MeanMetric | None) -> list[dict[str, Any]]:
        hidden, answers = self.read_and_answer(batch)
        if loss is not None:
            value, tokens = self.parts.loss(batch, hidden)
            if value.isfinite():
                loss.update(value / tokens.clamp(min=1), weight=tokens)
            else:
                named = ", ".join(map(str, batch["question_ids"]))
                rank_zero_warn(f"The loss leaves out questions {named}, whose own is {float(value)}.")
        names = ("question_ids", "questions", "references", "question_types", "places")
        return [
            {
                "question_id": question_id,
                "question": question,
                "prediction": answer,
                "references": references,
                "score": anls(answer, references, strip_period=self.strip_period) if references else None,
                "question_types": question_types,
                "place": place,
            }
            for answer, question_id, question, references, question_types, place in zip(
                answers, *(batch[name] for name in names), strict=True
            )
        ]
