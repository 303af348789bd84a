"""Idefics2Module: how Idefics2 is trained, evaluated and saved.

What is special here:

- the loss of an optimizer step is the mean over all its answer tokens, over micro-batches and ranks;
- validation generates answers and scores each question once;
- a checkpoint holds the adapter alone, and is refused if it belongs to another model;
- dropout is a function of seed, rank, epoch and batch, and a checkpoint holds the gradients accumulated so far, so that
  a resumed run ends with the same adapter, wherever it was interrupted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.errors import InputError
from idefics_lit.evaluation.answer import Answer, by_question, by_question_type
from idefics_lit.metrics import ANLS
from idefics_lit.model.batch import Batch
from idefics_lit.model.lora import LoRA, Quantization
from idefics_lit.pretrained import DTYPES, load_processor
from idefics_lit.training.answering import ImageSource, load_examples, pair_questions
from idefics_lit.training.checkpoint import (
    PROMPT_OPTIONS,
    base_fingerprint,
    check_base,
    check_embedding,
    check_hyperparameters,
    check_weights,
)
from idefics_lit.training.lightning_compat import exclude_from_ddp, scale_gradients
from idefics_lit.training.optimizer import adamw_with_schedule
from idefics_lit.utils.distributed import gather_objects, summed

# The summed loss of a micro-batch is divided by this number of answer tokens, which keeps float16 gradients near their
# usual size. A power of two doesn't change the bits of the mantissa.
LOSS_SCALE_TOKENS = 64


class StepTotals(NamedTuple):
    """Sums over the micro-batches of an optimizer step on this rank, both 0-d."""

    tokens: Tensor
    loss: Tensor


class Idefics2Module(LightningModule):
    """Idefics2 with a 4-bit base model and LoRA, for answering questions about document pages.

    Logs ``train/loss`` and ``lr`` every optimizer step. Validation logs ``val/loss``, ``val/anls``, ``val/anls/TYPE``
    for every question type in the data, and ``val/answer_page_accuracy`` if the data says which page an answer is on; a
    test logs the same under ``test/``. Batches come from `Idefics2Collator`.

    No callback is needed. These may be added to any Trainer, one by one; the command line adds all:
    `idefics_lit.training.finite_checks.FiniteLossCheck` and ``OverflowCheck``,
    `idefics_lit.training.preemption.PreemptionSync` and ``SaveOnSigterm``, and
    `idefics_lit.training.checkpoint.EpochProgressRepair`.

    Args:
        pretrained: a Hub id or a folder in the Hub's format; "tiny" is the small model that comes with the package.
        quantization: "nf4" (4-bit base model, double quantization) or "none".
        quantize_vision: false keeps the vision tower in 16 bits, which is faster and takes 0.6 GiB more.
        dequantize: convert the 4-bit weights back to 16 bits once: the same numbers, faster, 11 GiB more.
        lora: the adapter.
        lr: AdamW's learning rate after the warm-up.
        weight_decay: AdamW's weight decay for matrices; biases and norms have none.
        warmup_steps: optimizer steps over which the learning rate rises linearly from 0.
        schedule: how the learning rate falls to 0 at the last step, "linear" or "cosine"; without a last step, as with
            trainer.max_time alone, it stays constant.
        gradient_checkpointing: compute activations twice to save memory.
        feature_cache: keep the vision tower's features of each page, in "memory" or in a folder, for the page's other
            questions and for later epochs. Off by default.
        feature_cache_gb: the largest size of the cache, over all runs that share a folder; a page takes 9 MB with
            Idefics2-8b, and 44 MB with image splitting.
        cuda_graphs: replay parts of the model as CUDA graphs instead of launching kernel by kernel; on GPUs only.
        compile: compile the layers for training; only the first step takes longer.
        max_new_tokens: the largest length of a generated answer, in tokens.
        strip_period: remove full stops at the end of predictions before scoring, as Idefics2's authors do.

    Raises:
        InputError: the model can't be loaded or doesn't fit its tokenizer, the precision isn't 16-mixed, bf16-mixed or
            32-true, an option is out of range, or a checkpoint belongs to another adapter.
    """

    hparams: Any  # the arguments of __init__, by name
    answers: list[Answer]
    """The answers of this rank's last validation or test."""
    step_loss: Tensor
    """The loss of the last optimizer step, on the training device; ``step_lr`` is its learning rate."""

    def __init__(
        self,
        pretrained: str = "HuggingFaceM4/idefics2-8b",
        *,
        quantization: Quantization = "nf4",
        quantize_vision: bool = True,
        dequantize: bool = False,
        lora: LoRA = LoRA(),  # noqa: B008
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 75,
        schedule: Literal["linear", "cosine"] = "linear",
        gradient_checkpointing: bool = False,
        feature_cache: str | None = None,
        feature_cache_gb: float = 20,
        cuda_graphs: bool = False,
        compile: bool = False,
        max_new_tokens: int = 32,
        strip_period: bool = False,
    ) -> None:
        super().__init__()
        # A dict, since a checkpoint's hyperparameters must be plain types to load with weights_only.
        lora = asdict(lora) if isinstance(lora, LoRA) else dict(lora)  # type: ignore[assignment]
        self.save_hyperparameters()
        _check_options(self.hparams)
        self.anls = ANLS(strip_period=strip_period)
        self.eval_loss = MeanMetric()
        self.answers = []
        self.state_prefix = ""  # of the names in the state dict that is being loaded
        self._step_totals: StepTotals | None = None
        self._restored: dict[str, Any] = {}  # totals and gradients of a checkpoint's unfinished optimizer step
        self._prompt_options: Mapping[str, Any] = {}  # that the checkpoint's adapter was trained with
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)

    def configure_model(self) -> None:
        """Load the processor and the model, onto the Trainer's device or else onto a GPU if there is one."""
        if hasattr(self, "model"):
            return
        from idefics_lit.model.compat import import_bitsandbytes

        import_bitsandbytes()
        from idefics_lit.evaluation.evaluator import Evaluator
        from idefics_lit.model.feature_cache import open_cache
        from idefics_lit.model.forward import Idefics2Backbone
        from idefics_lit.model.loading import load_model

        options = self.hparams
        if (trainer := self._attached_trainer) is not None:
            fits = trainer.state.fn == TrainerFn.FITTING
            if fits and any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                raise InputError(
                    "trainer.callbacks: weight averaging (WeightAveraging, EMAWeightAveraging) writes checkpoints that "
                    "this version can't load: leave it out"
                )
            device, precision = trainer.strategy.root_device, str(trainer.precision)
        elif torch.cuda.is_available():
            device, precision = torch.device("cuda"), "bf16-mixed"
        else:
            device, precision = torch.device("cpu"), "32-true"
        if precision not in DTYPES:
            raise InputError(f"trainer.precision {precision}: choose one of {', '.join(DTYPES)}")
        self.processor = load_processor(options.pretrained)
        self.model = load_model(
            options.pretrained,
            quantization=options.quantization,
            quantize_vision=options.quantize_vision,
            dequantize=options.dequantize,
            lora=LoRA(**options.lora),
            dtype=DTYPES[precision],
            device=device,
            gradient_checkpointing=options.gradient_checkpointing,
            compiled=options.compile,
        )
        self.backbone = Idefics2Backbone(
            self.model,
            open_cache(options, self.model, DTYPES[precision]) if options.feature_cache else None,
            graphs=options.cuda_graphs and device.type == "cuda",
        )
        self.evaluator = Evaluator(
            self.backbone, self.processor, max_new_tokens=options.max_new_tokens, strip_period=options.strip_period
        )
        tokens, rows = len(self.processor.tokenizer), self.model.get_input_embeddings().num_embeddings
        if tokens > rows:
            raise InputError(
                f"model.pretrained {options.pretrained!r}: its tokenizer has {tokens} tokens but its embedding only "
                f"{rows} rows: give a model that was trained with them (idefics2-8b, not idefics2-8b-base)"
            )
        # Every rank loads the frozen weights itself. DDP would broadcast them at the start, and buffers in every batch.
        tensors = chain(self.named_parameters(), self.named_buffers())
        exclude_from_ddp(self, [name for name, tensor in tensors if not tensor.requires_grad])

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits (R, T, V) of a batch."""
        return self.backbone.logits(self.backbone.prefill(batch, self.encode_pages(batch)))

    def encode_pages(self, batch: Batch) -> list[Tensor]:
        """Return the image features (image tokens, width) of each row of a batch."""
        return self.backbone.encode_pages(batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy summed over a batch's supervised tokens, and their number; both 0-d."""
        return self.backbone.loss(batch, self.backbone.prefill(batch, self.encode_pages(batch)))

    # Inference

    def answer(
        self,
        images: ImageSource | Sequence[ImageSource],
        questions: str | Sequence[str],
        *,
        batch_size: int = 8,
        **options: Any,  # noqa: ANN401
    ) -> list[str]:
        """Answer questions about page images greedily, on the device that the module is on.

        Loads the model if necessary. Gradients and dropout are off, whatever mode the module is in.

        Args:
            images: a page or several: PIL images, or paths of image files or PDFs with one page.
            questions: a question or several. One image is combined with every question and one question with every
                image; several images and several questions are paired in order.
            batch_size: questions in a batch; those about the same image share its computation.
            options: further arguments of `collator`.

        Returns:
            The answers, in order.

        Raises:
            InputError: there are no images or questions, their numbers differ, or an image can't be read.
        """
        pairs = pair_questions(images, questions)
        self.configure_model()
        collate = self.collator(train=False, **options)
        answers: list[str] = []
        for start in range(0, len(pairs), batch_size):
            batch = collate(load_examples(pairs[start : start + batch_size]))
            answers += self.generate(self.transfer_batch_to_device(batch, self.model.device, 0))
        self.evaluator.free_memory()
        return answers

    def collator(self, *, train: bool, **options: Any) -> Idefics2Collator:  # noqa: ANN401
        """Return a collator for this module, to be used as ``collate_fn`` of a DataLoader.

        Args:
            train: see `Idefics2Collator`.
            options: further arguments of `Idefics2Collator`, and ``image_splitting`` and ``image_size`` of
                `load_processor`. The prompt style and the image options default to those that the module was trained
                with, if it was loaded from a checkpoint or trained with a data module.
        """
        data = getattr(self._attached_trainer, "datamodule", None)
        trained_with = data.hparams if isinstance(data, LightningDataModule) else self._prompt_options
        options = {**{name: trained_with[name] for name in PROMPT_OPTIONS if name in trained_with}, **options}
        image_options = {name: options.pop(name) for name in ("image_splitting", "image_size") if name in options}
        return Idefics2Collator(load_processor(self.hparams.pretrained, **image_options), train=train, **options)

    def generate(self, batch: Batch) -> list[str]:
        """Return the B greedy answers to a batch's prompts, without dropout, whatever mode the module is in."""
        return self.evaluator.decode(batch).texts

    # Training

    def on_fit_start(self) -> None:
        """Print the number of trained parameters and check that their gradients can be scaled."""
        trainable, total = self.model.get_nb_trainable_parameters()
        rank_zero_info(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
        )
        wrong = next((name for name, p in self._trainable().items() if p.dtype != torch.float32), None)
        if wrong:
            raise InputError(f"{wrong} is trained but not float32, which mixed precision needs")
        self._seed = torch.initial_seed()

    def on_train_start(self) -> None:
        """Continue the checkpoint's unfinished optimizer step, if there is one."""
        if not self._restored:
            return
        self._step_totals = StepTotals(*(value.to(self.device) for value in self._restored["step"]))
        gradients = self._restored["gradients"]
        for name, parameter in self._trainable().items():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter)
        self._restored = {}

    def on_fit_end(self) -> None:
        """Delete the CUDA graphs, since Lightning moves the weights to the CPU."""
        self.backbone.forget_graphs()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Make dropout a function of seed, rank, epoch and batch, for resumed runs."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:  # when Lightning starts to accumulate gradients
            self._step_totals = None
        torch.manual_seed(hash((self._seed, self.global_rank, self.current_epoch, batch_idx)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the summed loss divided by `LOSS_SCALE_TOKENS`.

        Lightning averages over micro-batches and ranks; `on_before_optimizer_step` makes it the mean over tokens.
        """
        if batch.is_empty:  # all examples were skipped, but the other ranks wait for this one's gradients
            loss = sum((p.sum() * 0 for p in self._trainable().values()), torch.zeros((), device=self.device))
            tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        else:
            loss, tokens = self.loss(batch)
        totals = self._step_totals or StepTotals(torch.zeros_like(tokens), torch.zeros_like(loss))
        self._step_totals = StepTotals(totals.tokens + tokens, totals.loss + loss.detach())
        return loss / LOSS_SCALE_TOKENS

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the step's answer tokens instead of by micro-batches and ranks."""
        assert self._step_totals is not None
        totals = torch.stack([self._step_totals.tokens.double(), self._step_totals.loss.double()])
        tokens, loss = summed(self.trainer, totals)
        self._step_totals = None
        tokens = tokens.clamp(min=1)
        scale_gradients(
            optimizer, self.trainer.accumulate_grad_batches * self.trainer.world_size * LOSS_SCALE_TOKENS / tokens
        )
        self.step_loss, self.step_lr = (loss / tokens).float(), optimizer.param_groups[0]["lr"]
        self.log("train/loss", self.step_loss, prog_bar=True)
        # A CPU tensor: Lightning would copy a number to the GPU and wait for it.
        self.log("lr", torch.tensor(self.step_lr))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, but allow a fused optimizer if there is no gradient scaler."""
        plugin = self.trainer.precision_plugin
        if getattr(plugin, "scaler", None) or not gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """Return AdamW and its learning-rate schedule."""
        names = ("lr", "weight_decay", "warmup_steps", "schedule")
        optimizer, scheduler = adamw_with_schedule(
            [*self._trainable().values()], self.trainer, **{name: self.hparams[name] for name in names}
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Answer the batch's questions and add its loss."""
        self.answers += self.evaluator.evaluate(batch, self.eval_loss)

    test_step = validation_step

    def on_validation_epoch_start(self) -> None:
        """Forget the answers of the last evaluation."""
        self.answers = []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the validation's loss and scores."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the test's loss and scores."""
        self._log_scores("test")

    def on_predict_epoch_end(self) -> None:
        """Free the memory that decoding took."""
        self.evaluator.free_memory()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Answer]:
        """Return the answer to each question of the batch."""
        return self.evaluator.evaluate(batch)

    def _log_scores(self, stage: str) -> None:
        answers = by_question(self.answers)
        self.evaluator.free_memory()  # training wants the memory
        self.log(f"{stage}/loss", self.eval_loss.compute(), sync_dist=True)
        self.eval_loss.reset()
        self.log(f"{stage}/anls", self._score(answers), sync_dist=True, prog_bar=True)
        # All ranks must log the same names, also of types of which they have no questions.
        groups = by_question_type(answers, name=_metric_name)
        for name in sorted(set().union(*gather_objects(self.trainer, [*groups]))):
            self.log(f"{stage}/anls/{name}", self._score(groups.get(name, {})), sync_dist=True)
        page_is_correct = {
            key: answer.answer_page == answer.reference_page
            for key, answer in answers.items()
            if answer.reference_page is not None
        }
        unique = {key: value for rank in gather_objects(self.trainer, page_is_correct) for key, value in rank.items()}
        if unique:  # the same on every rank
            self.log(f"{stage}/answer_page_accuracy", sum(unique.values()) / len(unique))

    def _score(self, answers: Mapping[Any, Answer]) -> Tensor:
        self.anls.update(
            [answer.prediction for answer in answers.values()],
            [answer.references for answer in answers.values()],
            question_ids=[*answers],  # a question may be scored on two ranks
        )
        score = self.anls.compute()
        self.anls.reset()
        return score

    # Checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ANN401
        """Return the trained weights alone, also as a child of another module; the base model's are on the Hub."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix: str = kwargs.get("prefix", "")
        trained = {prefix + name for name in self._trainable()}
        for name in [name for name in state if name.startswith(prefix) and name not in trained]:
            del state[name]
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the base model's fingerprint and the gradients accumulated so far by all ranks; all must call it.

        Raises:
            InputError: a trained weight isn't finite.
        """
        checkpoint["base"] = self._base_fingerprint
        trainable = self._trainable()
        if broken := next((name for name, p in trainable.items() if not p.isfinite().all()), None):
            raise InputError(f"{broken} isn't finite any more and isn't saved: lower model.lr and resume")
        if self._step_totals is not None:
            ranks = self.trainer.world_size
            checkpoint["accumulated"] = {
                "step": [summed(self.trainer, value) / ranks for value in self._step_totals],
                "gradients": {
                    name: summed(self.trainer, p.grad) / ranks for name, p in trainable.items() if p.grad is not None
                },
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another base model, another scale of the adapter, and a fit from weights alone; warn of the rest."""
        self.configure_model()
        trainer = self._attached_trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and not checkpoint.get("optimizer_states"):
            raise InputError(
                f"ckpt_path {trainer.ckpt_path} holds weights alone (save_weights_only), from which a fit can't resume"
                f": give a checkpoint with the optimizer's state"
            )
        self._restored = checkpoint.get("accumulated", {})
        self._prompt_options = checkpoint.get("datamodule_hyper_parameters", {})
        own = {"hyper_parameters": self.hparams}
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, LightningDataModule):
            own["datamodule_hyper_parameters"] = data.hparams
        check_hyperparameters(checkpoint, own, getattr(data, "held_out_by", {}))
        base = checkpoint.get("base")
        if isinstance(base, Tensor):
            check_embedding(base, self.model, self.hparams.pretrained)
        elif base is not None:
            check_base(base, self._base_fingerprint, self.hparams.pretrained)

    # Helpers

    @cached_property
    def _base_fingerprint(self) -> dict[str, Any]:
        return base_fingerprint(self.hparams.pretrained)

    @property
    def _attached_trainer(self) -> Trainer | None:
        try:
            return self.trainer
        except RuntimeError:  # Lightning's: there is none
            return None

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def _check_options(options: Any) -> None:  # noqa: ANN401
    for name, minimum in (("warmup_steps", 0), ("max_new_tokens", 1)):
        if options[name] < minimum:
            raise InputError(f"model.{name} {options[name]}: give {minimum} or more")
    if options.cuda_graphs and options.gradient_checkpointing:
        raise InputError("model.cuda_graphs can't capture model.gradient_checkpointing: leave one of them out")
    if options.lr <= 0:
        raise InputError(f"model.lr {options.lr}: give a learning rate above 0")
    if options.weight_decay < 0:
        raise InputError(f"model.weight_decay {options.weight_decay}: give 0 or more")
    if options.feature_cache_gb <= 0:
        raise InputError(f"model.feature_cache_gb {options.feature_cache_gb}: give more than 0")
    if options.lora["alpha"] <= 0:
        raise InputError(f"model.lora.alpha {options.lora['alpha']}: give more than 0, the adapter's scale")


def _before_loading(module: Idefics2Module, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Load the model and check that a state dict holds its trained weights, all of them."""
    module.configure_model()
    saved = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    check_weights(saved, trainable)
    module.state_prefix = prefix


def _after_loading(module: Idefics2Module, incompatible_keys: Any) -> None:  # noqa: ANN401
    """Don't report the frozen weights as missing, neither here nor in a module that this is a child of."""
    missing: list[str] = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if not name.startswith(module.state_prefix)]


def _metric_name(question_type: str) -> str:
    """Return a question type without what tables and loggers would take for markup: [ and ], line breaks."""
    return "".join(c if c.isprintable() else " " for c in question_type).translate(str.maketrans("[]", "()"))
