"""The LightningModule: what is trained, how it is scored, what a checkpoint holds.

What is special here:

- the loss of an optimizer step is the mean over all its answer tokens, over micro-batches and ranks;
- validation generates answers and scores them, each question once;
- a checkpoint holds the adapter alone, and is refused when it belongs to another model;
- dropout is a function of seed, rank, epoch and batch, and gradients that are accumulated go into the checkpoint, so
  that a resumed run ends in the same adapter, wherever it was cut off.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple, cast

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from transformers import get_scheduler

from idefics_lit.errors import InputError
from idefics_lit.evaluation.evaluator import Evaluator
from idefics_lit.evaluation.records import by_place
from idefics_lit.metrics import ANLS
from idefics_lit.model.feature_cache import open_cache
from idefics_lit.model.forward import Idefics2Backbone
from idefics_lit.model.loading import LoRA, Quantization, load_model
from idefics_lit.pretrained import DTYPES, load_processor
from idefics_lit.training.checkpoint import (
    base_fingerprint,
    check_base,
    check_embedding,
    check_hyperparameters,
    check_weights,
    repair_epoch_progress,
)
from idefics_lit.training.finite_checks import FiniteLossCheck, OverflowCheck
from idefics_lit.training.preemption import Signals
from idefics_lit.utils.distributed import gather_objects, summed

# Answer tokens that a micro-batch's summed loss is divided by, which keeps float16 gradients near their usual size; a
# power of two changes no bits.
LOSS_SCALE_TOKENS = 64


class _StepTotals(NamedTuple):
    """Sums over the micro-batches of an optimizer step, on this rank."""

    tokens: Tensor
    loss: Tensor


class Idefics2Module(LightningModule):
    """Idefics2 with a 4-bit base and LoRA, for answering questions about document pages.

    Logs ``train/loss`` and ``lr`` every optimizer step; ``val/loss``, ``val/anls`` and ``val/anls/TYPE`` for every
    question type in the data, and ``val/answer_page_accuracy`` where it says which page an answer is on; the same under
    ``test/``. Batches are `Idefics2Collator`'s.

    Args:
        pretrained: a Hub id or a folder in the Hub's form; "tiny" is the small one that comes with the package.
        quantization: "nf4" (4-bit base, double quantization) or "none".
        quantize_vision: false keeps the vision tower in 16 bits, which is faster and takes 0.6 GiB more.
        dequantize: keep the 4-bit weights unpacked to 16 bits: the same numbers, faster, 11 GiB more.
        lora: the adapter.
        lr: AdamW's learning rate, reached after the warm-up.
        weight_decay: AdamW's, on matrices; biases and norms have none.
        warmup_steps: optimizer steps over which the learning rate rises linearly from 0.
        schedule: how it falls to 0 at the last step, "linear" or "cosine"; where there is no last step, as with
            trainer.max_time alone, it stays.
        gradient_checkpointing: compute activations twice to save memory.
        feature_cache: keep what the vision tower makes of each page, in "memory" or in a folder; pages recur with their
            other questions and in every epoch. Nothing, unless given.
        feature_cache_gb: the most to keep there, of all runs that share a folder; a page of Idefics2-8b takes 9 MB, 44
            with image splitting.
        cuda_graphs: launch a part of the model at once instead of kernel by kernel; a GPU's own.
        compile: compile the layers, for training; the first step takes longer, the others less.
        max_new_tokens: the longest answer generated, in tokens.
        strip_period: score predictions without the full stops that end them, as the authors of Idefics2 do.

    Raises:
        InputError: when the model can't be loaded or doesn't fit its tokeniser, the precision isn't one of 16-mixed,
            bf16-mixed and 32-true, or a checkpoint belongs to another adapter.
    """

    hparams: Any  # the arguments below, by name
    records: list[dict[str, Any]]
    """`Evaluation.records` of the questions of this rank's last validation or test."""
    step_loss: Tensor
    """The last optimizer step's, where it was computed; ``step_lr`` is its learning rate."""

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
        for name, value, least in (("warmup_steps", warmup_steps, 0), ("max_new_tokens", max_new_tokens, 1)):
            if value < least:
                raise InputError(f"model.{name} {value}: give {least} or more")
        if cuda_graphs and gradient_checkpointing:
            raise InputError("model.cuda_graphs can't capture model.gradient_checkpointing: leave one of them out")
        if lr <= 0:
            raise InputError(f"model.lr {lr}: give a learning rate above 0")
        if weight_decay < 0:
            raise InputError(f"model.weight_decay {weight_decay}: give 0 or more")
        if feature_cache_gb <= 0:
            raise InputError(f"model.feature_cache_gb {feature_cache_gb}: give more than 0")
        # A dict, since a checkpoint's hyperparameters are plain types: it loads with weights_only.
        lora = asdict(lora) if isinstance(lora, LoRA) else dict(lora)  # type: ignore[assignment]
        if lora["alpha"] <= 0:  # type: ignore[index]
            raise InputError(f"model.lora.alpha {lora['alpha']}: give more than 0, the adapter's scale")  # type: ignore[index]
        self.save_hyperparameters()
        self.anls = ANLS(strip_period=strip_period)
        self.eval_loss = MeanMetric()
        self.records = []
        self._step: _StepTotals | None = None
        self._accumulated: dict[str, Any] = {}
        self._losses, self._overflows = FiniteLossCheck(), OverflowCheck()
        self._signals: Signals | None = None
        self._schedule: LambdaLR | None = None  # what `configure_optimizers` made
        self._groups: list[dict[str, Any]] = []  # the optimizer's, as it made them
        self._restored = False  # whether a checkpoint's optimizer was loaded

    def configure_model(self) -> None:
        """Load processor and model onto this process' device."""
        if hasattr(self, "model"):
            return
        options = self.hparams
        trainer = self._trainer
        if trainer is not None:
            fits = trainer.state.fn == TrainerFn.FITTING
            if fits and any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                raise InputError(
                    "trainer.callbacks: averages of weights (WeightAveraging, EMAWeightAveraging) make checkpoints "
                    "that this version can't load: leave them out"
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
                f"model.pretrained {options.pretrained!r}: its tokeniser has {tokens} tokens but the embedding only "
                f"{rows} rows: take a model that was trained with them (idefics2-8b, not idefics2-8b-base)"
            )
        # Every rank has loaded what is frozen: DDP would send it at the start, and its buffers with every batch.
        frozen = [name for name, x in chain(self.named_parameters(), self.named_buffers()) if not x.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits (R, T, V) of a batch of `Idefics2Collator`."""
        return self.backbone.logits(self.backbone.prefill(batch, self.encode_pages(batch)))

    def encode_pages(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return what the text model reads of each row's page, (image tokens, width)."""
        return self.backbone.encode_pages(batch)

    def loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy summed over a batch's labelled tokens, and their number; both 0-d."""
        return self.backbone.loss(batch, self.backbone.prefill(batch, self.encode_pages(batch)))

    # Training

    def on_fit_start(self) -> None:
        """Print what is trained and check that mixed precision can scale its gradients."""
        trainable, total = self.model.get_nb_trainable_parameters()
        rank_zero_info(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
        )
        wrong = next((name for name, p in self._trainable() if p.dtype != torch.float32), None)
        if wrong:
            raise InputError(f"{wrong} is trained but not float32, which mixed precision needs")
        self._seed = torch.initial_seed()
        self._signals = Signals(self.trainer)

    def on_train_start(self) -> None:
        """Take up the gradients that a checkpoint holds, and the learning rate of this run's schedule."""
        repair_epoch_progress(self.trainer.fit_loop)
        if self._restored and self._schedule in [config.scheduler for config in self.trainer.lr_scheduler_configs]:
            schedule = cast(Any, self._schedule)
            groups = schedule.optimizer.param_groups
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
        if not self._accumulated:
            return
        self._step = _StepTotals(*(value.to(self.device) for value in self._accumulated["step"]))
        gradients = self._accumulated["gradients"]
        for name, parameter in self._trainable():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter)
        self._accumulated = {}

    def on_train_end(self) -> None:
        """See that the last losses were finite too."""
        self._losses.check(wait=True)

    def on_fit_end(self) -> None:
        """Forget what is captured: Lightning moves the weights away."""
        self.backbone.forget_graphs()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Make dropout a function of seed, rank, epoch and batch, for resumed runs."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:  # Lightning's rule, for its gradients
            self._step = None
        torch.manual_seed(hash((self._seed, self.global_rank, self.current_epoch, batch_idx)))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the summed loss over `LOSS_SCALE_TOKENS`.

        Lightning averages micro-batches and ranks; `on_before_optimizer_step` turns that into the mean over tokens.
        """
        if "labels" not in batch:  # bad examples alone: other ranks wait for gradients
            nothing = sum((p.sum() * 0 for _, p in self._trainable()), torch.zeros((), device=self.device))
            loss, tokens = nothing, torch.zeros((), dtype=torch.int64, device=self.device)
        else:
            loss, tokens = self.loss(batch)
            self._losses.add(loss, batch["question_ids"])
        if self._step is None:
            self._step = _StepTotals(torch.zeros_like(tokens), torch.zeros_like(loss))
        self._step = _StepTotals(self._step.tokens + tokens, self._step.loss + loss.detach())
        return loss / LOSS_SCALE_TOKENS

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the answer tokens of the whole step instead of by micro-batches and ranks."""
        if self._scaler:
            self._overflows.step(self._scaler.get_scale())
        assert self._step is not None
        tokens, loss = summed(self.trainer, torch.stack([self._step.tokens.double(), self._step.loss.double()]))
        self._step = None
        tokens = tokens.clamp(min=1)
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size * LOSS_SCALE_TOKENS / tokens
        # At once, and without a walk through all modules: as long as the CPU is at it, it launches nothing.
        parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
        self.step_loss, self.step_lr = (loss / tokens).float(), optimizer.param_groups[0]["lr"]
        self.log("train/loss", self.step_loss, prog_bar=True)
        # A tensor of the CPU's: Lightning would bring a number to the GPU and wait for it.
        self.log("lr", torch.tensor(self.step_lr))
        assert self._signals is not None
        self._signals.ask()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, and for a fused optimizer too where no scaler is at work."""
        if self._scaler or not gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val, algorithm)

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """Return AdamW and the schedule, stepped with it."""
        options = self.hparams
        parameters = [p for _, p in self._trainable()]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=options.lr,
            # With a scaler it would unscale gradients by itself, behind the clipping.
            fused=parameters[0].is_cuda and not (self._scaler and self.trainer.gradient_clip_val),
        )
        steps = self.trainer.estimated_stepping_batches
        # It may have opened the loader, before a checkpoint's place in it was known.
        self.trainer.fit_loop._combined_loader = None
        schedule = options.schedule
        if steps == float("inf"):
            rank_zero_warn(
                f"model.schedule {schedule}: training has no last step that the learning rate could fall to, so it "
                f"stays at model.lr after the warm-up: give trainer.max_steps or trainer.max_epochs to have it fall"
            )
            schedule = "constant_with_warmup"
        scheduler = get_scheduler(
            schedule, optimizer, num_warmup_steps=options.warmup_steps, num_training_steps=cast(int, steps)
        )
        self._schedule, self._restored = scheduler, False
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.register_load_state_dict_pre_hook(self._keep_settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _keep_settings(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
        """Let this run's learning rate and other settings win over a checkpoint's, before its optimizer is loaded.

        Groups that a subclass has added or changed, or that a schedule of its own is at work on, stay the checkpoint's.
        """
        self._restored = True
        theirs, ours = (
            [len(g["params"]) for g in groups["param_groups"]] for groups in (saved, optimizer.state_dict())
        )
        if theirs != ours:
            raise InputError(
                f"the checkpoint's optimizer has groups of {theirs} weights, this run's of {ours}: it is another "
                f"adapter's, or damaged"
            )
        if any(config.scheduler is not self._schedule for config in self.trainer.lr_scheduler_configs):
            return None
        groups = list(saved["param_groups"])
        for i, (group, made) in enumerate(zip(optimizer.param_groups, self._groups, strict=False)):
            if i < len(groups) and all(group.get(name) == value for name, value in made.items()):
                groups[i] = {**groups[i], **made}
        return {**saved, "param_groups": groups}

    # Evaluator

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add a batch's loss and generated answers to the validation's, unless a fit is to end."""
        if self._signals is not None and self._signals.sigterm:
            self._signals.answer()
        self.records += self.evaluator.records(batch, self.eval_loss)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add a batch's loss and generated answers to the test's."""
        self.records += self.evaluator.records(batch, self.eval_loss)

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation's records."""
        self.records = []

    def on_test_epoch_start(self) -> None:
        """Forget the last evaluation's records."""
        self.records = []

    def on_validation_epoch_end(self) -> None:
        """Log what the validation comes to."""
        if self._signals is not None:
            self._signals.answer()
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log what the test comes to."""
        self._log_scores("test")

    def on_predict_epoch_end(self) -> None:
        """Give back the memory that answering took."""
        self.evaluator.forget()

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Return a record a question, see `Evaluation.records`."""
        return self.evaluator.records(batch)

    def generate(self, batch: Mapping[str, Any]) -> list[str]:
        """Return the B greedy answers to a batch's prompts, without dropout in whatever mode the module is."""
        return self.evaluator.read_and_answer(batch).texts

    def _log_scores(self, stage: str) -> None:
        records = by_place(self.records)
        self.evaluator.forget()  # training wants the memory
        self.log(f"{stage}/loss", self.eval_loss.compute(), sync_dist=True)
        self.eval_loss.reset()
        self.log(f"{stage}/anls", self._score(records), sync_dist=True, prog_bar=True)
        # Every rank must score the same types, whether or not it saw them.
        types = {name for record in records.values() for name in map(_metric_name, record["question_types"])}
        for name in sorted(set().union(*gather_objects(self.trainer, types))):
            of_type = {key: r for key, r in records.items() if name in map(_metric_name, r["question_types"])}
            self.log(f"{stage}/anls/{name}", self._score(of_type), sync_dist=True)
        known = {key: record for key, record in records.items() if "reference_page" in record}
        right = {key: record["answer_page"] == record["reference_page"] for key, record in known.items()}
        once = {key: value for rank in gather_objects(self.trainer, right) for key, value in rank.items()}
        if once:  # the same on every rank
            self.log(f"{stage}/answer_page_accuracy", sum(once.values()) / len(once))

    def _score(self, records: Mapping[Any, dict[str, Any]]) -> Tensor:
        self.anls.update(
            [record["prediction"] for record in records.values()],
            [record["references"] for record in records.values()],
            question_ids=[*records],  # they may be scored on two ranks
        )
        score = self.anls.compute()
        self.anls.reset()
        return score

    # Checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ANN401
        """Return the trained weights alone: the 4-bit base is the Hub's and stays out of checkpoints."""
        trainable = {name for name, _ in self._trainable()}
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name in trainable}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load the trained weights, all of them.

        Raises:
            InputError: with the first names that differ, when they are another adapter's.
        """
        self.configure_model()
        check_weights(state_dict, dict(self._trainable()))
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the gradients accumulated so far, of all ranks; all of them must call it.

        Raises:
            InputError: a loss wasn't finite: what would be saved is no good.
        """
        self._losses.check(wait=True)
        checkpoint["base"] = self._base
        if broken := next((name for name, p in self._trainable() if not p.isfinite().all()), None):
            raise InputError(f"{broken} isn't finite any more and isn't saved: lower model.lr and resume")
        if self._step is not None:
            ranks = self.trainer.world_size
            checkpoint["accumulated"] = {
                "step": [summed(self.trainer, value) / ranks for value in self._step],
                "gradients": {
                    n: summed(self.trainer, p.grad) / ranks for n, p in self._trainable() if p.grad is not None
                },
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another base or scale of the adapter, and weights alone to resume from; say what else differs."""
        self.configure_model()
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and not checkpoint.get("optimizer_states"):
            raise InputError(
                f"ckpt_path {trainer.ckpt_path} holds weights alone (save_weights_only), from which a fit can't go on: "
                f"give a checkpoint with the optimizer's state"
            )
        self._accumulated = checkpoint.get("accumulated", {})
        own = {"hyper_parameters": self.hparams}
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, LightningDataModule):
            own["datamodule_hyper_parameters"] = data.hparams
        check_hyperparameters(checkpoint, own, getattr(data, "held_out_by", {}))
        base = checkpoint.get("base")
        if isinstance(base, Tensor):
            check_embedding(base, self.model, self.hparams.pretrained)
        elif base is not None:
            check_base(base, self._base, self.hparams.pretrained)

    # Helpers

    @cached_property
    def _base(self) -> dict[str, Any]:
        """What tells the base that was loaded from others."""
        config = self.model.get_base_model().config
        return base_fingerprint(self.hparams.pretrained, getattr(config, "_commit_hash", None))

    @property
    def _scaler(self) -> Any:  # noqa: ANN401
        """Float16's, of the losses."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _trainable(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)


def _metric_name(question_type: str) -> str:
    """Return a type of question without what tables and loggers would take for markup: [ and ], line breaks."""
    return "".join(c if c.isprintable() else " " for c in question_type).translate(str.maketrans("[]", "()"))
