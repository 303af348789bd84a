"""torch's and transformers' own ways to launch fewer kernels, beside this package's CUDA graphs, in one run.

    python benchmarks/alternatives.py --tokenizer tokenizer.model --results benchmarks/results/alternatives.json

Needs one GPU with 80 GB. Full-size model with random weights, dequantized, in bfloat16. Training: forward and backward
of 16 questions on 4 pages. "graphs" is `model.cuda_graphs` with `model.compile`; "compiled" the same without CUDA
graphs; "reduce_overhead" compiles vision tower, connector and text model with
``torch.compile(mode="reduce-overhead")``, whose CUDA graphs torch manages. Answers: 20 new tokens for 64 questions on
16 pages, by this package's decoding, and by ``generate`` with its dynamic cache and with its static cache, which
compiles the decoding step. transformers' continuous batching (``generate_batch``) takes token ids and no images, so it
can't be measured. ``--tiny`` tries it on a CPU.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from full_size import arguments, build, measure, save, versions
from step_parts import CUDA, batch_of, timed
from validation import NEW_TOKENS, generate

from idefics_lit.pretrained import load_processor
from idefics_lit.training.module import Idefics2Module

LIMIT_S = 130  # for each contender


def compile_stages(module: Idefics2Module) -> None:
    """Compile each of the three stages as a whole in the mode "reduce-overhead".

    With one compiled function a layer, the layers' CUDA graphs overwrite each other's results.
    """
    backbone: Any = module.backbone
    for stage in ("_encode_images", "_connect", "_prefill"):
        compiled = torch.compile(getattr(backbone, stage), mode="reduce-overhead" if CUDA else None)
        setattr(backbone, stage, compiled)


def run_step(options: argparse.Namespace) -> dict[str, float]:
    """Time the forward and backward of a training batch."""
    graphs = options.variant == "graphs"
    module = Idefics2Module(
        options.model,
        quantize_vision=False,
        dequantize=True,
        cuda_graphs=graphs,
        compile=options.variant in ("graphs", "compiled"),
    )
    module.configure_model()
    if options.variant == "reduce_overhead":
        compile_stages(module)
    batch = batch_of(load_processor(options.model, image_size=112 if options.tiny else None), 4, 4)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        loss, tokens = module.loss(batch)
        (loss / tokens).backward()
        for parameter in module.parameters():
            parameter.grad = None

    return timed(step, 3 if options.tiny else 20)


def run_answers(options: argparse.Namespace) -> dict[str, float]:
    """Time the answers to a batch."""
    module = Idefics2Module(
        options.model,
        quantize_vision=False,
        dequantize=True,
        cuda_graphs=options.variant == "own",
        max_new_tokens=NEW_TOKENS,
    )
    module.configure_model()
    module.eval()
    processor = load_processor(options.model, image_size=112 if options.tiny else None)
    pages = 2 if options.tiny else 16
    batch = batch_of(processor, pages, 4, train=False, rows_of_one=options.variant != "own")
    answer: Callable[[], Any] = lambda: generate(module.model, processor, batch)  # noqa: E731
    if options.variant == "own":
        answer = lambda: module.generate(batch)  # noqa: E731
    elif options.variant == "static":
        module.model.generation_config.cache_implementation = "static"
    return timed(answer, 1 if options.tiny else 3)


def main() -> None:
    parser = arguments(__doc__, "alternatives")
    parser.add_argument("--contenders", help="only these, with commas")
    for name in ("run", "model", "variant"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:  # the child process that is measured
        times = {"step": run_step, "answers": run_answers}[options.run](options)
        Path(os.environ["STEP_TIMES"]).write_text(json.dumps({"steps": [], "agreement": times}))
        return

    model, _ = build(options)
    contenders = [("step", name) for name in ("graphs", "compiled", "reduce_overhead")]
    contenders += [("answers", name) for name in ("own", "dynamic", "static")]
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "versions": versions(),
        "contenders": {},
    }
    for run, variant in contenders:
        name = f"{run}_{variant}"
        if options.contenders and name not in options.contenders.split(","):
            continue
        command = [sys.executable, __file__, "--run", run, "--variant", variant, "--model", str(model)]
        result = measure(name, command + ["--tiny"] * options.tiny, options.work, LIMIT_S)
        report["contenders"][name] = result.get("agreement") or {"failed": result.get("failed")}
        save(report, options)


if __name__ == "__main__":
    main()
