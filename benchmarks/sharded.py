"""LoRA without quantization on two GPUs, the base sharded over them, at full size with random weights.

    python benchmarks/sharded.py --tokenizer tokenizer.model --results benchmarks/results/sharded.json

``configs/fsdp.yaml`` on the pages of train_throughput.py: 24 steps and a validation on two GPUs, then the
checkpoint's on one of them, without shards. Needs two GPUs with 40 GB, or one with 80 that they share, which tells
memory and losses but no speed, and what full_size.py needs; ``--tiny`` tries it with two CPU processes.
"""

import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from full_size import WARM_UP, arguments, build, command, devices, measure, save, versions
from lightning import Callback
from train_throughput import build_data

STEPS = 24
LIMIT = 180  # seconds that the fit, and the validation, may take


class PrefillCache(Callback):
    """Write this rank's memory and the last validation's loss beside the file that $STEP_TIMES names."""

    def __init__(self) -> None:
        self.report: dict[str, float] = {}

    def peak(self, phase: str) -> None:
        if torch.cuda.is_available():
            self.report[f"{phase}_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            torch.cuda.reset_peak_memory_stats()

    def on_fit_start(self, *_: Any) -> None:
        self.peak("loading")
        if torch.cuda.is_available():
            self.report["sharded_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2)

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        self.peak("loading" if trainer.state.fn == "validate" else "training")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        self.peak("validation")
        self.report["val/loss"] = float(trainer.callback_metrics["val/loss"])
        path = Path(os.environ["STEP_TIMES"]).with_suffix(f".rank{trainer.global_rank}")
        path.write_text(json.dumps(self.report))


def main() -> None:
    options = arguments(__doc__, "sharded").parse_args()
    work = options.work
    model, data = build(options, lambda folder: build_data(folder, options.tiny))
    common = ["--data.num_workers", 0 if options.tiny else 12, "--trainer.callbacks+=sharded.Memory"]
    common += ["--trainer.logger", "false", "--trainer.default_root_dir", work]
    precision = ["--trainer.precision", "32-true" if options.tiny else "bf16-mixed"]
    if options.tiny:
        common += ["--trainer.accelerator", "cpu"]

    fit = ["--model.pretrained", model, "--data.source", data, *devices(2), "--trainer.max_steps", STEPS]
    fit += ["--data.val_every_n_steps", STEPS, "--trainer.callbacks+=full_size.StepTimes", *common]
    if options.tiny:
        fit += ["--data.image_size", 112, *precision]
    trained = measure("fit", command("fit", ["docvqa.yaml", "fsdp.yaml"], *fit), work, LIMIT)
    checkpoint = work / "checkpoints" / "last.ckpt"
    alone = ["--ckpt_path", checkpoint, "--model.quantization", "none", "--trainer.devices", 1, *precision, *common]
    validated = measure("validate", command("validate", [], *alone), work, LIMIT)

    ranks = {path.name: json.loads(path.read_text()) for path in sorted(work.glob("*.rank?"))}
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "devices": max(torch.cuda.device_count(), 1),
        "versions": versions(),
        "questions_per_s": trained.get("examples_per_s"),
        "step_s": trained.get("step_s"),
        "median_step_s": statistics.median(trained["step_s"][WARM_UP:]) if trained.get("step_s") else None,
        "losses": trained.get("losses"),
        "ranks": ranks,
        "checkpoint_bytes": checkpoint.stat().st_size if checkpoint.exists() else None,
        "wall_s": {"fit": trained["wall_s"], "validate": validated["wall_s"]},
        "failed": trained.get("failed") or validated.get("failed"),
    }
    save(report, options)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
