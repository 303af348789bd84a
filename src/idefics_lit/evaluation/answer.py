"""`Answer`, a generated answer with its score, and how answers are grouped and averaged."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, TypeVar

from idefics_lit.evaluation.confidence import confidence

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        question_id: the data set's id, which several questions may share.
        question: the question's text.
        prediction: the generated answer.
        references: the accepted answers; empty if the data set has none.
        score: the ANLS of the prediction, from 0 to 1; None without references.
        question_types: the data set's types of the question, such as ``table/list``; may be empty.
        log_probability: the natural logarithm of the answer's probability under the model, the sum over its tokens.
        token_count: its number of tokens, with the end-of-sequence token if it has one.
        answer_page: the page, counted from 0, on which the model locates the answer; None if that wasn't computed.
        reference_page: the page, counted from 0, that the data set names; None if it names none.
        index: the question's index in its split; None if the data loader sets none.
        dataloader_idx: which of several data loaders the question is from.
    """

    question_id: int | str
    question: str
    prediction: str
    references: list[str]
    score: float | None
    question_types: list[str]
    log_probability: float = field(compare=False)  # its last digits depend on the other rows of the batch
    token_count: int
    answer_page: int | None = None
    reference_page: int | None = None
    index: int | None = None
    dataloader_idx: int = 0

    def to(self, *args: object, **kwargs: object) -> "Answer":
        """Return the answer itself; Lightning moves predictions with it and rejects frozen dataclasses without it."""
        return self

    @property
    def is_right(self) -> bool:
        """Whether the answer equals a reference, up to case and white space."""
        return self.score == 1

    def to_json(self, temperature: float = 1.0) -> str:
        """Return one line of ``predictions.jsonl``: all fields but the last two, without the pages that are None.

        Args:
            temperature: of the ``confidence``, see `idefics_lit.evaluation.confidence`.
        """
        fields = {name: value for name, value in asdict(self).items() if name not in ("index", "dataloader_idx")}
        fields["mean_log_probability"] = self.log_probability / self.token_count
        fields["confidence"] = confidence(self.log_probability, temperature)
        for name in ("log_probability", "mean_log_probability"):  # JSON has no infinity
            fields[name] = fields[name] if isfinite(fields[name]) else None
        for name in ("answer_page", "reference_page"):
            if fields[name] is None:
                del fields[name]
        return json.dumps(fields, ensure_ascii=False)


def by_question(answers: Iterable[Answer]) -> dict[Hashable, Answer]:
    """Return one rank's answers by a key that identifies the question on all ranks; the first answer is kept.

    The key is the question's index in its split, since ids may recur, also on ranks that read different data. Without
    an index it is the text of id, question and references, and n, which counts the earlier answers with the same text
    on this rank: a distributed sampler that pads repeats an example on another rank. With several data loaders the
    loader's number is part of the key.
    """
    counts: Counter[Hashable] = Counter()
    unique: dict[Hashable, Answer] = {}
    for answer in answers:
        key: Hashable = answer.index
        if key is None:
            text = answer.dataloader_idx, f"{answer.question_id!r} {answer.question!r} {answer.references!r}"
            key = f"{text[1]} {counts[text]}"
            counts[text] += 1
        unique.setdefault((answer.dataloader_idx, key) if answer.dataloader_idx else key, answer)
    return unique


def by_question_type(answers: Mapping[Key, Answer], name: Callable[[str], str] = str) -> dict[str, dict[Key, Answer]]:
    """Group answers by question type, the most frequent type first; an answer with two types is in both groups.

    Args:
        answers: the answers by question.
        name: maps a question type to the name of its group.
    """
    groups: dict[str, dict[Key, Answer]] = {}
    for key, answer in answers.items():
        for question_type in answer.question_types:
            groups.setdefault(name(question_type), {})[key] = answer
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))


def mean_anls(answers: Collection[Answer]) -> float:
    """Return the mean score of scored answers, of which there is at least one."""
    scores: list[Any] = [answer.score for answer in answers]
    return float(sum(scores) / len(scores))
