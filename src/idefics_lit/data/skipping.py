"""Skip bad examples: drop them from their batches and report what is wrong with them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from idefics_lit.data.example import Example, Examples
from idefics_lit.errors import InputError
from idefics_lit.model.batch import Batch


def known_faults(examples: Examples, need_answers: bool) -> dict[int, str]:
    """Return what is wrong with the rows that are known to be bad without opening a page.

    Args:
        examples: the split.
        need_answers: whether a row without answers is bad.

    Returns:
        A message of one line for each bad row, by index.
    """
    unanswered = (index for index, answers in enumerate(examples.answers) if need_answers and not answers)
    no_answer = "no answer: add one or drop the row; `predict` needs none"
    return {**{index: f"{examples.source(index)}: {no_answer}" for index in unanswered}, **examples.faults}


class SkipBadExamples(Dataset[Any]):
    """Return the `InputError` of a bad example in its place, for `SkippingCollator`."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.examples)

    def __getitem__(self, index: Any) -> Example | InputError:  # noqa: ANN401
        """Return a question with its pages, or the error that it raises."""
        try:
            return self.examples[index]
        except InputError as error:
            return error


class SkippingCollator:
    """Collate the good examples; the batch's ``skipped`` are the messages of the bad ones.

    Without good examples the batch is empty, see `Batch.empty`.

    Args:
        collate: the collator of the good examples.
    """

    def __init__(self, collate: Callable[[Sequence[Example]], Batch]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Example | InputError]) -> Batch:
        """Collate examples and errors."""
        errors = [example for example in examples if isinstance(example, InputError)]
        good = [example for example in examples if isinstance(example, Example)]
        try:
            batch = self.collate(good) if good else None
        except InputError:  # collate one by one, to find the bad ones
            results = [self._collation_error(example) for example in good]
            errors += [error for error in results if error]
            good = [example for example, error in zip(good, results, strict=True) if not error]
            batch = self.collate(good) if good else None
        skipped = [str(error) for error in errors]
        return replace(batch, skipped=skipped) if batch else Batch.empty(skipped)

    def _collation_error(self, example: Example) -> InputError | None:
        try:
            self.collate([example])
        except InputError as error:
            return error
        return None
