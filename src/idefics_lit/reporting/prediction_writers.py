"""Callbacks that write answers to files.

`PredictionWriter` writes ``predictions.jsonl`` and ``submission.json``; `EvaluationWriter` writes
``val_predictions.jsonl`` and ``test_predictions.jsonl``.
"""

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from idefics_lit.evaluation.answer import Answer, by_question, mean_anls
from idefics_lit.training.run_folder import run_folder
from idefics_lit.utils.distributed import gather_objects
from idefics_lit.utils.files import replacing

MAX_LISTED_IDS = 5
# Integers in canonical form that JSON readers with double-precision numbers read exactly.
EXACT_INTEGER = re.compile("0|-?[1-9][0-9]{0,14}")

Answers = dict[Hashable, Answer]


class PredictionWriter(BasePredictionWriter):
    """Write ``submission.json`` and ``predictions.jsonl`` at the end of ``Trainer.predict``.

    Both files list each question of the split once, including questions that share an id. ``submission.json`` has the
    format of the RRC: an array of ``{"questionId", "answer"}``, in which ids are numbers if the conversion is lossless.
    Each line of ``predictions.jsonl`` is an `Answer`, see `Answer.to_json`. If a question has several pages, each entry
    of both files has an ``answer_page``, counted from 0.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: Any,  # noqa: ANN401
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather the answers of all ranks; write them, and print the score of those with references, on rank 0."""
        answers = [*gather_answers(trainer, [answer for batch in predictions for answer in batch]).values()]
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        if any(answer.answer_page is not None for answer in answers):  # questions with one page have no answer_page
            answers = [replace(answer, answer_page=answer.answer_page or 0) for answer in answers]
        try:
            _write_jsonl(folder / "predictions.jsonl", answers, pl_module.temperature)
        finally:  # write the other file even if this one fails
            _write_lines(folder / "submission.json", [_submission(answers)])
        console = Console()
        if scored := [answer for answer in answers if answer.score is not None]:
            console.print(f"ANLS {mean_anls(scored):.4f} (questions with references: {len(scored)})")
        console.print(
            f"{len(answers)} answers in {folder / 'submission.json'} and {folder / 'predictions.jsonl'}", markup=False
        )


class EvaluationWriter(Callback):
    """Gather the answers of a validation or a test and write ``val_predictions.jsonl`` or ``test_predictions.jsonl``.

    Each line is an `Answer`, see `Answer.to_json`. During a fit, each validation replaces the file. The answers of the
    sanity check aren't written. The LightningModule must have the ``answers`` of `Idefics2Module`.

    Attributes:
        answers: the answers of the last validation or test by question, in the order of the split.
        sanity_check_answers: the answers of the sanity check by question.
        path: the file that was written last.
    """

    path: Path

    def __init__(self) -> None:
        self.answers: Answers = {}
        self.sanity_check_answers: Answers = {}

    @property
    def baseline(self) -> Answers:
        """The sanity check's answers, if they are to the same questions as ``answers``; otherwise empty."""
        before, after = (
            {key: answer.question_id for key, answer in answers.items()}
            for answers in (self.sanity_check_answers, self.answers)
        )
        has_indices = all(answer.index is not None for answer in self.sanity_check_answers.values())
        return self.sanity_check_answers if before == after and has_indices else {}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Gather the answers; write them unless this is the sanity check."""
        answers = gather_answers(trainer, pl_module.answers)
        if trainer.sanity_checking:
            self.sanity_check_answers = answers
        else:
            self._write(trainer, pl_module, answers, "val_predictions.jsonl")

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
        """Gather and write the answers, which may have the indices and ids of the sanity check's questions."""
        self.sanity_check_answers = {}
        self._write(trainer, pl_module, gather_answers(trainer, pl_module.answers), "test_predictions.jsonl")

    def _write(self, trainer: Trainer, pl_module: Any, answers: Answers, name: str) -> None:  # noqa: ANN401
        self.answers, self.path = answers, run_folder(trainer) / name
        if trainer.is_global_zero:
            _write_jsonl(self.path, answers.values(), pl_module.temperature)


def gather_answers(trainer: Trainer, answers: Iterable[Answer]) -> Answers:
    """Return all ranks' answers by question, in the order of the split; all ranks must call it.

    Of a question that several ranks answered, the first rank's answer is kept, which is the one that `ANLS` counts.
    """
    unique: Answers = {}
    for rank_answers in gather_objects(trainer, by_question(answers)):
        for key, answer in rank_answers.items():
            unique.setdefault(key, answer)
    id_counts = Counter(answer.question_id for answer in unique.values())
    if shared_ids := [str(question_id) for question_id, count in id_counts.items() if count > 1]:
        more = f" and {len(shared_ids) - MAX_LISTED_IDS} more" if len(shared_ids) > MAX_LISTED_IDS else ""
        rank_zero_warn(
            f"Several questions have the id {', '.join(shared_ids[:MAX_LISTED_IDS])}{more}: each of them is scored and "
            f"written, but readers of the files can't tell them apart by id: name another column of ids in data.columns"
        )
    return dict(sorted(unique.items(), key=lambda item: (item[1].dataloader_idx, item[1].index or 0)))


def _submission(answers: Sequence[Answer]) -> str:
    question_ids = _as_numbers([answer.question_id for answer in answers])
    return json.dumps(
        [
            {
                "questionId": question_id,
                "answer": answer.prediction,
                **({} if answer.answer_page is None else {"answer_page": answer.answer_page}),
            }
            for question_id, answer in zip(question_ids, answers, strict=True)
        ],
        ensure_ascii=False,
    )


def _as_numbers(question_ids: Sequence[int | str]) -> Sequence[int | str]:
    """Convert the ids to numbers if each is the text of an integer and no two different ids become equal.

    All or none: ids of which some are numbers and some texts would no longer match those of the data set.
    """
    if not all(EXACT_INTEGER.fullmatch(str(question_id)) for question_id in question_ids):
        return question_ids
    numbers = [*map(int, question_ids)]
    return numbers if len({*numbers}) == len({*question_ids}) else question_ids


def _write_jsonl(path: Path, answers: Iterable[Answer], temperature: float) -> None:
    _write_lines(path, (answer.to_json(temperature) for answer in answers))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as file:
        file.writelines(f"{line}\n".encode() for line in lines)
