"""The part of the data module that opens the splits a stage needs."""

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning import LightningDataModule

from idefics_lit.data.example import Examples
from idefics_lit.data.skipping import SkipBadExamples, known_faults
from idefics_lit.data.subset import Subset, sample_pages
from idefics_lit.errors import InputError
from idefics_lit.pretrained import load_processor

if TYPE_CHECKING:
    from idefics_lit.data.split_roles import SplitRoles
    from idefics_lit.data.streamed_questions import StreamedQuestions


class SplitDataModule(LightningDataModule):
    """The splits of `DocVQADataModule`, whose arguments are the hyperparameters.

    Attributes:
        examples: the open splits: "train", "val", "test" and "predict".
        processor: the model's processor.
        skipped: what is wrong with the rows that were left out before any page was opened, one line each.
        held_out_by: the options that choose which pages of the training split are scored; empty if none are.
    """

    hparams: Any  # the arguments of DocVQADataModule, by name
    processor: Any

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, Examples] = {}
        self.skipped: list[str] = []
        self.held_out_by: dict[str, Any] = {}

    def open(self, stage: str) -> None:
        """Open the splits that the stage needs and load the processor, bad rows included."""
        options = self.hparams
        # Tokenizer threads and forked workers can deadlock.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if options.streaming:
            self._check_streaming(stage)
        elif stage == "fit":
            self.examples["train"] = _first(self._splits.train(), options.limit_train)
        if stage in ("fit", "validate"):
            self.examples["val"] = _first(self._splits.val(), options.limit_val)
            self.held_out_by = self._splits.held_out_by()
        if stage == "fit" and options.val_in_fit is not None:
            self.examples["val"] = sample_pages(self.examples["val"], options.val_in_fit, options.seed)
        if stage == "test":
            self.examples["test"] = _first(self._splits.test(), options.limit_test)
        if stage == "predict":
            self.examples["predict"] = _first(self._splits.predict(), options.limit_test)
        self.processor = load_processor(
            options.pretrained, image_splitting=options.image_splitting, image_size=options.image_size
        )
        options.image_splitting = self.processor.image_processor.do_image_splitting

    def drop_faults(self) -> None:
        """Drop the rows that are known to be bad, or raise the first one's error."""
        self.examples = {
            split: self._without_faults(examples, need_answers=split != "predict")
            for split, examples in self.examples.items()
        }

    def dataset(self, split: str) -> Any:  # noqa: ANN401
        """Return the questions of a split; with ``on_bad_example: skip``, a bad one is an `InputError`."""
        return SkipBadExamples(self.examples[split]) if self.skips_bad_examples else self.examples[split]

    @property
    def skips_bad_examples(self) -> bool:
        """Whether bad rows are left out instead of ending the run."""
        return self.hparams.on_bad_example == "skip"

    def ranks(self) -> dict[str, int]:
        """Return the number of ranks and this process's rank, by the names of a sampler's arguments."""
        trainer = self.trainer
        return {"num_replicas": trainer.world_size if trainer else 1, "rank": trainer.global_rank if trainer else 0}

    def streamed_questions(self) -> "StreamedQuestions":
        """Return the training questions of a stream."""
        from idefics_lit.data.streamed_questions import StreamedQuestions

        options = self.hparams
        # All validation questions are held out, not only those of val_in_fit.
        held_out = () if self._splits.val_name() else _first(self._splits.val(), options.limit_val).page_ids
        ranks = self.ranks()
        return StreamedQuestions(
            self._splits.train_stream(),
            ranks["rank"],
            ranks["num_replicas"],
            seed=options.seed,
            questions_per_page=options.questions_per_page,
            held_out={page for pages in held_out for page in pages},
            skip=self.skips_bad_examples,
        )

    @cached_property
    def _splits(self) -> "SplitRoles":
        from idefics_lit.data.split_roles import SplitRoles

        return SplitRoles(self.hparams)

    def _check_streaming(self, stage: str) -> None:
        limit = "limit_val" if stage in ("fit", "validate") else "limit_test"
        if self.hparams[limit] is None:
            raise InputError(f"data.{limit} is missing: say how many of a stream's questions to score, such as 500")
        if stage == "fit" and (self.trainer is None or self.trainer.max_steps < 0):
            raise InputError("trainer.max_steps is missing: a stream has no end, say how many steps to train for")

    def _without_faults(self, examples: Examples, need_answers: bool) -> Examples:
        """Drop the rows that are known to be bad, or raise the first one's error."""
        faults = known_faults(examples, need_answers)
        if not faults:
            return examples
        if not self.skips_bad_examples:
            raise InputError(faults[min(faults)])
        self.skipped += [faults[index] for index in sorted(faults)]
        if len(faults) == len(examples):
            raise InputError(f"data.on_bad_example skip: no row is left, the first one's error: {faults[0]}")
        return Subset(examples, [index for index in range(len(examples)) if index not in faults])


def _first(examples: Examples, limit: int | None) -> Examples:
    return Subset(examples, range(len(examples))[:limit])
