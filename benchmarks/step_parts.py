"""Where the time of a training step goes: vision tower, and what reads its features, forward and backward.

    python benchmarks/step_parts.py --tokenizer tokenizer.model --results benchmarks/results/step_parts.json

On one GPU, the full-size model with random weights in bfloat16, LoRA with dropout, pages of 14 shapes around
1700 x 2200 px, launched kernel by kernel and as CUDA graphs. "cpu" is how long the process takes to launch what the GPU
takes "s" for. Printed besides: where the process waits for the GPU, and the kernels that take the most time.
``--tiny`` tries it on a CPU.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from full_size import arguments, build, save, versions
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_throughput import SIZES

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.model.batch import Batch
from idefics_lit.model.idefics2 import Idefics2Backbone
from idefics_lit.pretrained import load_processor
from idefics_lit.training.module import Idefics2Module

CUDA = torch.cuda.is_available()
QUESTION = "What is the {} amount that the third column of the table gives for the second quarter of the year?"


def batch_of(processor: Any, pages: int, questions: int, *, train: bool = True, rows_of_one: bool = False) -> Batch:
    """Return a batch with ``questions`` about each of ``pages`` pages of noise; ``rows_of_one`` packs none of them."""
    examples = [
        Example(
            4 * page + i,
            QUESTION.format("total " * (i + page % 3)),
            [image],
            ["$1,234.56"],
            page_id=None if rows_of_one else page,
        )
        for page in range(pages)
        for image in [Image.effect_noise(SIZES[page * 5 % len(SIZES)], 80).convert("RGB")]
        for i in range(questions)
    ]
    batch = Idefics2Collator(processor, train=train)(examples)
    device = "cuda" if CUDA else "cpu"
    return batch.to(device)


def timed(run: Callable[[], None], repeats: int) -> dict[str, float]:
    """Median seconds of a run, on the device and of launching it; the first run's; peak memory."""
    walls, launches = [], []
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 2):
        started = time.perf_counter()
        run()
        launched = time.perf_counter()
        if CUDA:
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - started)
        launches.append(launched - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    return {
        "s": round(statistics.median(walls[2:]), 4),
        "cpu": round(statistics.median(launches[2:]), 4),
        "first_s": round(walls[0], 1),
        "second_s": round(walls[1], 1),
        "peak_gib": round(peak, 1),
    }


def kernels(run: Callable[[], None], repeats: int = 3) -> list[str]:
    """The kernels that take the most time, milliseconds and calls a run."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    found = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in found) / 1000 / repeats
    lines = [f"{total:8.2f} ms all kernels, {sum(event.count for event in found) // repeats} launches"]
    for event in found[:16]:
        lines.append(
            f"{event.self_device_time_total / 1000 / repeats:8.2f} ms {event.count // repeats:5} {event.key[:110]}"
        )
    return lines


def waits(run: Callable[[], None]) -> list[str]:
    """Where the process waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{w.filename.rsplit('site-packages/', 1)[-1]}:{w.lineno} {str(w.message)[:90]}" for w in caught})


def measure_parts(module: Idefics2Module, batches: dict[str, Any], variant: str, note: Callable[..., None]) -> None:
    features: dict[str, list[Tensor]] = {}
    for graphs in (False, True)[: 1 + CUDA]:
        module.backbone = Idefics2Backbone(module.model, graphs=graphs)
        for name, batch in batches.items():
            how = f"{name}, {variant}{', graphs' if graphs else ''}"
            images = list(batch.pixel_values.flatten(0, 1))
            sizes = [size for row in batch.image_sizes for size in row]

            def vision(images: Any = images, sizes: Any = sizes, name: str = name) -> None:
                with torch.no_grad():
                    features[name] = module.backbone.encode_images(images, sizes, [""] * len(sizes))

            def connector(name: str = name) -> None:
                module.zero_grad()
                states = module.backbone.connect(features[name])
                states.sum().backward()

            def read(batch: Any = batch, name: str = name) -> None:
                module.zero_grad()
                states = module.backbone.connect(features[name])
                loss, tokens = module.backbone.loss(batch, module.backbone.prefill(batch, list(states)))
                (loss / tokens).backward()

            if name.startswith("64"):
                features[name] = features["16 questions, 16 pages"]
                parts = [read]
            else:
                parts = [vision, connector, read]
            for part in parts:
                note(f"{part.__name__}, {how}", part)
                if CUDA and variant == "unpacked":
                    print(waits(part) if not graphs else "\n".join(kernels(part)), flush=True)
    if CUDA and variant == "unpacked":
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel([backend, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
                module.backbone = Idefics2Backbone(module.model, graphs=True)
                images = [batches["16 questions, 16 pages"].pixel_values[0, 0]] * 8

                def alike(images: Any = images) -> None:
                    with torch.no_grad():
                        module.backbone.encode_images(images, [images[0].shape[1:]] * 8, [""] * 8)

                note(f"vision, 8 pages of one shape, {variant}, graphs, {backend.name}", alike)
                print("\n".join(kernels(alike)[:8]), flush=True)


def main() -> None:
    options = arguments(__doc__, "parts").parse_args()
    model, _ = build(options)
    processor = load_processor(str(model), image_size=112 if options.tiny else None)
    repeats = 2 if options.tiny else 10
    batches = {
        "16 questions, 4 pages": batch_of(processor, 4, 4),
        "16 questions, 16 pages": batch_of(processor, 16, 1),
        "64 questions, 16 pages": batch_of(processor, 16, 4),
    }
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "versions": versions(),
        "rows": {name: list(batch.input_ids.shape) for name, batch in batches.items()},
        "parts": {},
    }

    def note(name: str, run: Callable[[], None]) -> None:
        try:
            report["parts"][name] = timed(run, repeats)
        except Exception as error:
            report["parts"][name] = {"failed": f"{type(error).__name__}: {error}"[:600]}
        print(f"{name:70} {report['parts'][name]}", flush=True)
        save(report, options)

    for dequantize in (True, False):
        variant = "unpacked" if dequantize else "nf4"
        module = Idefics2Module(str(model), dequantize=dequantize, compile=True)
        module.configure_model()
        measure_parts(module, dict(list(batches.items())[: 3 if dequantize else 1]), variant, note)
        del module
        torch.compiler.reset()
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
