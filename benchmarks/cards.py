"""What the plain command does on cards of other sizes: docvqa.yaml at full size under limits of GPU memory.

    python benchmarks/cards.py --tokenizer tokenizer.model --results benchmarks/results/cards.json

Each card is a process of its own on one GPU, limited by ``torch.cuda.set_per_process_memory_fraction``; the smallest is
forced to float16. Beside them run transformers' Trainer and the recipe in it. Questions a second, as in
train_throughput.py, whose pages these are; the peak is of memory allocated, from the first step on; "options" is the
line that the fit prints. Results are saved after each. Needs what full_size.py needs; ``--tiny`` tries it on a CPU.
"""

import statistics
import sys
import time
from typing import Any

import torch
from full_size import REPOSITORY, arguments, build, measure, save, versions
from train_throughput import build_data

CARDS = {  # GiB that the process may use, and more flags
    "15 GB, float16": (14.6, ["--trainer.precision", "16-mixed"]),
    "24 GB": (23.5, []),
    "24 GB, compiled": (23.5, ["--model.compile", "true"]),
    "40 GB": (39.4, []),
    "80 GB": (79.0, []),
    "whole": (None, []),
    "15 GB, float16, splitting": (14.6, ["--trainer.precision", "16-mixed", "--data.image_splitting", "true"]),
    "24 GB, splitting": (23.5, ["--data.image_splitting", "true"]),
    "80 GB, splitting": (79.0, ["--data.image_splitting", "true"]),
}
SKIPPED = 12  # steps at the start


def run_limited(gib: float, typed: list[str]) -> None:
    """Run a command of the package in this process, with a limit of GPU memory."""
    if torch.cuda.is_available() and gib:
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.mem_get_info()[1])
    from idefics_lit.cli.main import main

    main(typed)


def main() -> None:
    if sys.argv[1:2] == ["--limit"]:  # the child process that is measured
        run_limited(float(sys.argv[2]), sys.argv[3:])
        return
    parser = arguments(__doc__, "cards")
    parser.add_argument("--contenders", help="only these, with commas between them; / stands for a comma in a name")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--limit_s", type=float, default=240, help="for each")
    options = parser.parse_args()
    work = options.work
    model, data = build(options, lambda folder: build_data(folder, options.tiny))
    workers = 0 if options.tiny else 12

    def trainer(batch: int, workers: int, *more: str) -> list[str]:
        typed = [REPOSITORY / "benchmarks" / "full_size.py", "--model", model, "--data", data, "--work", work]
        typed += ["--batch", batch, "--workers", workers, "--steps", 12]
        return [sys.executable, *map(str, typed), *more]

    def ours(gib: float | None, *more: str) -> list[str]:
        typed = ["fit", "--config", REPOSITORY / "configs" / "docvqa.yaml", "--model.pretrained", model]
        typed += ["--data.source", data, "--data.num_workers", workers, "--trainer.logger", "false"]
        typed += ["--trainer.max_steps", options.steps, "--trainer.limit_val_batches", 0]
        typed += ["--trainer.callbacks", "full_size.StepTimes"]
        typed += ["--data.image_size", 112] if options.tiny else []
        return [sys.executable, __file__, "--limit", str(gib or 0), *map(str, typed), *more]

    contenders = {"trainer": trainer(16, workers, "--bf16"), "recipe": trainer(2, 0)}
    for name, (gib, more) in CARDS.items():  # a CPU has no float16
        contenders[name] = ours(gib, *(more[2:] if options.tiny and "16-mixed" in more else more))
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "contenders": {},
    }
    chosen = options.contenders.split(",") if options.contenders else list(contenders)
    for name in (name.replace("/", ",") for name in chosen):
        started, file = time.perf_counter(), name.replace(", ", "_").replace(" ", "_")
        result = measure(file, contenders[name], work, options.limit_s)
        skipped = 4 if name in ("trainer", "recipe") else SKIPPED
        steps, log = result.get("step_s", [])[skipped:], (work / f"{file}.log").read_text()
        lines = [line.strip() for line in log.splitlines() if "can be given as a flag" in line or "may not fit" in line]
        report["contenders"][name] = {
            "questions_per_s": round(16 / statistics.median(steps), 2) if steps else None,
            "peak_gib": result.get("peak_gib"),
            "options": lines,
            "seconds": round(time.perf_counter() - started, 1),
            "step_s": result.get("step_s"),
            "losses": result.get("losses"),
            **{key: result[key] for key in ("failed",) if key in result},
        }
        found = report["contenders"][name]
        speed = f"{name:28} {found['questions_per_s']} questions/s, {found['peak_gib']} GiB"
        print(speed, *lines, sep="\n  ", flush=True)
        save(report, options)


if __name__ == "__main__":
    main()
