"""Bad examples left out of their batches, and named there."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from idefics_lit.data.example import Example, Examples
from idefics_lit.errors import InputError
from idefics_lit.model.batch import Batch


def known_faults(examples: Examples, need_answers: bool) -> dict[int, str]:
    """Return what is wrong with the rows that are known to be bad without opening a page, by number, a line each."""
    missing = (row for row, answers in enumerate(examples.answers) if need_answers and not answers)
    no_answer = "no answer: add one or drop the row; `predict` needs none"
    return {**{row: f"{examples.source(row)}: {no_answer}" for row in missing}, **examples.faults}


class SkipBadExamples(Dataset[Any]):
    """A split whose bad examples are their error."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        """Count the questions."""
        return len(self.examples)

    def __getitem__(self, visit: Any) -> Example | InputError:  # noqa: ANN401
        """Return a question with its pages, or what is wrong with it."""
        try:
            return self.examples[visit]
        except InputError as error:
            return error


class SkippingCollator:
    """Collate the good examples; the batch's ``skipped`` has a line for each of the others."""

    def __init__(self, collate: Callable[[Sequence[Example]], Batch]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Example | InputError]) -> Batch:
        """Collate."""
        errors = [example for example in examples if isinstance(example, InputError)]
        good = [example for example in examples if isinstance(example, Example)]
        try:
            batch = self.collate(good) if good else None
        except InputError:  # which one is it?
            by_itself = [self._error(example) for example in good]
            errors += [error for error in by_itself if error]
            good = [example for example, error in zip(good, by_itself, strict=True) if not error]
            batch = self.collate(good) if good else None
        skipped = [str(error) for error in errors]
        return replace(batch, skipped=skipped) if batch else Batch.empty(skipped)

    def _error(self, example: Example) -> InputError | None:
        try:
            self.collate([example])
        except InputError as error:
            return error
        return None
