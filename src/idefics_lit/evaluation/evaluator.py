"""Evaluate a batch: one prefill gives the loss and the generated answers.

Dropout and gradients are off in every mode of the model. A batch that doesn't fit into memory is evaluated in parts.
"""

from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import ProcessorMixin

from idefics_lit.evaluation.answer import Answer
from idefics_lit.evaluation.answer_pages import page_scores
from idefics_lit.evaluation.decoding import GreedyDecoder, PrefillCache
from idefics_lit.metrics import anls
from idefics_lit.model.batch import Batch
from idefics_lit.model.forward import Backbone


class DecodedBatch(NamedTuple):
    """The answers to a batch and what they were computed from.

    Attributes:
        hidden: the last hidden states of the batch's rows (R, T, width).
        page_features: for each row the embeddings of its image tokens (image tokens, width).
        ids: token ids of the B answers, each with its end-of-sequence token.
        log_probabilities: of the B answers, see `GreedyDecoder.answer`.
        texts: the B answers.
    """

    hidden: Tensor
    page_features: list[Tensor]
    ids: list[list[int]]
    log_probabilities: list[float]
    texts: list[str]


class Evaluator:
    """Generate and score the answers to `Idefics2Collator`'s batches for evaluation.

    Args:
        backbone: of the model, in any mode.
        processor: the model's processor.
        max_new_tokens: the maximum number of tokens of an answer.
        strip_period: see `idefics_lit.metrics.anls`.
    """

    def __init__(
        self, backbone: Backbone, processor: ProcessorMixin, *, max_new_tokens: int, strip_period: bool
    ) -> None:
        self.backbone, self.processor = backbone, processor
        self.max_new_tokens, self.strip_period = max_new_tokens, strip_period
        self.decoder: GreedyDecoder | None = None
        self.max_rows: int | None = None  # that fit into memory, once a batch didn't

    def free_memory(self) -> None:
        """Free the decoder's keys and values and its CUDA graphs."""
        self.decoder = None

    def evaluate(self, batch: Batch, loss: MeanMetric | None = None) -> list[Answer]:
        """Generate and score the answer to each question of a batch.

        ``answer_page`` is computed, see `page_scores`, for questions with a reference page; without ``loss``, as in
        predictions, for all questions with several pages.

        Args:
            batch: the collator's; a batch of skipped examples alone has no answers.
            loss: is updated with the batch's loss, weighted by the number of supervised tokens.
        """
        if batch.is_empty:
            return []
        rows = len(batch.input_ids)
        max_rows = self.max_rows or rows
        if max_rows < rows:
            parts = (batch.rows(start, start + max_rows) for start in range(0, rows, max_rows))
            return [answer for part in parts for answer in self.evaluate(part, loss)]
        try:
            with self.backbone.evaluating():
                return self._evaluate(batch, loss)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        # Outside the handler, whose traceback still references the tensors.
        self.free_memory()
        torch.cuda.empty_cache()
        self.max_rows = -(-rows // 2)
        return self.evaluate(batch, loss)

    def decode(self, batch: Batch) -> DecodedBatch:
        """Generate the answers to a batch's prompts."""
        if self.decoder is None:
            graphs = self.backbone.has_graphs
            self.decoder = GreedyDecoder(self.backbone, self.processor, self.max_new_tokens, graphs=graphs)
        cache = PrefillCache()
        # Eager: the layers are compiled for the shapes of training.
        with self.backbone.evaluating(), torch.compiler.set_stance("force_eager"):
            page_features = self.backbone.encode_pages(batch)
            hidden = self.backbone.prefill(batch, page_features, cache)
            ids, log_probabilities = self.decoder.answer(batch, hidden, cache)
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return DecodedBatch(hidden, page_features, ids, log_probabilities, [text.strip() for text in texts])

    def _evaluate(self, batch: Batch, loss: MeanMetric | None) -> list[Answer]:
        assert batch.prompts is not None
        prompts, decoded = batch.prompts, self.decode(batch)
        pages = self._answer_pages(batch, decoded, include_unknown=loss is None)
        if loss is not None:
            total, tokens = self.backbone.loss(batch, decoded.hidden)
            if total.isfinite():
                loss.update(total / tokens.clamp(min=1), weight=tokens)
            else:
                ids = ", ".join(map(str, batch.question_ids))
                rank_zero_warn(f"The loss of questions {ids} is {float(total)}; the mean loss leaves them out.")
        scores = [
            anls(text, references, strip_period=self.strip_period) if references else None
            for text, references in zip(decoded.texts, prompts.references, strict=True)
        ]
        columns = (
            *(batch.question_ids, prompts.questions, decoded.texts, prompts.references, scores),
            *(prompts.question_types, decoded.log_probabilities, map(len, decoded.ids)),
            *(pages, prompts.reference_pages, prompts.indices),
        )
        return [Answer(*values) for values in zip(*columns, strict=True)]

    def _answer_pages(self, batch: Batch, decoded: DecodedBatch, *, include_unknown: bool) -> list[int | None]:
        """Return the page of each of the B answers, None where it isn't computed.

        Args:
            batch: the batch.
            decoded: its answers.
            include_unknown: compute it for questions of several pages without a reference page too.
        """
        assert batch.prompts is not None
        counts = [len(batch.page_images[row]) for row in batch.question_rows]
        wanted = [
            page is not None or (include_unknown and count > 1)
            for count, page in zip(counts, batch.prompts.reference_pages, strict=True)
        ]
        ids = {i: decoded.ids[i] for i, count in enumerate(counts) if wanted[i] and count > 1}
        scores: dict[int, Tensor] = {}
        if ids:
            with torch.compiler.set_stance("force_eager"):
                scores = page_scores(self.backbone, batch, decoded.page_features, ids, self.processor.tokenizer)
        return [
            (int(scores[i].argmax()) if i in scores else 0) if is_wanted else None for i, is_wanted in enumerate(wanted)
        ]
