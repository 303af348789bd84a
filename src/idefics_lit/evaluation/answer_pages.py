"""Compute which of a question's pages its answer is on, as MP-DocVQA asks.

The pages' features are those that the answer was generated from. Questions with the same pages share a row for each
page, see `idefics_lit.model.packing`.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from idefics_lit.model.batch import Batch
from idefics_lit.model.forward import Backbone
from idefics_lit.model.packing import IGNORED_LABEL, PackedRow, Segment, pack


def page_scores(
    backbone: Backbone,
    batch: Batch,
    page_features: Sequence[Tensor],
    answers: Mapping[int, list[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[int, Tensor]:
    """Return the log-likelihood of an answer given each of its question's pages alone; the answer is on the likeliest.

    The answer is the one generated from all pages. It has the same tokens on each page, so the sum of their
    log-likelihoods orders the pages as the mean would. Tito et al. ("Hierarchical multimodal transformers for
    Multi-Page DocVQA", 2023), who set the task, train a classifier for the page, or let their baselines answer page by
    page and keep the most confident answer; this needs no training and one forward for each page.

    Args:
        backbone: of the model, in any mode.
        batch: `Idefics2Collator`'s for evaluation.
        page_features: for each row (image tokens, width), from `Backbone.encode_pages`.
        answers: by the question's index in the batch, the token ids of its answer with the end-of-sequence token.
        tokenizer: the model's tokenizer.

    Returns:
        By the question's index, (pages).
    """
    assert batch.prompts is not None
    row_members: dict[int, list[int]] = {}
    questions: dict[int, Segment] = {}
    for i, answer in answers.items():
        row = batch.question_rows[i]
        row_members.setdefault(row, []).append(i)
        prompt = batch.prompts.input_ids[i][batch.prompts.attention_mask[i].bool()].tolist()
        question = prompt[batch.page_spans[row][-1][1] :]
        questions[i] = Segment(question + answer, [IGNORED_LABEL] * len(question) + answer)
    scores: dict[int, list[Tensor]] = {i: [] for i in answers}
    # One forward for the n-th page of every row: no more rows than the batch has, so no more memory.
    for page in range(max(len(batch.page_spans[row]) for row in row_members)):
        rows = [row for row in row_members if page < len(batch.page_spans[row])]
        packed_rows = [
            PackedRow(_with_page_alone(batch, row, page), [questions[i] for i in row_members[row]]) for row in rows
        ]
        tokens = pack(packed_rows, tokenizer.pad_token_id).to(batch.input_ids.device)
        features = [_features_of_page(page_features[row], batch.page_images[row], page) for row in rows]
        with backbone.evaluating():
            hidden = backbone.prefill(tokens, features)
            logits = backbone.logits(hidden.flatten(0, 1).index_select(0, tokens.supervised_positions)).float()
        labels = tokens.labels.flatten()[tokens.supervised_positions + 1]
        log_likelihoods = -F.cross_entropy(logits, labels, reduction="none")
        members = [i for row in rows for i in row_members[row]]
        for i, of_answer in zip(members, log_likelihoods.split([len(answers[i]) for i in members]), strict=True):
            scores[i].append(of_answer.sum())
    return {i: torch.stack(of_pages) for i, of_pages in scores.items()}


def _with_page_alone(batch: Batch, row: int, page: int) -> Segment:
    """Return a row's tokens up to the end of its pages, as if it had only one of them."""
    ids, spans = batch.input_ids[row].tolist(), batch.page_spans[row]
    start, stop = spans[page]
    prefix = ids[: spans[0][0]] + ids[start:stop]
    return Segment(prefix, [IGNORED_LABEL] * len(prefix))


def _features_of_page(features: Tensor, page_images: Sequence[int], page: int) -> Tensor:
    """Return the features of one page of a row; each image has as many."""
    per_image = len(features) // sum(page_images)
    return features.split([count * per_image for count in page_images])[page]
