"""The training loop: a schedule that follows the clock, a line in the log now and then, weights that are never lost."""

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
ROUNDED = 0.2  # last share of the time, in which the weights are seen as NF4 makes them


class Scale(NamedTuple):
    """How much of everything."""

    pages: int = 280_000
    first_pages: int = 8192  # rendered before training begins
    batch: int = 128  # pages,
    slots: int = 6  # each with so many tasks
    checked: int = 86  # held-out pages of each family for the log,
    held_out: int = 300  # and of each family in each set of the table
    generate_batch: int = 150
    log_seconds: float = 20
    save_seconds: float = 120
    reserve_seconds: float = 45  # for saving and the table


class Schedule(NamedTuple):
    """What changes during training, at a share ``progress`` of its time."""

    rate: float
    reading: float  # share of reading tasks
    character: float  # weights of the helper losses
    look: float

    @classmethod
    def at(cls, progress: float, step: int) -> "Schedule":
        """The reading tasks and the helpers make way for the questions."""
        rate = PEAK_RATE * min(1, (step + 1) / WARMUP_STEPS) * (1 - progress)
        reading = max(0.6 - 1.1 * progress, 0.12)
        return cls(rate, reading, max(1 - progress / 0.75, 0.0), 0.1 * max(1 - progress / 0.25, 0.0))


class Trainer:
    """A run: the reader, its pages and its optimizer.

    Args:
        scale: sizes.
        device: where to train.
        out: folder for the reader.
    """

    def __init__(self, scale: Scale, device: torch.device, out: Path) -> None:
        """See the class."""
        self.scale, self.device, self.out = scale, device, out
        self.cuda = self.device.type == "cuda"
        torch.manual_seed(0)
        self.loss = TrainingLoss(PackedReader(new_reader(), scale.slots)).to(self.device)
        self.compiled = torch.compile(self.loss, dynamic=False) if self.cuda else self.loss
        model = self.reader.model
        self.quantized = [  # by NF4
            layer.weight for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not model.lm_head
        ]
        matrices = [weight for weight in self.loss.parameters() if weight.ndim >= 2]
        vectors = [weight for weight in self.loss.parameters() if weight.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=self.cuda)
        self.good: dict[str, Tensor] = {}  # the weights when the loss was last seen finite
        self.steps = 0
        self.seen: Callable[[], AbstractContextManager[None]] = nullcontext  # how the step sees the weights

    @property
    def reader(self) -> PackedReader:
        """The reader without its helpers."""
        return self.loss.reader

    def autocast(self) -> torch.autocast:
        """bfloat16 where that is fast."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda)

    def step(self, batch: Batch, schedule: Schedule) -> Tensor:
        """One optimizer step; returns the parts of the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate
        weights = [torch.full((), weight, device=self.device) for weight in (schedule.character, schedule.look)]
        try:
            parts = self._backward(batch, weights)
        except Exception as error:
            if self.compiled is self.loss:
                raise
            log(f"WARNING: going on uncompiled, slower: {type(error).__name__}: {str(error)[:500]}")
            self.compiled = self.loss
            self.optimizer.zero_grad()
            parts = self._backward(batch, weights)
        nn.utils.clip_grad_norm_(self.loss.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.cuda and self.steps % 8 == 0:
            torch.cuda.synchronize()  # or the schedule's clock runs ahead of the GPU
        return parts

    def _backward(self, batch: Batch, weights: list[Tensor]) -> Tensor:
        with self.seen(), self.autocast():
            loss, parts = self.compiled(batch, *weights)
            loss.backward()
        return parts

    @contextmanager
    @torch.no_grad()
    def rounded(self) -> Iterator[None]:
        """Let the weights be what NF4 makes of them; what is learned goes to the ones that are put back."""
        kept = [weight.clone() for weight in self.quantized]
        torch._foreach_copy_(self.quantized, self.nf4())
        try:
            with torch.enable_grad():
                yield
        finally:
            torch._foreach_copy_(self.quantized, kept)

    @torch.no_grad()
    def nf4(self) -> list[Tensor]:
        """The weights rounded as bitsandbytes does: in blocks of 64, of which every row is a multiple."""
        blocks = torch.cat([weight.view(-1, 64) for weight in self.quantized])
        blocks = dequantize_4bit(*quantize_4bit(blocks, blocksize=64, quant_type="nf4"))
        parts = blocks.split([weight.numel() // 64 for weight in self.quantized])
        return [part.view_as(weight) for part, weight in zip(parts, self.quantized, strict=True)]

    def train(self, pages: PageStore, checked: PageStore, until: float) -> None:
        """Train until a time of `time.monotonic`.

        Args:
            pages: to train on; still growing.
            checked: held-out pages for the log.
            until: when to stop.
        """
        scale, begin = self.scale, time.monotonic()
        logged = saved = begin
        parts, logged_step = torch.zeros(5, device=self.device), 0
        while (now := time.monotonic()) < until:
            if self.steps == 3:
                begin = now  # compiling is over
            progress = max(now - begin, 0) / max(until - begin, 1)
            schedule = Schedule.at(progress, self.steps)
            self.seen = self.rounded if progress > 1 - ROUNDED else nullcontext
            pages.grow()
            parts += self.step(pages.training_batch(scale.batch, scale.slots, schedule.reading), schedule)
            if self.steps in (1, 3):
                log(f"step {self.steps}, first loss {parts[0] / self.steps:.3f}")
            if now - logged > scale.log_seconds:
                pace = (self.steps - logged_step) * scale.batch / (now - logged)
                self._keep_if_finite(parts)
                answers, *helpers = (parts / (self.steps - logged_step)).tolist()
                with self.seen(), self.autocast():
                    questions, readings = teacher_forced(self.reader, checked, scale.slots, scale.batch)
                memory = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0
                log(
                    f"step {self.steps} lr {schedule.rate:.1e} loss {answers:.4f}"
                    f" (patch {helpers[0]:.3f} latent {helpers[1]:.3f} place {helpers[2]:.2f} look {helpers[3]:.2f})"
                    f" | held-out exact: questions {questions:.3f} reading {readings:.3f}"
                    f" | {pace:.0f} pages/s of {pages.rendered}, {memory:.0f} GiB"
                )
                parts, logged, logged_step = torch.zeros_like(parts), time.monotonic(), self.steps
                if logged - saved > scale.save_seconds and self.good:
                    self.save()
                    saved = logged
        log(f"trained {self.steps} steps of {scale.batch} pages, {pages.rendered} different ones")

    def _keep_if_finite(self, parts: Tensor) -> None:
        if torch.isfinite(parts).all():
            self.good = {name: value.clone() for name, value in self.loss.state_dict().items()}
        elif self.good:
            log("WARNING: the loss is not finite; back to the weights of the line before")
            self.loss.load_state_dict(self.good)
            self.optimizer.state.clear()

    def save(self) -> None:
        """Write the reader as it is seen; training can go on."""
        with self.seen():
            save_tiny(copy.deepcopy(self.reader.model), self.out)
