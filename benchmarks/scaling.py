"""One GPU beside two, at full size: training and validation, one run after the other.

    python benchmarks/scaling.py --tokenizer tokenizer.model --results benchmarks/results/scaling.json

``configs/gpu_80gb.yaml`` on the pages of train_throughput.py, without dropout, 32 questions a step: a batch of 16 on
each of two GPUs, or two on one, which see the same questions. Speed is questions a second, all GPUs together. Besides,
how far the losses of the two lie apart, and the ANLS of the reader that comes with the package. Needs two GPUs, and
what full_size.py needs; ``--tiny`` tries it with two CPU processes.
"""

import json
import statistics
from typing import Any

import torch
from full_size import arguments, build, command, measure, save, versions
from train_throughput import build_data

WARM_UP = 28


def main() -> None:
    options = arguments(__doc__, "scaling").parse_args()
    work = options.work
    model, data = build(options, lambda folder: build_data(folder, options.tiny))

    def ours(name: str, devices: int, *more: object) -> list[str]:
        changed = ["--model.pretrained", model, "--data.source", data, "--trainer.devices", devices]
        changed += ["--data.val_split", "train", "--trainer.logger", "false"]
        changed += ["--data.num_workers", 0 if options.tiny else 12]
        changed += ["--data.image_size", 112, "--trainer.precision", "32-true"] if options.tiny else []
        changed += ["--trainer.accelerator", "cpu", "--model.compile", "false"] if options.tiny else []
        return command(name, ["docvqa.yaml", "gpu_80gb.yaml"], *changed, *more)

    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "train": {},
        "validate": {},
        "anls": {},
        "losses": {},
    }
    for devices in (1, 2):
        fixed = ["--trainer.limit_val_batches", 0, "--trainer.callbacks", "full_size.StepTimes"]
        fixed += ["--trainer.accumulate_grad_batches", 2 // devices, "--model.lora.dropout", 0]
        fixed += ["--trainer.max_steps", 34 if options.tiny else 60]
        trained = measure(f"train_{devices}", ours("fit", devices, *fixed), work)
        steps = trained.get("step_s", [])[WARM_UP:]
        report["train"][devices] = round(32 / statistics.median(steps), 2) if steps else trained.get("failed")
        report["losses"][devices] = trained.get("losses")
        callback = ["--trainer.callbacks", "validation.BatchTimes", "--model.max_new_tokens", 20]
        callback += ["--data.eval_batch_size", 16 if options.tiny else 64]
        validated = measure(f"validate_{devices}", ours("validate", devices, *callback), work)
        # What rank 0 measures: its share of the questions in its time.
        rate = validated.get("questions_per_s")
        report["validate"][devices] = round(rate * devices, 2) if rate else validated.get("failed")
        read = ["--model.pretrained", "tiny", "--data.source", "synthetic", "--data.val_split", "validation"]
        measure(f"reader_{devices}", ours("validate", devices, *read), work)
        answers = (work / "val_predictions.jsonl").read_text().splitlines()
        report["anls"][devices] = sum(json.loads(line)["score"] for line in answers) / len(answers)
        save(report, options)
    if report["losses"][1] and report["losses"][2]:
        pairs = zip(report["losses"][1], report["losses"][2], strict=True)
        report["largest_difference"] = max(abs(one - two) for one, two in pairs)
    save(report, options)
    print(json.dumps({key: value for key, value in report.items() if key != "losses"}, indent=1))


if __name__ == "__main__":
    main()
