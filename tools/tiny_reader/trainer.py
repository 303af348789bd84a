"""The training loop: a schedule by elapsed time, periodic logging, and a fallback to the last finite weights."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from clock import log
from evaluate import teacher_forced
from forward import PackedReader
from pages_store import Batch, PageStore
from torch import Tensor, nn
from training_loss import TrainingLoss, new_reader

from idefics_lit.model.tiny import save_tiny

PEAK_RATE, WARMUP_STEPS = 1e-3, 300
WEIGHT_DECAY = 0.02
QUANTIZED = 0.2  # last fraction of the time, which trains with NF4-quantized weights


class Scale(NamedTuple):
    """The sizes of a run."""

    pages: int = 280_000
    first_pages: int = 8192  # rendered before training starts
    batch: int = 128  # pages per step
    slots: int = 6  # tasks per page
    monitored: int = 86  # held-out pages per family that are evaluated during training
    held_out: int = 300  # pages per family in each held-out set
    generate_batch: int = 150
    log_seconds: float = 20
    save_seconds: float = 120
    reserve_seconds: float = 45  # for saving and the evaluation


class Schedule(NamedTuple):
    """The hyperparameters that change during training."""

    rate: float
    reading: float  # fraction of reading tasks
    character: float  # weight of the auxiliary losses of characters and positions
    attention: float  # weight of the auxiliary loss of the resampler's attention

    @classmethod
    def at(cls, progress: float, step: int) -> "Schedule":
        """Return the values at a fraction ``progress`` of the time: reading tasks and auxiliary losses fade out."""
        rate = PEAK_RATE * min(1, (step + 1) / WARMUP_STEPS) * (1 - progress)
        reading = max(0.6 - 1.1 * progress, 0.12)
        return cls(rate, reading, max(1 - progress / 0.75, 0.0), 0.1 * max(1 - progress / 0.25, 0.0))


class Trainer:
    """The reader with its losses and optimizer.

    Args:
        scale: the sizes.
        device: the device to train on.
        out: the folder to save the reader to.
    """

    def __init__(self, scale: Scale, device: torch.device, out: Path) -> None:
        """See the class."""
        self.scale, self.device, self.out = scale, device, out
        self.cuda = self.device.type == "cuda"
        torch.manual_seed(0)
        self.loss = TrainingLoss(PackedReader(new_reader(), scale.slots)).to(self.device)
        self.compiled = torch.compile(self.loss, dynamic=False) if self.cuda else self.loss
        model = self.reader.model
        self.quantized = [  # in NF4
            layer.weight for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not model.lm_head
        ]
        matrices = [weight for weight in self.loss.parameters() if weight.ndim >= 2]
        vectors = [weight for weight in self.loss.parameters() if weight.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=self.cuda)
        self.finite_weights: dict[str, Tensor] = {}  # of the last log line with a finite loss
        self.steps = 0
        self.quantization: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def reader(self) -> PackedReader:
        """The reader without the auxiliary heads."""
        return self.loss.reader

    def autocast(self) -> torch.autocast:
        """Return the context of bfloat16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda)

    def step(self, batch: Batch, schedule: Schedule) -> Tensor:
        """Take one optimizer step and return the terms of the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate
        weights = [torch.full((), weight, device=self.device) for weight in (schedule.character, schedule.attention)]
        try:
            parts = self._backward(batch, weights)
        except Exception as error:
            if self.compiled is self.loss:
                raise
            log(
                f"WARNING: training continues without torch.compile, slower: {type(error).__name__}: {str(error)[:500]}"
            )
            self.compiled = self.loss
            self.optimizer.zero_grad()
            parts = self._backward(batch, weights)
        nn.utils.clip_grad_norm_(self.loss.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.cuda and self.steps % 8 == 0:
            torch.cuda.synchronize()  # keep the schedule's clock in step with the GPU
        return parts

    def _backward(self, batch: Batch, weights: list[Tensor]) -> Tensor:
        with self.quantization(), self.autocast():
            loss, parts = self.compiled(batch, *weights)
            loss.backward()
        return parts

    @contextmanager
    @torch.no_grad()
    def quantized_weights(self) -> Iterator[None]:
        """Replace the weights by their NF4 values; the gradients update the original weights (straight-through)."""
        originals = [weight.clone() for weight in self.quantized]
        torch._foreach_copy_(self.quantized, self.nf4())
        try:
            with torch.enable_grad():
                yield
        finally:
            torch._foreach_copy_(self.quantized, originals)

    @torch.no_grad()
    def nf4(self) -> list[Tensor]:
        """Return the weights quantized by bitsandbytes in blocks of 64; each row has a multiple of 64 values."""
        blocks = torch.cat([weight.view(-1, 64) for weight in self.quantized])
        blocks = dequantize_4bit(*quantize_4bit(blocks, blocksize=64, quant_type="nf4"))
        parts = blocks.split([weight.numel() // 64 for weight in self.quantized])
        return [part.view_as(weight) for part, weight in zip(parts, self.quantized, strict=True)]

    def train(self, pages: PageStore, monitored: PageStore, until: float) -> None:
        """Train until a time of `time.monotonic`.

        Args:
            pages: the training pages, which grow meanwhile.
            monitored: the held-out pages to evaluate.
            until: the time to stop.
        """
        scale, begin = self.scale, time.monotonic()
        logged = saved = begin
        parts, logged_step = torch.zeros(5, device=self.device), 0
        while (now := time.monotonic()) < until:
            if self.steps == 3:
                begin = now  # compilation is done
            progress = max(now - begin, 0) / max(until - begin, 1)
            schedule = Schedule.at(progress, self.steps)
            self.quantization = self.quantized_weights if progress > 1 - QUANTIZED else nullcontext
            pages.grow()
            parts += self.step(pages.training_batch(scale.batch, scale.slots, schedule.reading), schedule)
            if self.steps in (1, 3):
                log(f"step {self.steps}, first loss {parts[0] / self.steps:.3f}")
            if now - logged > scale.log_seconds:
                pace = (self.steps - logged_step) * scale.batch / (now - logged)
                self._keep_if_finite(parts)
                answers, *auxiliary = (parts / (self.steps - logged_step)).tolist()
                with self.quantization(), self.autocast():
                    questions, readings = teacher_forced(self.reader, monitored, scale.slots, scale.batch)
                memory = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0
                log(
                    f"step {self.steps} lr {schedule.rate:.1e} loss {answers:.4f}"
                    f" (patch {auxiliary[0]:.3f} latent {auxiliary[1]:.3f}"
                    f" position {auxiliary[2]:.2f} attention {auxiliary[3]:.2f})"
                    f" | held-out exact: questions {questions:.3f} reading {readings:.3f}"
                    f" | {pace:.0f} pages/s of {pages.rendered}, {memory:.0f} GiB"
                )
                parts, logged, logged_step = torch.zeros_like(parts), time.monotonic(), self.steps
                if logged - saved > scale.save_seconds and self.finite_weights:
                    self.save()
                    saved = logged
        log(f"trained {self.steps} steps of {scale.batch} pages, of {pages.rendered} rendered pages")

    def _keep_if_finite(self, parts: Tensor) -> None:
        if torch.isfinite(parts).all():
            self.finite_weights = {name: value.clone() for name, value in self.loss.state_dict().items()}
        elif self.finite_weights:
            log("WARNING: the loss is not finite; restoring the weights of the previous line")
            self.loss.load_state_dict(self.finite_weights)
            self.optimizer.state.clear()

    def save(self) -> None:
        """Save the reader with the current quantization; training can continue."""
        with self.quantization():
            save_tiny(copy.deepcopy(self.reader.model), self.out)
