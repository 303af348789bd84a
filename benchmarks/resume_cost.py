"""What it costs to be resumable: the stateful loader a batch, and a checkpoint that is written atomically.

    python benchmarks/resume_cost.py --results benchmarks/results/resume_cost.json

On a CPU. Loaders with two workers pass batches of 1 MB on, torch's and torchdata's in turns; a checkpoint of the size
that Idefics2-8b's adapter and its AdamW have is written by Lightning's writer and by ours in turns, to --folder's disk.
Besides, the step of the quickstart's fit, which the costs are a share of.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader, Dataset

from idefics_lit.cli.main import DocVQACLI
from idefics_lit.cli.main import main as command_line
from idefics_lit.data.loaders import TrainingLoader
from idefics_lit.training.checkpoint import AtomicCheckpointIO

ADAPTER = 8_000_000  # the recipe's has 7.4 million weights
ROUNDS = 7


class Pages(Dataset):
    """Batches of a megabyte."""

    def __len__(self) -> int:
        return 16_000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((16_384,), float(index))


def a_batch(make: Any) -> float:
    loader = make(Pages(), batch_size=16, num_workers=2, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - started) / count


def a_checkpoint(writer: Any, folder: Path, checkpoint: Any) -> float:
    started = time.perf_counter()
    writer.save_checkpoint(checkpoint, str(folder / "last.ckpt"))
    return time.perf_counter() - started


def a_step(steps: int) -> float:
    """The median step of the quickstart's fit."""
    ends = []

    class Ends(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

    before = DocVQACLI.before_instantiate_classes

    def with_ends(cli: Any) -> None:
        cli.trainer_defaults["callbacks"].append(Ends())
        before(cli)

    DocVQACLI.before_instantiate_classes = with_ends
    config = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
    flags = ["--trainer.max_steps", str(steps), "--trainer.num_sanity_val_steps", "0", "--trainer.logger", "false"]
    flags += ["--trainer.val_check_interval", "10000", "--trainer.enable_progress_bar", "false"]
    with contextlib.redirect_stdout(io.StringIO()):
        command_line(["fit", "--config", str(config), *flags])
    return statistics.median(b - a for a, b in itertools.pairwise(ends[5:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to write to")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    results = options.results and options.results.absolute()
    torch.set_num_threads(os.cpu_count() or 1)
    loaders = {"torch": DataLoader, "torchdata": lambda data, **given: TrainingLoader(data, None, **given)}
    batch: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(ROUNDS):
        for name, make in loaders.items():
            batch[name].append(a_batch(make))
    writers = {"Lightning's": TorchCheckpointIO(), "atomic": AtomicCheckpointIO()}
    checkpoint = {f"{kind}.{i}": torch.randn(ADAPTER // 100) for kind in ("weights", "m", "v") for i in range(100)}
    write: dict[str, list[float]] = {name: [] for name in writers}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for _ in range(ROUNDS):
            for name, writer in writers.items():
                write[name].append(a_checkpoint(writer, Path(folder), checkpoint))
        size = Path(folder, "last.ckpt").stat().st_size
        os.chdir(folder)
        step = a_step(options.steps)
    medians = {name: statistics.median(times) for name, times in (batch | write).items()}
    loader, saving = medians["torchdata"] - medians["torch"], medians["atomic"] - medians["Lightning's"]
    result = {
        "command": " ".join(["python benchmarks/resume_cost.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "ms a batch": {name: round(1000 * medians[name], 3) for name in loaders},
        "ms a checkpoint": {name: round(1000 * medians[name], 1) for name in writers},
        "MB a checkpoint": round(size / 1e6, 1),
        "ms a step of the quickstart": round(1000 * step, 1),
        "percent of that step, a checkpoint every 25 steps": round(100 * (loader + saving / 25) / step, 3),
        "percent of a step of 138 ms (packed, on an H100, another run)": round(100 * (loader + saving / 25) / 0.138, 3),
    }
    print(json.dumps(result, indent=2))
    if results:
        results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
