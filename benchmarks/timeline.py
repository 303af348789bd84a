"""Where the time of a fit goes, from the command to its exit: a timeline of the run's own stages.

    python benchmarks/timeline.py --tokenizer tokenizer.model --results benchmarks/results/timeline.json

It runs ``fit --config configs/docvqa.yaml`` at full size, twice, with the pages of train_throughput.py. torch.compile's
cache is empty at the first run, and holds what that run left at the second. Further flags are the command's, such as
``--model.compile true``. A GPU is waited for after the first, the second and the last step. From the last step on, the
stacks of all threads are written to the log of the run every half second. Needs what full_size.py needs; ``--tiny``
tries it on a CPU.
"""

import faulthandler
import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from typing import Any

import torch
from full_size import REPOSITORY, arguments, build, save, versions
from lightning import Callback

RUNS = 2


def mark(stage: str) -> None:
    """Append the stage that ends now and the time to the file that $TIMELINE names."""
    with open(os.environ["TIMELINE"], "a") as file:
        file.write(json.dumps([stage, time.time()]) + "\n")


def marked(hook: Any, before: str, after: str) -> Any:
    """Return a method that marks the time before and after it calls ``hook``."""

    def call(*given: Any, **named: Any) -> None:
        mark(before)
        hook(*given, **named)
        mark(after)

    return call


class Timeline(Callback):
    """Mark the ends of a fit's stages."""

    def __init__(self) -> None:
        mark("config")
        self.steps = 0

    def on_fit_start(self, *_: Any) -> None:
        mark("strategy")

    def on_sanity_check_start(self, *_: Any) -> None:
        mark("trial of the largest batch")

    def on_sanity_check_end(self, *_: Any) -> None:
        mark("sanity validation")

    def on_train_start(self, *_: Any) -> None:
        mark("training's start")

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.steps == batch_idx == 0:
            mark("first batch")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        names = {1: "first step", 2: "second step", trainer.max_steps: "last step"}
        if self.steps in names:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            mark(names[self.steps])
        if self.steps == trainer.max_steps:
            faulthandler.dump_traceback_later(0.5, repeat=True)

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        self.started = time.time()

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            mark(f"of it validation: {time.time() - self.started:.1f} s")

    def on_train_end(self, *_: Any) -> None:
        mark("training's end")

    def on_fit_end(self, *_: Any) -> None:
        mark("callbacks' ends")

    def teardown(self, *_: Any, **__: Any) -> None:
        mark("fit's end")


def run_marked(typed: list[str]) -> None:
    """Run a command of the package in this process, as ``python -m idefics_lit`` does."""
    gc.disable()  # as __main__.py does while it imports
    from idefics_lit.cli.main import DocVQADataModule, Idefics2Module

    mark("imports")
    DocVQADataModule.setup = marked(DocVQADataModule.setup, "Trainer, loggers", "data")  # type: ignore[method-assign]
    hook = Idefics2Module.configure_model
    Idefics2Module.configure_model = marked(hook, "callbacks' set-up", "weights")  # type: ignore[method-assign]
    sys.argv = ["idefics_lit", *typed]
    try:
        runpy.run_module("idefics_lit", run_name="__main__", alter_sys=True)
    finally:
        mark("command's end")


def main() -> None:
    if sys.argv[1:2] == ["--marked"]:  # the child process that is measured
        run_marked(sys.argv[2:])
        return
    from train_throughput import build_data

    parser = arguments(__doc__, "timeline")
    parser.add_argument("--steps", type=int, default=178)
    parser.add_argument("--runs", type=int, default=RUNS)
    options, flags = parser.parse_known_args()
    work = options.work
    model, data = build(options, lambda folder: build_data(folder, options.tiny))
    typed = ["fit", "--config", REPOSITORY / "configs" / "docvqa.yaml", "--model.pretrained", model]
    typed += ["--data.source", data, "--data.val_split", "test", "--trainer.max_steps", options.steps]
    typed += ["--data.val_every_n_steps", max(1, options.steps // 3), "--trainer.callbacks+=timeline.Timeline"]
    typed += ["--data.image_size", 112, "--data.num_workers", 1] if options.tiny else []
    command = [sys.executable, __file__, "--marked", *map(str, typed), *flags]
    path = os.pathsep.join([str(REPOSITORY / "benchmarks"), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    environment |= {"TIMELINE": str(work / "timeline.jsonl"), "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled")}
    shutil.rmtree(work / "compiled", ignore_errors=True)
    report: dict[str, Any] = {"device": "cpu", "versions": versions(), "command": " ".join(command), "runs": []}
    if torch.cuda.is_available():
        report["device"] = torch.cuda.get_device_name()
    for number in range(options.runs):
        (work / "timeline.jsonl").unlink(missing_ok=True)
        started = time.time()
        with (work / f"timeline_{number}.log").open("w") as log:
            code = subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        marks = [json.loads(line) for line in (work / "timeline.jsonl").read_text().splitlines()]
        marks.append(["exit", time.time()])
        run, last = [], started
        print(f"\nrun {number + 1}, exit code {code}\n{'s after command':>16}{'s of stage':>12}  stage")
        for stage, moment in marks:
            run.append({"stage": stage, "at_s": round(moment - started, 2), "s": round(moment - last, 2)})
            print(f"{moment - started:16.2f}{moment - last:12.2f}  {stage}", flush=True)
            last = moment
        report["runs"].append(run)
        save(report, options)


if __name__ == "__main__":
    main()
