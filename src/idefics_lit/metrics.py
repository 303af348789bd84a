"""ANLS, the metric of DocVQA: the function `anls` and the torchmetrics ``Metric`` `ANLS`.

Lengths and distances are those of the normalized strings. A question without references is an error. Every question
counts once, however distributed samplers pad.
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
    """Compute the Average Normalized Levenshtein Similarity of one answer: its highest similarity to a reference.

    The similarity to one reference is ``1 - d / L``, where ``d`` is the Levenshtein distance and ``L`` the length of
    the longer string, in code points, after lower-casing and replacing runs of white space with one space. Below the
    threshold it is 0. Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019, as implemented by the
    evaluation script of the Robust Reading Competition (RRC).

    Args:
        prediction: the answer.
        references: the accepted answers, at least one; a single string is one reference.
        threshold: lower similarities score 0.
        inclusive: whether a similarity equal to the threshold keeps its value, as in the RRC's script; in the paper it
            scores 0.
        strip_period: strip full stops and spaces from the end of the prediction, as the authors of Idefics2 do before
            scoring.
        question_id: named in error messages.

    Returns:
        A score from 0 to 1.

    Raises:
        InputError: there are no references, or the prediction or a reference is not a string.

    >>> anls("Coca cola", ["Coca Cola", "Coca Cola Company"])
    1.0
    >>> anls("ab", ["ac"]), anls("ab", ["ac"], inclusive=False)
    (0.5, 0.0)
    """
    if not isinstance(prediction, str):
        kind = type(prediction).__name__
        raise InputError(f"question {question_id}: the prediction is {kind} {prediction!r:.100}: give a string")
    references = list_of_texts(references, f"question {question_id}: references")
    if not references:
        raise InputError(f"question {question_id}: no reference answers, so it has no ANLS: use a split with answers")
    answer = _normalize(prediction)
    if strip_period:
        answer = answer.rstrip(". ")
    best = max(_similarity(answer, _normalize(reference)) for reference in references)
    return best if best > threshold or (inclusive and best == threshold) else 0.0


def _normalize(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    return 1.0 - Levenshtein.distance(a, b) / longer if longer else 1.0


class ANLS(Metric):
    """Mean ANLS over questions, each counted once; exact in distributed runs.

    Scores of all ranks are gathered, not averaged by rank. Pairs with the same entry of ``question_ids`` count once,
    with their first score. If ids may recur, pass each question's index in its split. Without ``question_ids`` every
    pair counts.

    Args:
        threshold: see `anls`.
        inclusive: see `anls`.
        strip_period: see `anls`.
        **kwargs: those of `torchmetrics.Metric`, such as ``compute_on_cpu``.

    >>> metric = ANLS()
    >>> metric.update(["0.28", "paris", "paris"], [["0.28"], ["rome"], ["rome"]], question_ids=[1, 2, 2])
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
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
        """Remove all scores."""
        super().reset()
        # Empty tensors of the right dtypes, so that a rank without scores takes part in gathering.
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
            target: n lists of references; a string is a list of one.
            question_ids: n ids; pairs with the same id count once. The int 7 and the string "7" are different ids;
                None is no id.

        Raises:
            ValueError: the lengths differ.
            InputError: a question has no references, or an argument has a wrong type.
        """
        for name, value in (("preds", preds), ("target", target), ("question_ids", question_ids)):
            if isinstance(value, (str, bytes, Mapping)):
                raise InputError(f"{name}: {type(value).__name__} {value!r:.100}: give a list, one for each question")
        # Without ids, each pair gets one that is unique over ranks.
        given: Sequence[int | str | None] = [None for _ in preds] if question_ids is None else question_ids
        ids = [uuid.uuid4().hex if question_id is None else question_id for question_id in given]
        scores = [
            anls(pred, references, question_id=question_id, **self.options)
            for pred, references, question_id in zip(preds, target, ids, strict=True)
        ]
        self._append([_hash(question_id) for question_id in ids], scores)

    def compute(self) -> Tensor:
        """Return the mean score as a 0-d tensor; NaN without scores."""
        ids, order = dim_zero_cat(self.question_ids).sort(stable=True)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[1:] = ids[1:] != ids[:-1]
        # Sorted, so that rounding doesn't depend on the distribution of questions over ranks.
        return dim_zero_cat(self.scores)[order][first].sort().values.mean()

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:  # noqa: ANN401
        """Plot one score or several with matplotlib.

        Args:
            val: the score, or a list of scores, such as those of successive validations; by default that of `compute`.
            ax: the matplotlib axes to draw on; by default those of a new figure.

        Returns:
            The figure and the axes.
        """
        return self._plot(val, ax)

    def _append(self, ids: list[int], scores: list[float]) -> None:
        self.question_ids.append(torch.tensor(ids, dtype=torch.int64, device=self.device))
        self.scores.append(torch.tensor(scores, dtype=torch.float64, device=self.device))


def _hash(question_id: int | str) -> int:
    """Return a 64-bit hash of an id that, unlike Python's hash of a string, is the same in every process."""
    key = f"{isinstance(question_id, str)} {question_id}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)
