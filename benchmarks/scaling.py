"""One GPU beside two, at full size: training and validation, and what being one of several ranks costs a step.

    python benchmarks/scaling.py --tokenizer tokenizer.model --results benchmarks/results/scaling.json

The options of a card of 80 GB on the pages of train_throughput.py, without dropout. Speed is questions a second, all
GPUs together, 16 questions a batch on each. "losses" are of steps of 32 questions, a batch on each of two GPUs or two
on one, which see the same questions; "anls" is the score of the reader that comes with the package.

"profile" is what the GPUs of two ranks do in eight steps of training: a step's span, the time in which kernels run, in
which NCCL's run (a rank that is early waits in them) and in which nothing runs.

"ranks" takes one GPU: a step as it is, in DDP, with the GPU read before every batch as Lightning does for several
ranks, and with the two more times a step that its ``strategy.reduce`` reads it; and without the progress bar, which
reads it once a second.

The parts are measured in the order in which they are named, one GPU and then two, and saved one by one. Needs what
full_size.py needs, and two GPUs for the speed of two. Where there is one, two ranks share it, for losses and
scores alone. ``--tiny`` tries it with CPU processes.
"""

import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from full_size import GPU_80GB, arguments, build, command, devices, measure, save, versions
from lightning import Callback
from train_throughput import build_data

WARM_UP = 28
STEPS = 68
LIMIT = 150  # seconds that a contender may take


class Profile(Callback):
    """Write where a rank's GPU spends eight steps, in milliseconds a step, beside the file that $STEP_TIMES names."""

    steps = 8

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == WARM_UP:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == WARM_UP + self.steps:
            self.profiler.stop()
            kind = torch.autograd.DeviceType.CUDA if torch.cuda.is_available() else torch.autograd.DeviceType.CPU
            kernels = [
                (event.name, event.time_range.start, event.time_range.end)
                for event in self.profiler.events()
                if event.device_type == kind
            ]
            nccl = [(start, end) for name, start, end in kernels if "nccl" in name.lower()]
            other = [(start, end) for name, start, end in kernels if "nccl" not in name.lower()]
            span = max(end for *_, end in kernels) - min(start for _, start, _ in kernels)
            report = {
                "span_ms": span,
                "busy_ms": covered([*nccl, *other]),
                "nccl_ms": covered(nccl),
                "nccl_alone_ms": covered([*nccl, *other]) - covered(other),
            }
            report["idle_ms"] = span - report["busy_ms"]
            report = {key: round(value / 1000 / self.steps, 2) for key, value in report.items()}
            path = Path(os.environ["STEP_TIMES"]).with_suffix(f".rank{trainer.global_rank}")
            path.write_text(json.dumps(report))


def covered(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class ReadBeforeBatch(Callback):
    """Wait for the GPU between batches."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        torch.ones((), device=module.device).item()


class ReadInStep(ReadBeforeBatch):
    """Wait for the GPU between batches and twice in a step."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, *_: Any) -> None:
        for _ in range(2):
            torch.ones((), device=module.device).item()


def main() -> None:
    parser = arguments(__doc__, "scaling")
    parser.add_argument("--parts", default="train,validate,losses,anls,profile,ranks", help="only these, with commas")
    options = parser.parse_args()
    parts, work = options.parts.split(","), options.work
    model, data = build(options, lambda folder: build_data(folder, options.tiny))
    shared = torch.cuda.device_count() == 1

    def ours(name: str, ranks: int, *more: object) -> list[str]:
        changed = ["--model.pretrained", model, "--data.source", data, *devices(ranks)]
        changed += ["--data.val_split", "train", "--trainer.logger", "false"]
        changed += ["--data.num_workers", 0 if options.tiny else 12 // (1 + (shared and ranks == 2))]
        changed += ["--data.image_size", 112, "--trainer.precision", "32-true"] if options.tiny else []
        changed += ["--trainer.accelerator", "cpu", "--model.compile", "false"] if options.tiny else []
        return command(name, ["docvqa.yaml"], *GPU_80GB, "--data.global_batch_size", "null", *changed, *more)

    def train(name: str, ranks: int, *more: object, steps: int = STEPS) -> dict[str, Any]:
        fixed = ["--trainer.limit_val_batches", 0, "--model.lora.dropout", 0]
        fixed += ["--trainer.max_steps", WARM_UP + 10 if options.tiny else steps]
        fixed += ["--trainer.callbacks", "full_size.StepTimes"]
        return measure(name, ours("fit", ranks, *fixed, *more), work, LIMIT)

    def rate(trained: dict[str, Any], questions: int) -> Any:
        steps = trained.get("step_s", [])[WARM_UP:]
        return round(questions / statistics.median(steps), 2) if steps else trained.get("failed")

    def measured(part: str, ranks: int) -> Any:
        """Measure a part of the report on one GPU or two."""
        if part == "train":
            trained = train(f"train_{ranks}", ranks)
            details[ranks] = {key: trained.get(key) for key in ("step_s", "wait_s", "peak_gib")}
            return rate(trained, 16 * ranks)
        if part == "losses":
            trained = train(f"losses_{ranks}", ranks, "--trainer.accumulate_grad_batches", 2 // ranks, steps=40)
            return trained.get("losses") or trained.get("failed")
        if part == "profile":
            name = f"profile_{ranks}"
            trained = train(name, ranks, "--trainer.callbacks+=scaling.Profile")
            files = sorted(work.glob(f"{name}.steps.rank?"))
            return [json.loads(file.read_text()) for file in files] or trained.get("failed")
        if part == "validate":
            callback = ["--trainer.callbacks", "validation.BatchTimes", "--model.max_new_tokens", 20]
            callback += ["--data.eval_batch_size", 16 if options.tiny else 64]
            validated = measure(f"validate_{ranks}", ours("validate", ranks, *callback), work, LIMIT)
            # What rank 0 measures: its share of the questions in its time.
            speed = validated.get("questions_per_s")
            return round(speed * ranks, 2) if speed else validated.get("failed")
        read = ["--model.pretrained", "tiny", "--data.source", "synthetic", "--data.val_split", "validation"]
        read = measure(f"reader_{ranks}", ours("validate", ranks, *read), work, LIMIT)
        answers = [json.loads(line) for line in (work / "val_predictions.jsonl").read_text().splitlines()]
        return read.get("failed") or sum(answer["score"] for answer in answers) / len(answers)

    details: dict[int, Any] = {}
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "devices": max(torch.cuda.device_count(), 1),
        "versions": versions(),
        **{part: {} for part in parts},
        "train_steps": details,
    }
    if "ranks" in parts:
        contenders = {
            "alone": [],
            "ddp": ["--trainer.strategy", "ddp"],
            "read_before_batch": ["--trainer.callbacks+=scaling.ReadBeforeBatch"],
            "read_in_step": ["--trainer.callbacks+=scaling.ReadInStep"],
            "no_progress_bar": ["--trainer.enable_progress_bar", "false"],
            "alone_again": [],
        }
        for name, more in contenders.items():
            trained = train(name, 1, *more)
            steps = trained.get("step_s", [])
            median = round(1000 * statistics.median(steps[WARM_UP:]), 1) if steps else None
            report["ranks"][name] = {"median_ms": median, "step_s": steps, "wait_s": trained.get("wait_s")}
            report["ranks"][name] |= {"failed": trained["failed"]} if "failed" in trained else {}
            save(report, options)
    for part in parts:
        for ranks in (1, 2):
            if part == "ranks" or (shared and ranks == 2 and part in ("train", "validate", "profile")):
                continue
            report[part][ranks] = measured(part, ranks)
            save(report, options)
    if all(isinstance(report.get("losses", {}).get(ranks), list) for ranks in (1, 2)):
        pairs = zip(report["losses"][1], report["losses"][2], strict=True)
        report["largest_difference"] = max(abs(one - two) for one, two in pairs)
    save(report, options)
    print(json.dumps({key: value for key, value in report.items() if key not in ("losses", "train_steps")}, indent=1))


if __name__ == "__main__":
    main()
