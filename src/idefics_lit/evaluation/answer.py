"""Which of an evaluation's records are the same question's."""

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any


def by_place(records: Iterable[dict[str, Any]]) -> dict[Hashable, dict[str, Any]]:
    """Key a rank's records so that each question of a set has one key, on every rank, even where questions share an id.

    The key is the question's place in its set. Examples without a place are keyed by their id and how often it occurred
    before on this rank, since a sampler that repeats examples for equal shares repeats them on another rank.

    Args:
        records: `idefics_lit.evaluation.evaluator.Evaluation.records` of one rank.
    """
    times: Counter[Hashable] = Counter()
    keyed: dict[Hashable, dict[str, Any]] = {}
    for record in records:
        key, question_id = record["place"], record["question_id"]
        if key is None:
            key = f"{question_id!r} {times[question_id]}"
            times[question_id] += 1
        keyed.setdefault(key, record)
    return keyed
