"""Which of a question's pages its answer is on, as MP-DocVQA asks.

What is special here: what has been seen of the pages for the answer is read again, not seen again; questions that share
their pages share a row for each of them, see `idefics_lit.model.packing`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from idefics_lit.model.batch import Batch
from idefics_lit.model.forward import Idefics2Backbone
from idefics_lit.model.packing import IGNORED_LABEL, PackedRow, Segment, pack


def page_scores(
    backbone: Idefics2Backbone,
    batch: Batch,
    pages: Sequence[Tensor],
    answers: Mapping[int, list[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[int, Tensor]:
    """Return the log-likelihood of an answer on each of its question's pages read alone; the likeliest page has it.

    It is the answer that was generated from all pages, so that its tokens are the same on each of them, and their sum
    chooses the page that their mean would. Tito et al. (Hierarchical multimodal transformers for Multi-Page DocVQA,
    2023), who set the task, train a head to tell the page, or let their baselines answer page by page and take the most
    confident; this needs no training, and one forward for each page.

    Args:
        backbone: of the model, in any mode.
        batch: `Idefics2Collator`'s for evaluation.
        pages: what `Idefics2Backbone.encode_pages` saw of each of its R rows, (image tokens, width).
        answers: the token ids of the answers to find the page of, with what ends them, by the question's number in the
            batch.
        tokenizer: the model's.

    Returns:
        By the question's number, (pages).
    """
    image_tokens: Any = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>"])
    assert batch.prompts is not None
    counts, row_of = batch.page_counts, batch.question_rows
    rows: dict[int, list[int]] = {}
    pieces = {}
    for i, answer in answers.items():
        rows.setdefault(row_of[i], []).append(i)
        prompt = batch.prompts.input_ids[i][batch.prompts.attention_mask[i].bool()].tolist()
        page, question = _cut(prompt, counts[row_of[i]], image_tokens)
        pieces[i] = page, Segment(question + answer, [IGNORED_LABEL] * len(question) + answer)
    found: dict[int, list[Tensor]] = {i: [] for i in answers}
    # Page by page: rows of a page each, as many as the batch has or fewer, take no more memory than the batch did.
    for number in range(max(counts[row] for row in rows)):
        some = {row: asked for row, asked in rows.items() if number < counts[row]}
        packed = pack([_row([pieces[i] for i in asked]) for asked in some.values()], tokenizer.pad_token_id)
        packed = packed.to(batch.input_ids.device)
        supervised_positions = packed.supervised_positions
        with backbone.evaluating():
            hidden = backbone.prefill(packed, [pages[row].chunk(counts[row])[number] for row in some])
            logits = backbone.logits(hidden.flatten(0, 1).index_select(0, supervised_positions)).float()
        scores = -F.cross_entropy(logits, packed.labels.flatten()[supervised_positions + 1], reduction="none")
        order = [i for asked in some.values() for i in asked]
        for i, of_answer in zip(order, scores.split([len(answers[i]) for i in order]), strict=True):
            found[i].append(of_answer.sum())
    return {i: torch.stack(some) for i, some in found.items()}


def _cut(prompt: list[int], count: int, image_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return what a prompt with so many pages would begin with if it had one, and what follows its pages."""
    places = [place for place, token in enumerate(prompt) if token in image_tokens]
    first, end = places[0], places[-1] + 1
    one = (end - first - 1) // count  # what ends a page begins the next one
    return prompt[: first + one + 1], prompt[end:]


def _row(pieces: Sequence[tuple[list[int], Segment]]) -> PackedRow:
    page = pieces[0][0]
    return PackedRow(Segment(page, [IGNORED_LABEL] * len(page)), [question for _, question in pieces])
