"""How long the CPU takes to launch a training step: a model as deep as Idefics2-8b, so thin that a GPU waits for it.

    python benchmarks/launches.py --results benchmarks/results/launches.json

The options of a card of 80 GB, 16 questions a step on drawn pages, alone and in DDP with one rank. At full
size the GPU is busy longer than that, unless the process has to wait for it, or shares its core.
"""

import json
import statistics
from typing import Any

import torch
from full_size import GPU_80GB, arguments, build, command, measure, save, versions
from train_throughput import build_data

from idefics_lit.model import tiny

WARM_UP = 60  # shapes that are captured


def main() -> None:
    options = arguments(__doc__, "launches").parse_args()
    if not options.tiny:
        for part, layers in ((tiny.VISION, 27), (tiny.TEXT, 32)):
            part.update(num_hidden_layers=layers, hidden_size=64, intermediate_size=64, num_attention_heads=2)
        tiny.TEXT["num_key_value_heads"] = 2
        tiny.RESAMPLER.update(resampler_depth=3, hidden_size=64, resampler_n_heads=2, num_key_value_heads=2)
    cuda = torch.cuda.is_available()
    options.tiny = True
    model, data = build(options, lambda folder: build_data(folder, tiny=True))
    changed = ["--model.pretrained", model, "--data.source", data, "--data.num_workers", 12 if cuda else 0]
    changed += ["--trainer.limit_val_batches", 0, "--trainer.logger", "false"]
    changed += ["--trainer.callbacks", "full_size.StepTimes", "--model.compile", "false"]
    changed += ["--trainer.max_steps", 200 if cuda else WARM_UP + 2]
    changed += [] if cuda else ["--trainer.precision", "32-true", "--data.image_size", 112]
    report: dict[str, Any] = {"device": torch.cuda.get_device_name() if cuda else "cpu", "versions": versions()}
    report["contenders"] = found = {}
    for name, more in {"alone": [], "ddp": ["--trainer.strategy", "ddp"]}.items():
        result = measure(name, command("fit", ["docvqa.yaml"], *GPU_80GB, *changed, *more), options.work)
        steps = result.get("step_s", [])[WARM_UP:]
        found[name] = (
            {"median_ms": round(1000 * statistics.median(steps), 1)} if steps else {"failed": result["failed"]}
        )
        save(report, options)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
