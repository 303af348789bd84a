"""Which split of a source is trained on, validated on, tested on and predicted."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.data.example import Examples
from idefics_lit.data.sources.split_names import VALIDATION_NAMES
from idefics_lit.data.sources.splits import find_splits
from idefics_lit.data.sources.streaming import Stream, find_streams
from idefics_lit.data.subset import Subset, hold_out_pages
from idefics_lit.errors import InputError

# Data sets without a validation split that are validated on their test split: it has answers, and no leaderboard.
VAL_SPLITS = {"nielsr/docvqa_1200_examples": "test"}


class SplitRoles:
    """The splits of a source by their use; nothing is opened before it is needed.

    Args:
        options: the hyperparameters of `DocVQADataModule`.

    Raises:
        InputError: when the source can't be read, or a split doesn't exist or is empty.
    """

    def __init__(self, options: Any) -> None:  # noqa: ANN401
        self.options = options
        self._opened: dict[str, Examples] = {}

    def train(self) -> Examples:
        """Return the training split, without held-out pages."""
        examples = self._open(self._train_name)
        if self.val_name():
            return examples
        held_out = self._held_out(examples)
        return Subset(examples, [index for index in range(len(examples)) if index not in held_out])

    def train_stream(self) -> Stream:
        """Return the training split of a streamed source."""
        return self._streams[self._existing(self._train_name)]

    def val(self) -> Examples:
        """Return the validation split, or the held-out pages of the training split."""
        if name := self.val_name():
            return self._open(name)
        examples = self._open(self._train_name)
        if self.options.streaming:  # these are the first questions already
            return examples
        return Subset(examples, sorted(self._held_out(examples)))

    def val_name(self) -> str | None:
        """Return the name of the validation split, or None if there is none besides the training split.

        Raises:
            InputError: when the names of several splits stand for validation.
        """
        if self.options.val_split:
            return self.options.val_split
        others = [name for name in self._splits if name != self._train_name]
        names = [name for name in others if name in VALIDATION_NAMES]
        if len(names) > 1:
            raise InputError(
                f"data.source {self.options.source}: which split is for validation, {' or '.join(names)}? Choose with "
                f"--data.val_split"
            )
        names += [name for name in others if name == VAL_SPLITS.get(self.options.source)]
        return names[0] if names else None

    def held_out_by(self) -> dict[str, Any]:
        """Return the options that choose which pages of the training split are scored; empty if none are."""
        if self.val_name():
            return {}
        names = ("limit_val",) if self.options.streaming else ("seed", "held_out")
        return {name: self.options[name] for name in ("streaming", *names)}

    def test(self) -> Examples:
        """Return the test split."""
        return self._open(self.options.test_split or "test")

    def predict(self) -> Examples:
        """Return the split to predict: the test split if there is one, else the validation split."""
        name = self.options.predict_split or self.options.test_split or "test"
        return self._open(name) if name in self._splits or self.options.predict_split else self.val()

    @property
    def _train_name(self) -> str:
        return self.options.train_split or "train"

    @cached_property
    def _streams(self) -> dict[str, Stream]:
        options = self.options
        return find_streams(options.source, options.subset, options.columns, options.language, options.image_root)

    @cached_property
    def _splits(self) -> dict[str, Callable[[], Examples]]:
        options = self.options
        if options.streaming:
            limit = max(options.limit_val or 0, options.limit_test or 0)
            return {name: partial(stream.first, limit) for name, stream in self._streams.items()}
        return find_splits(
            options.source, options.subset, options.columns, options.language, options.seed, options.image_root
        )

    def _existing(self, name: str) -> str:
        if name not in self._splits:
            raise InputError(
                f"data.source {self.options.source}: no split {name!r}, it has {', '.join(self._splits)}: "
                f"choose with --data.train_split, val_split, test_split or predict_split"
            )
        return name

    def _open(self, name: str) -> Examples:
        if self._existing(name) not in self._opened:  # held-out pages need the training split a second time
            self._opened[name] = self._splits[name]()
        if not len(self._opened[name]):
            raise InputError(f"data.source {self.options.source}: split {name!r} is empty")
        return self._opened[name]

    def _held_out(self, examples: Examples) -> set[int]:
        options = self.options
        if others := [name for name in self._splits if name != self._train_name]:
            rank_zero_warn(
                f"data.source {options.source}: {options.held_out:.0%} of the pages of {self._train_name!r} are held "
                f"out for validation, because no other split ({', '.join(others)}) is named for it: choose with "
                f"--data.val_split"
            )
        return hold_out_pages(examples, options.held_out, options.seed, f"data.source {options.source}")
