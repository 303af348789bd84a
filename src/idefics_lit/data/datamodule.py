"""The LightningDataModule: which source, which split, which loader."""

import os
import random
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Literal

import torch.utils.data
from lightning import LightningDataModule
from lightning.fabric.utilities.data import suggested_max_num_workers
from torch.utils.data import DataLoader, DistributedSampler

from idefics_lit.data.collator import Idefics2Collator, PromptStyle
from idefics_lit.data.example import Examples
from idefics_lit.data.loaders import StreamLoader, TrainingLoader
from idefics_lit.data.samplers import EvalSampler, Subset, TrainSampler, connected
from idefics_lit.data.skipping import SkipBadExamples, SkippingCollator, known_faults
from idefics_lit.data.sources.splits import find_splits
from idefics_lit.data.sources.streaming import Stream, StreamedQuestions, find_streams
from idefics_lit.errors import InputError
from idefics_lit.pretrained import DTYPES, load_processor

# Sets without a validation split whose test questions are validated on: they have answers, and nobody else scores them.
VAL_SPLITS = {"nielsr/docvqa_1200_examples": "test"}
LEAST = {
    **dict.fromkeys(("limit_train", "limit_val", "val_in_fit", "limit_test"), 1),
    **dict.fromkeys(("questions_per_page", "batch_size", "eval_batch_size", "max_length"), 1),
    "num_workers": 0,
}


class DocVQADataModule(LightningDataModule):
    """Questions about document pages, from disk, the Hub, or drawn by the package.

    Pages are decoded and processed in the loader's workers, one batch at a time. Training visits the questions in an
    order, and with answers drawn, that depend on the seed and the epoch alone.

    Args:
        source: a folder or file of official JSON, CSV or JSONL; a Hub data set id, or a folder that `datasets` reads;
            or "synthetic", pages drawn here, with families to choose as in "synthetic:form,table".
        pretrained: whose processor to use; the model's on the command line.
        subset: the configuration of a Hub data set that has several, such as "DocVQA" of lmms-lab/DocVQA.
        columns: which column holds what, where a data set names them its own way: a mapping from question_id,
            question, image, answers, question_types, answer_page.
        language: which language of the question, where a data set has several (nielsr/docvqa_1200_examples).
        streaming: read a Hub data set or a folder of parquet or arrow files as it is needed, without an end, for so
            many steps as trainer.max_steps says. Scored are the first limit_val or limit_test questions of a split;
            where there is no validation split, of the training split, which leaves their pages out.
        train_split: the split to train on, "train" unless given.
        val_split: the split to validate on, "validation" or "val" unless given, else, or where that is the training
            split, held out of the training split;
            of nielsr/docvqa_1200_examples, which has no such split, its 200 test questions.
        test_split: the split to test on, "test" unless given.
        predict_split: the split to predict, the test split unless given, else the validation split.
        held_out: the share of the training pages to validate on where there is no validation split; questions that
            share a page stay together.
        limit_train: use only the first so many training questions.
        limit_val: use only the first so many validation questions.
        val_in_fit: validate on so many of them during a fit, on pages that the seed draws, and on all when it ends.
        limit_test: use only the first so many test and prediction questions.
        prompt_style: "recipe" or "idefics", see Idefics2Collator.
        train_on_prompt: train on the prompt's text too.
        image_splitting: four quadrants and the page, 320 image tokens a page in place of 64.
        image_size: scale a page's longest edge to so many pixels, at most the processor's own, the default.
        max_length: refuse sequences longer than so many tokens, by name.
        questions_per_page: so many questions on a page follow one another in training. Those of a batch share its
            image and their prompt's beginning: the loss is the same, the work much less, the batch less mixed.
        batch_size: examples a training batch, on each device.
        eval_batch_size: examples a batch in validation, test and prediction: "auto", which is 128, or as many as there
            is memory for, on a GPU and 32 elsewhere; batch_size unless given.
        on_bad_example: "raise" ends the run at a row or page that is wrong, by name; "skip" leaves it out of training
            and scores and names it in the run's skipped.txt.
        num_workers: loader processes on each device, by the machine's cores unless given; in a resumed run as many as
            the checkpoint's had.
        seed: decides held-out pages, order, answers and synthetic pages.

    Raises:
        InputError: when the source, a split or a row is wrong; see the classes in `idefics_lit.data`.
    """

    hparams: Any  # the arguments below, by name

    def __init__(
        self,
        source: str,
        pretrained: str = "HuggingFaceM4/idefics2-8b",
        *,
        subset: str | None = None,
        columns: dict[str, str] | None = None,
        language: str = "en",
        streaming: bool = False,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        predict_split: str | None = None,
        held_out: float = 0.05,
        limit_train: int | None = None,
        limit_val: int | None = None,
        val_in_fit: int | None = None,
        limit_test: int | None = None,
        prompt_style: PromptStyle = "recipe",
        train_on_prompt: bool = False,
        image_splitting: bool = False,
        image_size: int | None = None,
        max_length: int = 2048,
        questions_per_page: int = 1,
        batch_size: int = 2,
        eval_batch_size: int | Literal["auto"] | None = None,
        on_bad_example: Literal["raise", "skip"] = "raise",
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, least in LEAST.items():
            if isinstance(value := self.hparams[name], int) and value < least:
                raise InputError(f"data.{name} {value}: must be {least} or more")
        if abs(seed) >= 10**18:  # with an epoch added, a generator's may have 63 bits
            raise InputError(f"data.seed {seed}: must be a number of at most 18 digits")
        if not 0 < held_out < 1:
            raise InputError(f"data.held_out {held_out}: must be a share between 0 and 1, such as 0.05")
        if streaming and limit_train is not None:
            raise InputError("data.limit_train: a stream is trained on for trainer.max_steps steps: leave it out")
        self.num_workers = num_workers
        self.examples: dict[str, Examples] = {}
        self.skipped: list[str] = []
        """What is wrong with the rows that were left out before any page was opened, a line each."""
        self.held_out_by: dict[str, Any] = {}
        """The options that decide which pages of the training split are scored; none where none are."""
        self._opened: dict[str, Examples] = {}

    def setup(self, stage: str) -> None:
        """Open the splits that the stage needs, without the rows that are known to be bad, and load the processor."""
        self.open(stage)
        self.examples = {
            split: self._without_faults(examples, split != "predict") for split, examples in self.examples.items()
        }

    def open(self, stage: str) -> None:
        """Open the splits that the stage needs, bad rows included, and load the processor."""
        options = self.hparams
        # Forked workers and the tokeniser's own threads don't mix.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.processor = load_processor(
            options.pretrained, image_splitting=options.image_splitting, image_size=options.image_size
        )
        if options.streaming:
            self._check_streaming(stage)
        elif stage == "fit":
            self.examples["train"] = self._limited(self._train(), options.limit_train)
        if stage in ("fit", "validate"):
            self.examples["val"] = self._limited(self._val(), options.limit_val)
        if stage == "fit" and options.val_in_fit is not None:
            self.examples["val"] = self._drawn(self.examples["val"], options.val_in_fit)
        if stage == "test":
            self.examples["test"] = self._limited(self._named(options.test_split or "test"), options.limit_test)
        if stage == "predict":
            self.examples["predict"] = self._limited(self._predict(), options.limit_test)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of shuffled training batches."""
        options = self.hparams
        if options.streaming:
            return self._loader("train", options.batch_size)
        sampler = TrainSampler(self.examples["train"], options.questions_per_page, seed=options.seed, **self._ranks())
        return self._loader("train", options.batch_size, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of validation batches."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of test batches."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of batches to predict."""
        return self._eval_loader("predict")

    def collator(self, split: str) -> Idefics2Collator:
        """Return what makes a split's batches: "train", or one that is evaluated."""
        options = self.hparams
        return Idefics2Collator(
            self.processor,
            train=split == "train",
            prompt_style=options.prompt_style,
            train_on_prompt=options.train_on_prompt,
            max_length=options.max_length,
            seed=options.seed,
            pixels=DTYPES.get(str(self.trainer.precision), torch.float32) if self.trainer else torch.float32,
        )

    def workers(self) -> int:
        """Return the number of loader processes."""
        if self.num_workers is None:
            local_world_size = self.trainer.num_devices if self.trainer else 1
            self.num_workers = min(suggested_max_num_workers(local_world_size), 16)
        return self.num_workers

    def state_dict(self) -> dict[str, Any]:
        """Return what another machine's cores might make another number."""
        return {"num_workers": self.num_workers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it, where no number is given."""
        if self.hparams.num_workers is None:
            self.num_workers = state_dict["num_workers"]

    def _eval_loader(self, split: str) -> DataLoader[Any]:
        batch_size = self.hparams.eval_batch_size or self.hparams.batch_size
        if batch_size == "auto":  # the module evaluates a batch that is too large in parts
            batch_size = 128 if torch.cuda.is_available() else 32
        return self._loader(split, batch_size, EvalSampler(self.examples[split], 8 * batch_size, **self._ranks()))

    def _ranks(self) -> dict[str, int]:
        trainer = self.trainer
        return {"num_replicas": trainer.world_size if trainer else 1, "rank": trainer.global_rank if trainer else 0}

    def _loader(self, split: str, batch_size: int, sampler: DistributedSampler[Any] | None = None) -> DataLoader[Any]:
        options = self.hparams
        collator = self.collator(split)
        skip = options.on_bad_example == "skip"
        num_workers = self.workers()
        loading: dict[str, Any] = {
            "batch_size": batch_size,
            "collate_fn": SkippingCollator(collator) if skip else collator,
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
        if sampler is None:
            assert self.trainer is not None
            return StreamLoader(self._streamed(), self.trainer, **loading)
        examples: Any = SkipBadExamples(self.examples[split]) if skip else self.examples[split]
        if split == "train":
            return TrainingLoader(examples, self.trainer, sampler=sampler, **loading)
        return DataLoader(examples, sampler=sampler, **loading)

    def _check_streaming(self, stage: str) -> None:
        limit = "limit_val" if stage in ("fit", "validate") else "limit_test"
        if self.hparams[limit] is None:
            raise InputError(f"data.{limit} is missing: say how many of a stream's questions to score, such as 500")
        if stage == "fit" and (self.trainer is None or self.trainer.max_steps < 0):
            raise InputError("trainer.max_steps is missing: a stream has no end, say how many steps to train for")

    def _streamed(self) -> StreamedQuestions:
        options = self.hparams
        split = self._existing(options.train_split or "train")
        # Of all that is validated on in the end, val_in_fit or not.
        val = () if self._val_split() else self._limited(self._val(), options.limit_val).page_ids
        held_out = {page for pages in val for page in pages}
        ranks = self._ranks()
        return StreamedQuestions(
            self.streams[split],
            ranks["rank"],
            ranks["num_replicas"],
            seed=options.seed,
            questions_per_page=options.questions_per_page,
            held_out=held_out,
            skip=options.on_bad_example == "skip",
        )

    @cached_property
    def streams(self) -> dict[str, Stream]:
        """The splits, where they are streamed."""
        options = self.hparams
        return find_streams(options.source, options.subset, options.columns, options.language)

    @cached_property
    def splits(self) -> dict[str, Callable[[], Examples]]:
        """How to open each split that the source has."""
        options = self.hparams
        if options.streaming:
            scored = max(options.limit_val or 0, options.limit_test or 0)
            return {split: partial(stream.first, scored) for split, stream in self.streams.items()}
        return find_splits(options.source, options.subset, options.columns, options.language, options.seed)

    def _existing(self, split: str) -> str:
        if split not in self.splits:
            raise InputError(
                f"data.source {self.hparams.source}: no split {split!r}, it has {', '.join(self.splits)}: "
                f"choose with --data.train_split, val_split, test_split or predict_split"
            )
        return split

    def _named(self, split: str) -> Examples:
        split = self._existing(split)
        if split not in self._opened:  # held-out pages take the training split a second time
            self._opened[split] = self.splits[split]()
        if not len(self._opened[split]):
            raise InputError(f"data.source {self.hparams.source}: split {split!r} is empty")
        return self._opened[split]

    def _train(self) -> Examples:
        examples = self._named(self.hparams.train_split or "train")
        if self._val_split():
            return examples
        held_out = self._held_out(examples)
        return Subset(examples, [i for i in range(len(examples)) if i not in held_out])

    def _val(self) -> Examples:
        if split := self._val_split():
            return self._named(split)
        examples = self._named(self.hparams.train_split or "train")
        decisive = ("limit_val",) if self.hparams.streaming else ("seed", "held_out")
        self.held_out_by = {name: self.hparams[name] for name in ("streaming", *decisive)}
        if self.hparams.streaming:  # its first questions
            return examples
        held_out = self._held_out(examples)
        return Subset(examples, sorted(held_out))

    def _predict(self) -> Examples:
        split = self.hparams.predict_split or self.hparams.test_split or "test"
        return self._named(split) if split in self.splits or self.hparams.predict_split else self._val()

    def _val_split(self) -> str | None:
        if self.hparams.val_split:
            return self.hparams.val_split
        names = ["validation", "val", VAL_SPLITS.get(self.hparams.source)]
        trained = self.hparams.train_split or "train"
        return next((name for name in names if name in self.splits and name != trained), None)

    def _held_out(self, examples: Examples) -> set[int]:
        """Choose questions by their pages: a page that was trained on says nothing about new ones.

        Questions that share a page, if only one of several, stay together.
        """
        groups = connected(examples.page_ids)
        sizes = [len({examples.page_ids[i] for i in group}) for group in groups]
        room = max(1, round(self.hparams.held_out * sum(sizes)))
        chance = random.Random(self.hparams.seed)
        order = chance.sample(range(len(groups)), min(room, len(groups)))
        order += chance.sample(rest := sorted({*range(len(groups))} - {*order}), len(rest))
        chosen: list[int] = []
        for number in order:
            if sizes[number] <= room:
                chosen.append(number)
                room -= sizes[number]
        chosen = chosen or [min(order, key=sizes.__getitem__)]
        if len(chosen) == len(groups):
            apart = f", in {len(groups)} groups without a page in common," if len(groups) < sum(sizes) else ""
            raise InputError(
                f"data.source {self.hparams.source}: its {sum(sizes)} pages{apart} are too few to hold out "
                f"{self.hparams.held_out} of them for validation: name a split with --data.val_split"
            )
        return {i for number in chosen for i in groups[number]}

    def _limited(self, examples: Examples, limit: int | None) -> Examples:
        return Subset(examples, range(len(examples))[:limit])

    def _drawn(self, examples: Examples, count: int) -> Examples:
        """So many questions on pages drawn at random, in the set's order."""
        pages = list(dict.fromkeys(examples.page_ids))
        random.Random(self.hparams.seed).shuffle(pages)
        places = {page: place for place, page in enumerate(pages)}
        drawn = sorted(range(len(examples)), key=lambda i: places[examples.page_ids[i]])
        return Subset(examples, sorted(drawn[:count]))

    def _without_faults(self, examples: Examples, need_answers: bool) -> Examples:
        """Leave out the rows that are known to be bad, or name the first."""
        faults = known_faults(examples, need_answers)
        if not faults:
            return examples
        if self.hparams.on_bad_example == "raise":
            raise InputError(faults[min(faults)])
        self.skipped += [faults[row] for row in sorted(faults)]
        if len(faults) == len(examples):
            raise InputError(f"data.on_bad_example skip: no row is left, the first is wrong too: {faults[0]}")
        return Subset(examples, [row for row in range(len(examples)) if row not in faults])
