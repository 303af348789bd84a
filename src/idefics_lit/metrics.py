"""ANLS, the metric of DocVQA: a functional core and a thin torchmetrics ``Metric`` around it.

What is special here: lengths and distance are both taken on the normalised strings, a question without references is
an error and never a score, and every question counts once, however distributed samplers pad.
"""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from idefics_lit.errors import InputError
from idefics_lit.utils.texts import list_of_texts


def anls(
    prediction: str,
    references: Sequence[str] | str,
    *,
    threshold: float = 0.5,
    inclusive: bool = True,
    strip_period: bool = False,
    question_id: int | str | None = None,
) -> float:
    """Average Normalised Levenshtein Similarity of one answer: the best of its similarities to the references.

    The similarity to one reference is ``1 - d / L``, with ``d`` the Levenshtein distance and ``L`` the longer length,
    both in code points of the lower-cased strings whose runs of white space are one space; below the threshold it is 0.
    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019, as the RRC's evaluation script reads it.

    Args:
        prediction: the answer given.
        references: the accepted answers, at least one; a single text is one reference.
        threshold: similarities below it score 0.
        inclusive: whether a similarity equal to the threshold is kept, as the RRC's script does; the paper drops it.
        strip_period: drop full stops that end the prediction, and the white space before them, as the authors of
            Idefics2 do before scoring.
        question_id: named in the error.

    Returns:
        A score from 0 to 1.

    Raises:
        InputError: when there are no references, or prediction or references are no texts.

    >>> anls("Coca cola", ["Coca Cola", "Coca Cola Company"])
    1.0
    >>> anls("ab", ["ac"]), anls("ab", ["ac"], inclusive=False)
    (0.5, 0.0)
    """
    if not isinstance(prediction, str):
        kind = type(prediction).__name__
        raise InputError(f"question {question_id}: the prediction is {kind} {prediction!r:.100}: give a text")
    references = list_of_texts(references, f"question {question_id}: references")
    if not references:
        raise InputError(f"question {question_id}: no reference answers, so it has no ANLS: use a split with answers")
    answer = _normalise(prediction)
    if strip_period:
        answer = answer.rstrip(". ")
    best = max(_similarity(answer, _normalise(reference)) for reference in references)
    return best if best > threshold or (inclusive and best == threshold) else 0.0


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    return 1.0 - Levenshtein.distance(a, b) / longer if longer else 1.0


class ANLS(Metric):
    """Mean ANLS over questions, each counted once, exact in distributed runs.

    Scores are gathered and never averaged by rank. Pairs that share one of ``question_ids`` count once, by their first
    score: where ids may recur, give each question's place in its set. Without ``question_ids`` every pair counts.

    Args:
        threshold: see `anls`.
        inclusive: see `anls`.
        strip_period: see `anls`.
        **kwargs: torchmetrics' own, such as ``compute_on_cpu``.

    >>> metric = ANLS()
    >>> metric.update(["0.28", "paris", "paris"], [["0.28"], ["rome"], ["rome"]], question_ids=[1, 2, 2])
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    question_ids: list[Tensor]
    scores: list[Tensor]

    def __init__(
        self,
        *,
        threshold: float = 0.5,
        inclusive: bool = True,
        strip_period: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {
            "threshold": threshold,
            "inclusive": inclusive,
            "strip_period": strip_period,
        }
        self.add_state("question_ids", [], dist_reduce_fx="cat")
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all scores."""
        super().reset()
        # A rank that scores nothing takes part in the gathering all the same, with the right types.
        self._append([], [])

    def update(
        self,
        preds: Sequence[str],
        target: Sequence[Sequence[str] | str],
        question_ids: Sequence[int | str | None] | None = None,
    ) -> None:
        """Score a batch.

        Args:
            preds: n answers.
            target: n lists of references, or texts where there is one reference.
            question_ids: n ids, of which the number 7 and the text "7" are two; pairs that share an id count once;
                a None is no id.

        Raises:
            ValueError: when the lengths differ.
            InputError: when a question has no references, or something else stands where a list or a text should.
        """
        for name, value in (("preds", preds), ("target", target), ("question_ids", question_ids)):
            if isinstance(value, (str, bytes, Mapping)):
                raise InputError(f"{name}: {type(value).__name__} {value!r:.100}: give a list, one for each question")
        # A fresh id for each pair that has none, unique over ranks.
        given: Sequence[int | str | None] = [None for _ in preds] if question_ids is None else question_ids
        ids = [uuid.uuid4().hex if question_id is None else question_id for question_id in given]
        scores = [
            anls(pred, references, question_id=question_id, **self.options)
            for pred, references, question_id in zip(preds, target, ids, strict=True)
        ]
        self._append([_hash(question_id) for question_id in ids], scores)

    def compute(self) -> Tensor:
        """Return the mean score as a 0-d tensor; NaN when nothing was scored."""
        ids, order = dim_zero_cat(self.question_ids).sort(stable=True)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[1:] = ids[1:] != ids[:-1]
        # Sorted, so that the sum doesn't depend on how questions were spread over ranks.
        return dim_zero_cat(self.scores)[order][first].sort().values.mean()

    def _append(self, ids: list[int], scores: list[float]) -> None:
        self.question_ids.append(torch.tensor(ids, dtype=torch.int64, device=self.device))
        self.scores.append(torch.tensor(scores, dtype=torch.float64, device=self.device))


def _hash(question_id: int | str) -> int:
    """64 bits of an id, the same in every process (Python's own hash of a string is not)."""
    key = f"{isinstance(question_id, str)} {question_id}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)
