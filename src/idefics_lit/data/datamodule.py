"""The LightningDataModule: its options, the optimizer step's batches, and the loaders."""

from typing import Any, Literal

import torch.utils.data
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.pytorch.callbacks import BatchSizeFinder
from torch.utils.data import DataLoader

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Examples
from idefics_lit.data.loaders import EvalLoader, StreamLoader, TrainingLoader
from idefics_lit.data.optimizer_step import OptimizerStep, split_step
from idefics_lit.data.prompts import PromptStyle
from idefics_lit.data.samplers import EvalSampler, TrainSampler
from idefics_lit.data.skipping import SkippingCollator
from idefics_lit.data.split_module import SplitDataModule
from idefics_lit.data.workers import ignore_group_signals
from idefics_lit.errors import InputError
from idefics_lit.model.loader_cache import LoaderCache
from idefics_lit.pretrained import DTYPES

MINIMUMS = {
    **dict.fromkeys(("limit_train", "limit_val", "val_in_fit", "limit_test"), 1),
    **dict.fromkeys(("questions_per_page", "batch_size", "eval_batch_size", "max_length"), 1),
    **dict.fromkeys(("global_batch_size", "val_every_n_steps"), 1),
    "num_workers": 0,
}


class DocVQADataModule(SplitDataModule):
    """Questions about document pages, from local files, the Hub, or synthetic pages.

    Pages are decoded and processed in the loaders' workers, one batch at a time. The order of the training questions
    and the sampled answers depend on the seed and the epoch alone.

    Args:
        source: a folder or file of official JSON, CSV or JSONL; the id of a Hub data set, or a folder that `datasets`
            reads; or "synthetic" for generated pages, with their families as in "synthetic:form,table".
        pretrained: the checkpoint whose processor is used; on the command line the model's.
        subset: the configuration of a Hub data set that has several, such as "DocVQA" of lmms-lab/DocVQA.
        columns: the columns of a data set with names of its own: a mapping from question_id, question, image,
            answers, question_types, answer_page to a column.
        image_root: the folder that image paths are relative to and may not leave; by default the data's own folder.
        language: the language of the questions, in nielsr/docvqa_1200_examples for example.
        streaming: stream a Hub data set or a folder of parquet or arrow files, instead of storing it; training takes
            trainer.max_steps steps. The first limit_val or limit_test questions of a split are scored; without a
            validation split, those of the training split, and training skips their pages.
        train_split: the split to train on; "train" by default.
        val_split: the split to validate on; by default the one that is called validation, valid, val, dev or eval, or
            else held-out training pages, also if that is the training split; for nielsr/docvqa_1200_examples, which has
            none, its 200 test questions.
        test_split: the split to test on; "test" by default.
        predict_split: the split to predict; by default the test split, or else the validation split.
        held_out: the fraction of the training pages to validate on if there is no validation split; questions that
            share a page stay together.
        limit_train: use only this many training questions, the first ones.
        limit_val: use only this many validation questions, the first ones.
        val_in_fit: validate on this many questions during a fit, on pages drawn by the seed, and on all at its end.
        val_every_n_steps: validate every this many optimizer steps, instead of the Trainer's val_check_interval.
        limit_test: use only this many test or prediction questions, the first ones.
        prompt_style: "recipe" is "Answer briefly.", image, question; "idefics" is image, question, "Give a very brief
            answer.", the prompt that the model's authors evaluate with.
        train_on_prompt: compute the loss on the prompt's text too.
        image_splitting: encode crops of the page too. Idefics2: four quadrants, with 320 image tokens per page instead
            of 64; off by default. Idefics3 and SmolVLM: tiles, which need it; on by default.
        image_size: resize a page's longest edge to this many pixels, by default the processor's size. For Idefics2 at
            most that size; for Idefics3 and SmolVLM a multiple of the tile.
        max_length: refuse longer sequences, in tokens; the error names the question. By default 2048, or the tokens of
            the largest page and 1024 more if that is more.
        questions_per_page: in training, this many questions about one page follow one another. Those in one batch
            share its image: the loss is the same, with much less computation, but batches are less mixed.
        global_batch_size: training examples per optimizer step on all devices, 16 by default, or what batch_size,
            accumulate_grad_batches and devices multiply to.
        batch_size: training examples per batch and device; by default as many as fit into memory.
        eval_batch_size: examples per batch in evaluation; by default batch_size or "auto", up to 128 on a GPU, else 32.
        on_bad_example: "raise" stops the run at a bad row or page and names it; "skip" leaves it out of training and
            scores, and lists it in the run's skipped.txt.
        num_workers: loader processes per device; by default by cores. A resumed run keeps it, like batch_size.
        seed: decides held-out pages, order, sampled answers and synthetic pages.

    Raises:
        InputError: when the source, a split or a row is wrong; see the classes in `idefics_lit.data`.
    """

    def __init__(
        self,
        source: str,
        pretrained: str = "HuggingFaceM4/idefics2-8b",
        *,
        subset: str | None = None,
        columns: dict[str, str] | None = None,
        image_root: str | None = None,
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
        val_every_n_steps: int | None = None,
        limit_test: int | None = None,
        prompt_style: PromptStyle = "recipe",
        train_on_prompt: bool = False,
        image_splitting: bool | None = None,
        image_size: int | None = None,
        max_length: int | None = None,
        questions_per_page: int = 4,
        global_batch_size: int | None = None,
        batch_size: int | None = None,
        eval_batch_size: int | Literal["auto"] | None = None,
        on_bad_example: Literal["raise", "skip"] = "raise",
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, minimum in MINIMUMS.items():
            if isinstance(value := self.hparams[name], int) and value < minimum:
                raise InputError(f"data.{name} {value}: must be {minimum} or more")
        if abs(seed) >= 10**18:  # a generator's seed has 63 bits, and the epoch is added
            raise InputError(f"data.seed {seed}: must be a number of at most 18 digits")
        if not 0 < held_out < 1:
            raise InputError(f"data.held_out {held_out}: must be a fraction between 0 and 1, such as 0.05")
        if streaming and limit_train is not None:
            raise InputError("data.limit_train: a stream is trained on for trainer.max_steps steps: leave it out")
        self.num_workers = num_workers
        self.step: OptimizerStep | None = None
        """The batches of the current fit's optimizer step."""
        self.loader_cache: LoaderCache | None = None
        """Tells the workers which pages the model of the current run has cached."""
        self._started: dict[str, EvalLoader | TrainingLoader | StreamLoader] = {}

    def setup(self, stage: str) -> None:
        """Open the splits that the stage needs and load the processor, without the rows that are known to be bad.

        In a run of the Trainer, the workers of the first evaluation start.
        """
        self.open(stage)
        self.drop_faults()
        self._started = {}
        self.loader_cache = LoaderCache()
        if self.trainer and not (stage == "fit" and self.trainer.num_sanity_val_steps == 0):
            if stage in ("fit", "validate") and self.trainer.limit_val_batches:
                self.start_workers("val")
            elif stage == "test" and self.trainer.limit_test_batches:
                self.start_workers("test")

    def open(self, stage: str) -> None:
        """Open the splits that the stage needs and load the processor, bad rows included."""
        options = self.hparams
        if options.batch_size is None and self._has_batch_size_finder:
            options.batch_size = self.batch_size  # which the callback multiplies
        if stage == "fit" and self.trainer:
            self.teardown(stage)  # an earlier fit may have been interrupted
            self.step = OptimizerStep(self.trainer, options)
        super().open(stage)

    def teardown(self, stage: str) -> None:
        """Give the Trainer its own accumulation and validation interval back."""
        self._started = {}
        if self.step:
            self.step.restore()
            self.step = None

    def on_exception(self, exception: BaseException) -> None:
        """Stop workers that were started for loaders that weren't read."""
        self._started = {}

    def start_workers(self, split: str) -> None:
        """Let the workers of a loader prepare their first batches, while the model is loaded.

        Nothing is started if no Trainer is running, or if it uses other loaders or batches than this module's.

        Args:
            split: "train", "val" or "test".
        """
        trainer, hook = self.trainer, f"{split}_dataloader"
        is_overridden = getattr(type(self), hook) is not getattr(DocVQADataModule, hook)
        if trainer is None or trainer.state.fn is None or is_overridden or not self.workers():
            return
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            return
        # Lightning makes the model's device the default one while the model is configured; workers would inherit it.
        with torch.device("cpu"):
            loader = self._train_loader() if split == "train" else self._eval_loader(split)
            loader.start()
        self._started[split] = loader

    @property
    def batch_size(self) -> int:
        """Training examples per batch and device; Lightning's `Tuner` and ``BatchSizeFinder`` set it."""
        options = self.hparams
        size, _ = split_step(options.global_batch_size, options.batch_size, 1, 1)
        return self.step.batch_size if self.step else size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        """Set the option, as Lightning's ``BatchSizeFinder`` does, also within a fit."""
        self.hparams.batch_size = value
        if self.step:
            self.step.restore()
            self.step = OptimizerStep(self.step.trainer, self.hparams)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of shuffled training batches."""
        return self._started_loader("train") or self._train_loader()

    def train_sampler(self, examples: Examples) -> TrainSampler:
        """Return the sampler of this rank's training questions."""
        options = self.hparams
        share = self.step.examples_per_device if self.step else self.batch_size
        return TrainSampler(examples, options.questions_per_page, share, seed=options.seed, **self.ranks())

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of validation batches."""
        return self._started_loader("val") or self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of test batches."""
        return self._started_loader("test") or self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of batches to predict."""
        return self._eval_loader("predict")

    def collator(self, split: str) -> Idefics2Collator:
        """Return the collator of a split: "train", or one that is evaluated."""
        options = self.hparams
        return Idefics2Collator(
            self.processor,
            train=split == "train",
            prompt_style=options.prompt_style,
            train_on_prompt=options.train_on_prompt,
            max_length=options.max_length,
            seed=options.seed,
            pixel_dtype=DTYPES.get(str(self.trainer.precision), torch.float32) if self.trainer else torch.float32,
            cached_features=self.loader_cache.get if self.loader_cache else None,
        )

    def workers(self) -> int:
        """Return the number of loader processes."""
        if self.num_workers is None:
            local_world_size = self.trainer.num_devices if self.trainer else 1
            self.num_workers = min(suggested_max_num_workers(local_world_size), 16)
        return self.num_workers

    def state_dict(self) -> dict[str, Any]:
        """Return what depends on the machine and decides the order of the data."""
        return {"num_workers": self.num_workers, "batch_size": self.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of loader processes and the batch size, unless the options are set."""
        if self.hparams.num_workers is None:
            self.num_workers = state_dict["num_workers"]
        if self.step and state_dict.get("batch_size") in self.step.batch_sizes:  # else there are other devices
            self.step.set_batch_size(state_dict["batch_size"])

    def _started_loader(self, split: str) -> DataLoader[Any] | None:
        """Return the loader of `start_workers`, unless it is in use or has other batches than a new one."""
        loader, options = self._started.get(split), self._loader_options(split)
        if loader is None or not loader.is_started:
            return None
        same = (loader.batch_size, loader.num_workers) == (options["batch_size"], options["num_workers"])
        return loader if same else None

    def _train_loader(self) -> TrainingLoader | StreamLoader:
        options = self._loader_options("train")
        if self.hparams.streaming:
            assert self.trainer is not None
            return StreamLoader(self.streamed_questions(), self.trainer, **options)
        sampler = self.train_sampler(self.examples["train"])
        return TrainingLoader(self.dataset("train"), self.trainer, sampler=sampler, **options)

    def _eval_loader(self, split: str) -> EvalLoader:
        loader_options = self._loader_options(split)
        sampler = EvalSampler(self.examples[split], 8 * loader_options["batch_size"], **self.ranks())
        return EvalLoader(self.dataset(split), sampler=sampler, **loader_options)

    def _loader_options(self, split: str) -> dict[str, Any]:
        batch_size: Any = self.batch_size
        if split != "train":
            batch_size = self.hparams.eval_batch_size or self.hparams.batch_size or "auto"
            if batch_size == "auto":  # the module splits batches that are too large for memory
                batch_size = 128 if torch.cuda.is_available() else 32
        collator, num_workers = self.collator(split), self.workers()
        return {
            "batch_size": batch_size,
            "collate_fn": SkippingCollator(collator) if self.skips_bad_examples else collator,
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "worker_init_fn": ignore_group_signals,
            "pin_memory": torch.cuda.is_available(),
        }

    @property
    def _has_batch_size_finder(self) -> bool:
        callbacks: Any = self.trainer.callbacks if self.trainer else ()  # type: ignore[attr-defined]
        return any(isinstance(callback, BatchSizeFinder) for callback in callbacks)
