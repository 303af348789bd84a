"""Idefics2Module: how Idefics2, Idefics3 and SmolVLM are trained, evaluated and saved.

What is special here:

- the loss of an optimizer step is the mean over all its answer tokens, over micro-batches and ranks;
- validation generates answers and scores each question once;
- a checkpoint holds the adapter alone, and is refused if it belongs to another model;
- dropout is a function of seed, rank, epoch and batch, and a checkpoint holds the gradients accumulated so far, so that
  a resumed run ends with the same adapter, wherever it was interrupted.
"""

import inspect
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric

from idefics_lit.errors import InputError
from idefics_lit.evaluation.answer import Answer
from idefics_lit.metrics import ANLS
from idefics_lit.model.batch import Batch
from idefics_lit.model.lora import LoRA, Quantization
from idefics_lit.training.checkpoint import EpochProgressRepair
from idefics_lit.training.checkpoint_checks import check_checkpoint
from idefics_lit.training.inference import InferenceModule
from idefics_lit.training.loss_in_parts import LossInParts
from idefics_lit.training.optimizer import ResumableLambdaLR, adamw_with_schedule
from idefics_lit.training.options import check_options, plain_lora_options
from idefics_lit.training.options_in_effect import describe, find_batch_size
from idefics_lit.training.scores import compute_scores, compute_temperature
from idefics_lit.training.token_mean import TokenMean
from idefics_lit.training.trained_weights import trained_parameters
from idefics_lit.training.unsupported import check_supported


class Idefics2Module(InferenceModule):
    """Idefics2, Idefics3 or SmolVLM with a 4-bit base model and LoRA, for answering questions about document pages.

    Logs ``train/loss`` and ``lr`` every optimizer step. Validation logs ``val/loss``, ``val/anls``, ``val/anls_TYPE``
    for every question type in the data, ``val/anls_dataloader_idx_N`` for each of several data loaders, and
    ``val/answer_page_accuracy`` if the data says which page an answer is on; a test logs the same under ``test/``.
    Batches come from `Idefics2Collator`.

    ``dequantize``, ``gradient_checkpointing``, ``cuda_graphs`` and ``compile`` are worked out where they are None: see
    `idefics_lit.model.execution`. They don't change the loss.

    No callback is needed. These may be added to any Trainer, one by one; the command line adds all:
    `idefics_lit.training.finite_checks.FiniteLossCheck` and ``OverflowCheck``, and
    `idefics_lit.training.preemption.PreemptionSync` and ``SaveOnInterrupt``. The module itself adds
    `idefics_lit.training.checkpoint.EpochProgressRepair`, without which resumed fits would end with other weights.

    Args:
        pretrained: an Idefics2, Idefics3, SmolVLM or SmolVLM2: a Hub id or a folder in the Hub's format; "tiny" is the
            small model that comes with the package.
        quantization: "nf4" (4-bit base model, double quantization) or "none".
        quantize_vision: quantize the vision tower too: 0.6 GiB less, slower, and less exact.
        dequantize: convert the 4-bit weights back to 16 bits once: the same numbers, faster, 11 GiB more.
        lora: the adapter; from Python also a peft ``LoraConfig``.
        adapter: the folder or Hub id of a saved LoRA adapter to start from, such as one that `export` wrote; its own
            options replace lora.
        lr: AdamW's learning rate after the warm-up.
        weight_decay: AdamW's weight decay for matrices; biases and norms have none.
        warmup_steps: optimizer steps over which the learning rate rises linearly from 0.
        schedule: how the learning rate falls to 0 at the last step, "linear" or "cosine"; without a last step, as with
            trainer.max_time alone, it stays constant.
        gradient_checkpointing: compute activations twice to save memory.
        feature_cache: where features of pages are kept for further questions and epochs: "memory", a folder or "off";
            by default in memory if a fit reads pages again and half of the free memory is enough.
        feature_cache_gb: the largest size of the cache, over all runs that share a folder; a page takes 9 MB with
            Idefics2-8b, 44 MB with image splitting, and up to 30 MB with Idefics3 and SmolVLM, or 2 to 24 MB if
            lora.target_modules leave the connector out.
        cuda_graphs: replay parts of the model as CUDA graphs instead of launching kernel by kernel; on GPUs only.
        compile: compile the layers for training; the first step takes longer, so that by default only long fits do.
        max_new_tokens: the largest length of a generated answer, in tokens.
        strip_period: remove full stops at the end of predictions before scoring, as Idefics2's authors do.

    Raises:
        InputError: the model can't be loaded or doesn't fit its tokenizer, the precision isn't 16-mixed, bf16-mixed or
            32-true, an option is out of range, or a checkpoint belongs to another adapter.
    """

    answers: list[Answer]
    """The answers of this rank's last validation or test."""
    step_loss: Tensor | None = None
    """The loss of the last optimizer step, on the training device; ``step_lr`` is its learning rate. None if a subclass
    computes its own loss."""

    def __init__(
        self,
        pretrained: str = "HuggingFaceM4/idefics2-8b",
        *,
        quantization: Quantization = "nf4",
        quantize_vision: bool = False,
        dequantize: bool | None = None,
        lora: LoRA = LoRA(),  # noqa: B008
        adapter: str | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 75,
        schedule: Literal["linear", "cosine"] = "linear",
        gradient_checkpointing: bool | None = None,
        feature_cache: str | None = None,
        feature_cache_gb: float = 20,
        cuda_graphs: bool | None = None,
        compile: bool | None = None,
        max_new_tokens: int = 32,
        strip_period: bool = False,
    ) -> None:
        super().__init__(pretrained, adapter)
        self.save_hyperparameters()
        check_options(self.hparams)
        self.anls = ANLS(strip_period=strip_period)
        self.eval_loss = MeanMetric()
        self.answers = []
        self._scored = False  # the answers are those of a validation or test that has ended
        self._token_mean = TokenMean()
        self._loss_in_parts = LossInParts(enabled=False)
        self._seed = self._batch_seed = -1  # the user's seed, and the last training batch's, which depends on it
        self._scheduled_lr = lr
        self._restored: dict[str, Any] = {}  # a checkpoint's unfinished optimizer step

    def save_hyperparameters(self, *args: Any, ignore: Any = (), frame: Any = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Save hyperparameters as Lightning does, but ``lora`` as a dict and not ``adapter``, which checkpoints hold.

        Checkpoints load with weights_only, so that hyperparameters must be plain types. Lightning collects them from
        the ``__init__`` of subclasses, too.
        """
        frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        ignore = ["adapter", *([ignore] if isinstance(ignore, str) else ignore or ())]
        super().save_hyperparameters(*args, ignore=ignore, frame=frame, **kwargs)
        if "lora" in self.hparams:
            lora = plain_lora_options(self.hparams.lora, self.adapter)
            super().save_hyperparameters({"lora": lora}, ignore=ignore, frame=frame, **kwargs)

    @property
    def lr(self) -> float:
        """The learning rate, ``hparams.lr``, which Lightning's `Tuner` and ``LearningRateFinder`` set."""
        return self.hparams.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.hparams.lr = value

    def configure_callbacks(self) -> Any:  # noqa: ANN401
        """Refuse features of the Trainer that can't work, and add `EpochProgressRepair`, which each fit needs."""
        check_supported(self.trainer)
        self._loss_in_parts = LossInParts(enabled=False)  # for BatchSizeFinder, which runs before `on_fit_start`
        has_repair = any(isinstance(callback, EpochProgressRepair) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if has_repair else [EpochProgressRepair()]

    # Training

    def on_fit_start(self) -> None:
        """Print the number of trained parameters, check that their gradients can be scaled, and find the batch size."""
        trainable, total = self.model.get_nb_trainable_parameters()
        rank_zero_info(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
        )
        wrong = next((name for name, p in trained_parameters(self).items() if p.dtype != torch.float32), None)
        if wrong:
            raise InputError(f"{wrong} is trained but not float32, which mixed precision needs")
        self._loss_in_parts = LossInParts(enabled=True)
        if self.device.type == "cuda":
            find_batch_size(self, self.trainer)
        data = getattr(self.trainer, "datamodule", None)
        rank_zero_info(describe(self.hparams, self.options, self.devices, self.trainer, data))

    def on_train_start(self) -> None:
        """Continue the checkpoint's unfinished optimizer step, if there is one."""
        if self._restored:
            self._token_mean.restore(self._restored, trained_parameters(self), self.device)
            self._restored = {}

    def on_fit_end(self) -> None:
        """Delete the CUDA graphs, since Lightning moves the weights to the CPU."""
        self.backbone.forget_graphs()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Use a new ``lr``; make dropout a function of seed, rank, epoch and batch, for resumed runs."""
        for config in self.trainer.lr_scheduler_configs:
            if self.lr != self._scheduled_lr and isinstance(config.scheduler, ResumableLambdaLR):
                config.scheduler.replace_lr(self._scheduled_lr, self.lr)
                self._scheduled_lr = self.lr
        if torch.initial_seed() != self._batch_seed:
            self._seed = torch.initial_seed()
        torch.manual_seed(hash((self._seed, self.global_rank, self.current_epoch, batch_idx)))
        self._batch_seed = torch.initial_seed()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss over the batch's answer tokens; a subclass may add to it.

        Lightning averages over micro-batches and ranks; `backward` and `on_before_optimizer_step` make it the mean over
        all answer tokens of the optimizer step.
        """
        if self.automatic_optimization and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._token_mean.begin(is_first=batch_idx == 0)
        if batch.is_empty:  # all examples were skipped, but the other ranks wait for this one's gradients
            loss = sum((p.sum() * 0 for p in trained_parameters(self).values()), torch.zeros((), device=self.device))
            tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        else:
            loss, tokens = self._loss_in_parts.forward(self, batch)
        return self._token_mean.add(loss, tokens)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Propagate the loss of a micro-batch, weighted with its number of answer tokens."""
        loss = self._token_mean.weighted(loss)
        self._loss_in_parts.backward(self, loss)
        super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the step's answer tokens instead of by micro-batches and ranks; log the loss."""
        if self._token_mean.tokens is not None:  # unless a subclass computes its own loss, or has several optimizers
            self.step_loss = self._token_mean.average_gradients(trained_parameters(self).values(), self.trainer)
            self.log("train/loss", self.step_loss, prog_bar=True)
        self.step_lr = optimizer.param_groups[0]["lr"]
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
            [*trained_parameters(self).values()], self.trainer, **{name: self.hparams[name] for name in names}
        )
        self._scheduled_lr = self.lr
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Evaluation

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer the batch's questions and add its loss."""
        if self._scored or batch_idx == dataloader_idx == 0:  # the first data loader may be empty
            self.answers, self._scored = [], False
            self.eval_loss.reset()
        answers = self.evaluator.evaluate(batch, self.eval_loss)
        self.answers += [replace(answer, dataloader_idx=dataloader_idx) for answer in answers]

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the validation's loss and scores; in a fit, fit the temperature of the answers' confidence."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.temperature = compute_temperature(self.answers, self.trainer)
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the test's loss and scores."""
        self._log_scores("test")

    def on_predict_epoch_end(self) -> None:
        """Free the memory that decoding took."""
        self.evaluator.free_memory()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Answer]:
        """Return the answer to each question of the batch."""
        return self.evaluator.evaluate(batch)

    def _log_scores(self, stage: str) -> None:
        self._scored = True
        self.evaluator.free_memory()  # training wants the memory
        self.log(f"{stage}/loss", self.eval_loss.compute(), sync_dist=True)
        for name, score in compute_scores(self.answers, self.anls, self.trainer).items():
            self.log(f"{stage}/{name}", score, sync_dist=True, prog_bar=name == "anls")

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the base model's fingerprint and the gradients accumulated so far by all ranks; all must call it.

        Raises:
            InputError: a trained weight isn't finite.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint["base"] = self.base_fingerprint
        checkpoint["temperature"] = self.temperature
        trainable = trained_parameters(self)
        if broken := next((name for name, p in trainable.items() if not p.isfinite().all()), None):
            raise InputError(f"{broken} isn't finite any more and isn't saved: lower model.lr and resume")
        if self._token_mean.tokens is not None:
            checkpoint["accumulated"] = self._token_mean.state(trainable, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another base model, another scale of the adapter, and a fit from weights alone; warn of the rest."""
        self.configure_model()
        check_checkpoint(checkpoint, self, self.attached_trainer)
        self._restored = checkpoint.get("accumulated", {})
        self.temperature = checkpoint.get("temperature", 1.0)
        self._prompt_options = checkpoint.get("datamodule_hyper_parameters", {})
