"""The scores of a validation or test, over all ranks."""

from collections.abc import Collection, Mapping
from typing import Any

from lightning import Trainer
from torch import Tensor

from idefics_lit.evaluation.answer import Answer, by_question, by_question_type
from idefics_lit.evaluation.confidence import fit_temperature
from idefics_lit.metrics import ANLS
from idefics_lit.utils.distributed import gather_objects


def compute_scores(answers: Collection[Answer], metric: ANLS, trainer: Trainer) -> dict[str, Tensor | float]:
    """Return the scores of all ranks' answers, the same on every rank; all ranks must call it.

    Args:
        answers: this rank's.
        metric: is reset.
        trainer: of the ranks.

    Returns:
        ``anls``, ``anls_TYPE`` for every question type, ``anls_dataloader_idx_N`` for every data loader if there are
        several, and ``answer_page_accuracy`` if questions have a reference page.
    """
    own = by_question(answers)
    has_several = any(gather_objects(trainer, any(answer.dataloader_idx for answer in answers)))
    scores: dict[str, Tensor | float] = {"anls": _anls(own, metric)}
    # All ranks must compute the same scores, also of types of which they have no questions.
    groups = by_question_type(own, name=metric_name)
    for number in {answer.dataloader_idx for answer in answers} if has_several else ():
        groups[f"dataloader_idx_{number}"] = {k: a for k, a in own.items() if a.dataloader_idx == number}
    for name in sorted(set().union(*gather_objects(trainer, [*groups]))):
        scores[f"anls_{name}"] = _anls(groups.get(name, {}), metric)
    page_is_correct = {
        key: answer.answer_page == answer.reference_page
        for key, answer in own.items()
        if answer.reference_page is not None
    }
    unique = {key: value for rank in gather_objects(trainer, page_is_correct) for key, value in rank.items()}
    if unique:
        scores["answer_page_accuracy"] = sum(unique.values()) / len(unique)
    return scores


def compute_temperature(answers: Collection[Answer], trainer: Trainer) -> float:
    """Return the temperature fitted on all ranks' answers, the same on every rank; all ranks must call it."""
    own = {key: (answer.log_probability, answer.is_right) for key, answer in by_question(answers).items()}
    unique = {key: value for rank in gather_objects(trainer, own) for key, value in rank.items()}
    return fit_temperature([value for value, _ in unique.values()], [is_right for _, is_right in unique.values()])


def metric_name(question_type: str) -> str:
    """Return a question type without what tables and loggers would take for markup: [ and ], line breaks."""
    return "".join(c if c.isprintable() else " " for c in question_type).translate(str.maketrans("[]", "()"))


def _anls(answers: Mapping[Any, Answer], metric: ANLS) -> Tensor:
    metric.update(
        [answer.prediction for answer in answers.values()],
        [answer.references for answer in answers.values()],
        question_ids=[*answers],  # a question may be scored on two ranks
    )
    score: Tensor = metric.compute()
    metric.reset()
    return score
