"""Trains the package's small reader from nothing: a randomly initialised Idefics2 of 8M parameters learns to read.

    python tools/tiny_reader/train.py --minutes 17 --out reader --results reader.json

One GPU and some cores; pages are rendered while it trains. The schedule follows the clock: whatever the machine, the
learning rate has come down to nothing when the time is up. Prints a line every 20 seconds and the held-out table at
the end; `--smoke` runs all of it in about two minutes on a CPU, and learns nothing.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from multiprocessing.pool import Pool
from pathlib import Path
from typing import NamedTuple

START = time.monotonic()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the renderers are forked
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from evaluate import SETS, answer, question_of, render_held_out, table, teacher_forced  # noqa: E402
from forward import PackedReader, difference  # noqa: E402
from helpers import TrainingLoss, new_reader  # noqa: E402
from pages_store import BLOCK, PAGE_BYTES, Batch, PageStore, shared_arrays, start_pool  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from idefics_lit.tiny import save_tiny  # noqa: E402

PEAK_RATE, WARMUP_STEPS = 1e-3, 300
WEIGHT_DECAY = 0.02


class Scale(NamedTuple):
    """How much of everything."""

    pages: int = 280_000
    first_pages: int = 8192  # rendered before training begins
    batch: int = 128
    slots: int = 5
    held_out: int = 300  # pages of each family in each held-out set
    generate_batch: int = 100
    log_seconds: float = 20
    save_seconds: float = 120
    checked: int = 86  # of each family, for the log
    reserve_seconds: float = 110  # for saving and the table


SMOKE = Scale(1024, BLOCK, 2, 5, 2, 3, 5, 15, 3, 40)


def log(*words: object) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f} s]", *words, flush=True)


class Schedule(NamedTuple):
    """What changes during training, at a share ``progress`` of its time."""

    rate: float
    reading: float  # share of reading tasks
    character: float  # weights of the helper losses
    look: float

    @classmethod
    def at(cls, progress: float, step: int) -> "Schedule":
        """The reading tasks and the helpers make way for the questions."""
        rate = PEAK_RATE * min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * progress)) / 2
        reading = max(0.6 - 1.1 * progress, 0.1)
        return cls(rate, reading, max(1 - progress / 0.75, 0), 0.1 * max(1 - progress / 0.25, 0))


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
        matrices = [weight for weight in self.loss.parameters() if weight.ndim >= 2]
        vectors = [weight for weight in self.loss.parameters() if weight.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=self.cuda)
        self.good: dict[str, Tensor] = {}  # the weights when the loss was last seen finite
        self.steps = 0

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
        with self.autocast():
            loss, parts = self.compiled(batch, *weights)
        loss.backward()
        return parts

    def train(self, pages: PageStore, arrays: dict[str, np.ndarray], checked: PageStore, until: float) -> None:
        """Train until a time of `time.monotonic`.

        Args:
            pages: to train on; still growing,
            arrays: from these.
            checked: held-out pages for the log.
            until: when to stop.
        """
        scale, begin = self.scale, time.monotonic()
        logged = saved = begin
        parts, logged_step = torch.zeros(5, device=self.device), 0
        while (now := time.monotonic()) < until:
            if self.steps == 3:
                begin = now  # compiling is over
            schedule = Schedule.at(max(now - begin, 0) / max(until - begin, 1), self.steps)
            pages.grow(arrays)
            parts += self.step(pages.training_batch(scale.batch, scale.slots, schedule.reading), schedule)
            if self.steps in (1, 3):
                log(f"step {self.steps}, first loss {parts[0] / self.steps:.3f}")
            if now - logged > scale.log_seconds:
                pace = (self.steps - logged_step) * scale.batch / (now - logged)
                self._keep_if_finite(parts)
                answers, *helpers = (parts / (self.steps - logged_step)).tolist()
                with self.autocast():
                    questions, readings = teacher_forced(self.reader, checked, scale.slots, scale.batch)
                memory = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0
                log(
                    f"step {self.steps} lr {schedule.rate:.1e} loss {answers:.4f}"
                    f" (patch {helpers[0]:.3f} latent {helpers[1]:.3f} place {helpers[2]:.2f} look {helpers[3]:.2f})"
                    f" | held-out exact: questions {questions:.3f} reading {readings:.3f}"
                    f" | {pace:.0f} pages/s of {pages.size}, {memory:.0f} GiB"
                )
                parts, logged, logged_step = torch.zeros_like(parts), time.monotonic(), self.steps
                if logged - saved > scale.save_seconds and self.good:
                    self.save()
                    saved = logged
        log(f"trained {self.steps} steps of {scale.batch} pages, {pages.size} different ones")

    def _keep_if_finite(self, parts: Tensor) -> None:
        if torch.isfinite(parts).all():
            self.good = {name: value.clone() for name, value in self.loss.state_dict().items()}
        elif self.good:
            log("WARNING: the loss is not finite; back to the weights of the line before")
            self.loss.load_state_dict(self.good)
            self.optimizer.state.clear()

    def save(self) -> None:
        """Write the reader as it is; training can go on."""
        save_tiny(copy.deepcopy(self.reader.model), self.out)


def main() -> None:
    """Render, train, save, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=17, help="for everything, from start to table")
    parser.add_argument("--out", type=Path, required=True, help="folder for the reader, in the Hub's form")
    parser.add_argument("--results", type=Path, help="JSON file for the held-out table")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    arguments = parser.parse_args()
    scale = SMOKE if arguments.smoke else Scale()

    # The workers are forked, so they come before anything touches the GPU.
    arrays = shared_arrays(scale.pages)
    with start_pool(arrays) as pool:
        run(scale, pool, arrays, arguments.out, arguments.results, START + 60 * arguments.minutes)


def run(scale: Scale, pool: Pool, arrays: dict[str, np.ndarray], out: Path, results: Path | None, end: float) -> None:
    """Train while the pool renders, save the reader to ``out``, print and write the held-out table before ``end``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    log(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, transformers {transformers.__version__}")
    seeds = range(scale.held_out)
    held_out = {kind.name: pool.apply_async(render_held_out, (kind, seeds)) for kind in SETS}
    checked = pool.apply_async(render_held_out, (SETS[0], range(1000, 1000 + scale.checked)))
    room = torch.cuda.mem_get_info()[0] * 0.65 / PAGE_BYTES if device.type == "cuda" else math.inf
    pages = PageStore(int(min(scale.pages, room)), device)
    pages.render(pool)
    trainer = Trainer(scale, device, out)
    checked_pages = checked.get()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        error = difference(trainer.reader, checked_pages[:6], device)
    log(f"packed forward against transformers': largest difference of a logit {error:.1e}")
    if error > 1e-3:
        raise SystemExit("FAILED: the packed forward is not transformers' forward")
    torch.set_float32_matmul_precision("high")
    while pages.size < min(scale.first_pages, len(pages.on_device["image"]) // 2):
        pages.grow(arrays)
        time.sleep(0.01)
    log(f"{pages.size} pages are there, training begins")
    try:
        trainer.train(pages, arrays, PageStore.of(checked_pages, device), end - scale.reserve_seconds)
    except (Exception, KeyboardInterrupt) as failure:
        log(f"FAILED after {trainer.steps} steps; what was learned is saved: {failure!r}")
        if trainer.good:
            trainer.loss.load_state_dict(trainer.good)
    trainer.save()
    log(f"saved {out}, {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.2f} MB")

    test_pages = {name: result.get() for name, result in held_out.items()}
    answers = answer(out, test_pages, device, scale.generate_batch, end - 10)
    scores = table(test_pages, answers)
    print(f"{'held-out':36} exact   ANLS  pages")
    for name, score in scores.items():
        print(f"{name:36} {score.exact:.3f}  {score.anls:.3f}  {score.pages:5}")
    for page, text in list(zip(test_pages[SETS[0].name], answers[SETS[0].name], strict=False))[:12]:
        question = question_of(page)
        print(
            f"  {'right' if text in question.answers else 'WRONG'}  {question.text}  {question.answers[0]!r}: {text!r}"
        )
    if results:
        facts = {"machine": machine, "torch": torch.__version__, "transformers": transformers.__version__}
        facts |= {"seconds": round(time.monotonic() - START), "steps": trainer.steps, "pages": pages.size}
        facts["held_out"] = {name.strip(): score._asdict() for name, score in scores.items()}
        results.write_text(json.dumps(facts, indent=2) + "\n")
    log("done")


if __name__ == "__main__":
    main()
