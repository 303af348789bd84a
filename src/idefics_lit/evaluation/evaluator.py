"""How a batch is evaluated: its rows are read once, for loss and answers, as many at a time as there is memory for.

What is special here: dropout is off and nothing is recorded for gradients whoever calls, in whatever mode the model is.
"""

from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import ProcessorMixin

from idefics_lit.evaluation.answer_pages import page_scores
from idefics_lit.evaluation.decoding import GreedyDecoder, PrefillCache
from idefics_lit.metrics import anls
from idefics_lit.model.batch import Batch
from idefics_lit.model.forward import Idefics2Backbone


class DecodedBatch(NamedTuple):
    """A batch that was read and answered.

    Attributes:
        hidden: the last hidden states of its rows (R, T, width).
        seen: what was seen of each row's pages, (image tokens, width).
        ids: the token ids of the B answers, with what ends each.
        texts: the answers.
    """

    hidden: Tensor
    seen: list[Tensor]
    ids: list[list[int]]
    texts: list[str]


class Evaluator:
    """Answers and scores the questions of `Idefics2Collator`'s batches for evaluation.

    Args:
        backbone: of the model, in any mode.
        processor: the model's.
        max_new_tokens: the longest answer.
        strip_period: see `idefics_lit.metrics.anls`.
    """

    def __init__(
        self, backbone: Idefics2Backbone, processor: ProcessorMixin, *, max_new_tokens: int, strip_period: bool
    ) -> None:
        self.backbone, self.processor = backbone, processor
        self.max_new_tokens, self.strip_period = max_new_tokens, strip_period
        self.decoder: GreedyDecoder | None = None
        self.most_rows: int | None = None  # that there is memory for, where it didn't suffice for a batch

    def forget(self) -> None:
        """Give back the memory that answering takes."""
        self.decoder = None

    def records(self, batch: Batch, loss: MeanMetric | None = None) -> list[dict[str, Any]]:
        """Return a record a question: id, text, prediction, references, score where there are any, place in the set.

        Where the data says which page the answer is on, that is its ``reference_page``, and ``answer_page`` is the one
        that it is found on, see `page_scores`. Without a loss, in predictions, that is found of all questions with
        several pages.

        Args:
            batch: the collator's.
            loss: takes the batch's, weighted by its labelled tokens.
        """
        if batch.is_empty:
            return []
        rows = len(batch.input_ids)
        most = self.most_rows or rows
        if most < rows:
            parts = (batch.rows(start, start + most) for start in range(0, rows, most))
            return [record for part in parts for record in self.records(part, loss)]
        try:
            with self.backbone.evaluating():
                return self._records(batch, loss)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        # Behind the handler, which still holds what was too much.
        self.forget()
        torch.cuda.empty_cache()
        self.most_rows = -(-rows // 2)
        return self.records(batch, loss)

    def read_and_answer(self, batch: Batch) -> DecodedBatch:
        """Read a batch's rows and answer the prompts in them."""
        if self.decoder is None:
            graphs = self.backbone.has_graphs
            self.decoder = GreedyDecoder(self.backbone, self.processor, self.max_new_tokens, graphs=graphs)
        memory = PrefillCache()
        # Layers are compiled for training's shapes.
        with self.backbone.evaluating(), torch.compiler.set_stance("force_eager"):
            seen = self.backbone.encode_pages(batch)
            hidden = self.backbone.prefill(batch, seen, memory)
            ids = self.decoder.answer(batch, hidden, memory)
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return DecodedBatch(hidden, seen, ids, [text.strip() for text in texts])

    def _answer_pages(self, batch: Batch, answered: DecodedBatch, all_of_them: bool) -> list[int | None]:
        """Return the page of each of the B answers, of those whose own the data knows or of all of them."""
        assert batch.prompts is not None
        counts = [batch.page_counts[row] for row in batch.question_rows]
        asked = [
            page is not None or (all_of_them and n > 1)
            for n, page in zip(counts, batch.prompts.reference_pages, strict=True)
        ]
        several = {i: answered.ids[i] for i, n in enumerate(counts) if asked[i] and n > 1}
        scores = {}
        if several:
            with torch.compiler.set_stance("force_eager"):
                scores = page_scores(self.backbone, batch, answered.seen, several, self.processor.tokenizer)
        found = {i: int(some.argmax()) for i, some in scores.items()}
        return [found.get(i, 0) if is_asked else None for i, is_asked in enumerate(asked)]

    def _records(self, batch: Batch, loss: MeanMetric | None) -> list[dict[str, Any]]:
        answered = self.read_and_answer(batch)
        pages = self._answer_pages(batch, answered, all_of_them=loss is None)
        if loss is not None:
            value, tokens = self.backbone.loss(batch, answered.hidden)
            if value.isfinite():
                loss.update(value / tokens.clamp(min=1), weight=tokens)
            else:
                named = ", ".join(map(str, batch.question_ids))
                rank_zero_warn(f"The loss leaves out questions {named}, whose own is {float(value)}.")
        assert batch.prompts is not None
        names = ("questions", "references", "question_types", "reference_pages", "indices")
        return [
            {
                "question_id": question_id,
                "question": question,
                "prediction": answer,
                "references": references,
                "score": anls(answer, references, strip_period=self.strip_period) if references else None,
                "question_types": question_types,
                **({} if page is None else {"answer_page": page}),
                **({} if reference_page is None else {"reference_page": reference_page}),
                "place": place,
            }
            for answer, page, question_id, question, references, question_types, reference_page, place in zip(
                answered.texts,
                pages,
                batch.question_ids,
                *(getattr(batch.prompts, name) for name in names),
                strict=True,
            )
        ]
