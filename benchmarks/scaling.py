"""One GPU beside two, at full size: training and validation, and what being one of several ranks costs a step.

    python benchmarks/scaling.py --tokenizer tokenizer.model --results benchmarks/results/scaling.json

``configs/gpu_80gb.yaml`` on the pages of train_throughput.py, without dropout. Speed is questions a second, all GPUs
together, 16 questions a batch on each. "losses" are of steps of 32 questions, a batch on each of two GPUs or two on
one, which see the same questions; "anls" is the score of the reader that comes with the package.

"ranks" takes one GPU: a step as it is, in DDP, with the GPU read before every batch as Lightning does for several
ranks, and with the two more times a step that its ``strategy.reduce`` reads it; and without the progress bar, which
reads it once a second.

Needs what full_size.py needs, and two GPUs for the speed of two. Where there is one, two ranks share it, for losses and
scores alone. ``--tiny`` tries it with CPU processes.
"""

import json
import statistics
from typing import Any

import torch
from full_size import arguments, build, command, devices, measure, save, versions
from lightning import Callback
from train_throughput import build_data

WARM_UP = 28
STEPS = 68


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
    parser.add_argument("--parts", default="ranks,train,losses,validate,anls", help="only these, with commas")
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
        return command(name, ["docvqa.yaml", "gpu_80gb.yaml"], *changed, *more)

    def train(name: str, ranks: int, *more: object, steps: int = STEPS) -> dict[str, Any]:
        fixed = ["--trainer.limit_val_batches", 0, "--model.lora.dropout", 0]
        fixed += ["--trainer.max_steps", WARM_UP + 2 if options.tiny else steps]
        fixed += ["--trainer.callbacks", "full_size.StepTimes"]
        return measure(name, ours("fit", ranks, *fixed, *more), work)

    def rate(trained: dict[str, Any], questions: int) -> Any:
        steps = trained.get("step_s", [])[WARM_UP:]
        return round(questions / statistics.median(steps), 2) if steps else trained.get("failed")

    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "devices": max(torch.cuda.device_count(), 1),
        "versions": versions(),
        **{part: {} for part in parts},
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
    for ranks in (1, 2):
        if "train" in parts and not (shared and ranks == 2):
            report["train"][ranks] = rate(train(f"train_{ranks}", ranks), 16 * ranks)
        if "losses" in parts:
            trained = train(f"losses_{ranks}", ranks, "--trainer.accumulate_grad_batches", 2 // ranks, steps=40)
            report["losses"][ranks] = trained.get("losses") or trained.get("failed")
        if "validate" in parts and not (shared and ranks == 2):
            callback = ["--trainer.callbacks", "validation.BatchTimes", "--model.max_new_tokens", 20]
            callback += ["--data.eval_batch_size", 16 if options.tiny else 64]
            validated = measure(f"validate_{ranks}", ours("validate", ranks, *callback), work)
            # What rank 0 measures: its share of the questions in its time.
            speed = validated.get("questions_per_s")
            report["validate"][ranks] = round(speed * ranks, 2) if speed else validated.get("failed")
        if "anls" in parts:
            read = ["--model.pretrained", "tiny", "--data.source", "synthetic", "--data.val_split", "validation"]
            measure(f"reader_{ranks}", ours("validate", ranks, *read), work)
            answers = (work / "val_predictions.jsonl").read_text().splitlines()
            report["anls"][ranks] = sum(json.loads(line)["score"] for line in answers) / len(answers)
        save(report, options)
    if all(isinstance(report.get("losses", {}).get(ranks), list) for ranks in (1, 2)):
        pairs = zip(report["losses"][1], report["losses"][2], strict=True)
        report["largest_difference"] = max(abs(one - two) for one, two in pairs)
    save(report, options)
    print(json.dumps({key: value for key, value in report.items() if key != "losses"}, indent=1))


if __name__ == "__main__":
    main()
