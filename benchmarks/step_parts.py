"""Where the time of a training step goes: vision tower, and what reads its features, forward and backward.

    python benchmarks/step_parts.py --tokenizer tokenizer.model --results benchmarks/results/step_parts.json

On one GPU, the full-size model with random weights in bfloat16, LoRA with dropout, pages of 14 shapes around
1700 x 2200 px. "cpu" is how long the process takes to launch what the GPU takes "s" for. ``--tiny`` tries it on a CPU.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from full_size import build_model, versions
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from idefics_lit.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.forward import connect, embed, logits, look
from idefics_lit.module import Idefics2Module
from idefics_lit.pretrained import load_processor

CUDA = torch.cuda.is_available()
SIZES = [(1650 + 9 * i, 2200) for i in range(12)] + [(2200, 1700), (1700, 1700)]
QUESTION = "What is the {} amount that the third column of the table gives for the second quarter of the year?"


def batch_of(processor: Any, pages: int, questions: int, shapes: int) -> dict[str, Any]:
    """Make a batch of noise: ``questions`` on each of ``pages`` pages."""
    examples = [
        Example(4 * page + i, QUESTION.format("total " * (i + page % 3)), [image], ["$1,234.56"], page_id=page)
        for page in range(pages)
        for image in [Image.effect_noise(SIZES[page * 5 % len(SIZES) % shapes], 80).convert("RGB")]
        for i in range(questions)
    ]
    batch = Idefics2Collator(processor, train=True)(examples)
    device = "cuda" if CUDA else "cpu"
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


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


class Text(nn.Module):
    """The text model as a function of tensors, as CUDA graphs want it."""

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model

    def forward(self, embeddings: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        result: Tensor = self.text_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return result


@contextmanager
def autocast(cache: bool = True) -> Iterator[None]:
    with torch.autocast("cuda" if CUDA else "cpu", torch.bfloat16, enabled=CUDA, cache_enabled=cache):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/idefics_lit_parts"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    model = options.work / "model"
    if not model.exists():
        options.work.mkdir(parents=True, exist_ok=True)
        if options.tiny:
            from idefics_lit.tiny import build_tiny

            build_tiny(model)
        else:
            build_model(model, options.tokenizer)
            torch.cuda.empty_cache()
    processor = load_processor(str(model), image_size=112 if options.tiny else None)
    repeats = 2 if options.tiny else 10
    batches = {
        "16 questions, 4 pages": batch_of(processor, 4, 4, 14),
        "16 questions, 16 pages": batch_of(processor, 16, 1, 14),
        "64 questions, 16 pages": batch_of(processor, 16, 4, 14),
    }
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "versions": versions(),
        "rows": {name: list(batch["input_ids"].shape) for name, batch in batches.items()},
        "parts": {},
    }

    def note(name: str, run: Callable[[], None], repeats: int = repeats) -> None:
        try:
            report["parts"][name] = timed(run, repeats)
        except Exception as error:
            report["parts"][name] = {"failed": f"{type(error).__name__}: {error}"[:600]}
        print(f"{name:70} {report['parts'][name]}", flush=True)
        if options.results:
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(report, indent=1) + "\n")

    for dequantize, compiled in ((False, False), (True, False), (True, True)):
        variant = f"{'unpacked' if dequantize else 'nf4'}, {'compiled' if compiled else 'eager'}"
        module = Idefics2Module(str(model), quantize_vision=False, dequantize=dequantize, compile=compiled)
        module.configure_model()
        module.feature_cache = None
        features: dict[str, list[Tensor]] = {}
        for name, batch in batches.items():
            images = batch["pixel_values"].flatten(0, 1)
            sizes = [size for row in batch["image_sizes"] for size in row]

            def vision(images: Tensor = images, sizes: Any = sizes, name: str = name) -> None:
                with autocast(), torch.no_grad():
                    features[name] = look(module.model, images, sizes)

            def read(batch: Any = batch, name: str = name, backward: bool = True) -> None:
                module.zero_grad()
                with autocast():
                    states = connect(module.model, features[name])
                    loss, tokens = module.loss(batch, [row.flatten(0, 1) for row in states.split(1)])
                if backward:
                    (loss / tokens).backward()

            def connector(name: str = name) -> None:
                module.zero_grad()
                with autocast():
                    connect(module.model, features[name]).sum().backward()

            if not name.startswith("64"):
                note(f"vision, {name}, {variant}", vision, 5)
                if compiled:
                    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                        with sdpa_kernel([backend, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
                            note(f"vision, {name}, {variant}, {backend.name}", vision, 5)
            else:
                features[name] = features["16 questions, 16 pages"]
            note(f"reading, {name}, {variant}", read)
            note(f"of which connector, {name}, {variant}", connector, 5)
            if compiled and CUDA:
                with autocast(cache=False):
                    states = [row.flatten(0, 1) for row in connect(module.model, features[name]).split(1)]
                    embedded = embed(module.model, batch["input_ids"], states).detach().requires_grad_()
                tokens = batch["input_ids"].shape[1]
                mask, positions = batch["attention_mask"], batch.get("position_ids")
                if positions is None:
                    mask = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril().expand(
                        len(embedded), 1, -1, -1
                    ).contiguous()
                    positions = torch.arange(tokens, device="cuda").expand(len(embedded), -1).contiguous()

                def language(text: nn.Module, batch: Any = batch, name: str = name, m: Any = mask, p: Any = positions) -> None:
                    module.zero_grad()
                    with autocast():
                        states = [row.flatten(0, 1) for row in connect(module.model, features[name]).split(1)]
                        hidden = text(embed(module.model, batch["input_ids"], states), m, p)
                        labelled = batch["labelled"]
                        scores = logits(module.model, hidden.flatten(0, 1)[labelled])
                        loss = nn.functional.cross_entropy(scores.float(), batch["labels"].flatten()[labelled + 1])
                    loss.backward()

                text = Text(module.model.get_base_model().model.text_model)
                note(f"reading, {name}, {variant}, masked", lambda: language(text))
                try:
                    started = time.perf_counter()
                    with autocast(cache=False):
                        graphed = torch.cuda.make_graphed_callables(
                            Text(text.text_model), (embedded, mask, positions), allow_unused_input=True
                        )
                    print(f"captured in {time.perf_counter() - started:.1f} s", flush=True)
                    note(f"reading, {name}, {variant}, text model in a CUDA graph", lambda: language(graphed))
                    del graphed
                except Exception as error:
                    print("capture failed:", type(error).__name__, str(error)[:3000], flush=True)
        if dequantize and CUDA:
            from torch.profiler import ProfilerActivity, profile

            for name in list(batches)[:2]:
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                    batch = batches[name]
                    for _ in range(3):
                        module.zero_grad()
                        with autocast():
                            states = connect(module.model, features[name])
                            loss, tokens = module.loss(batch, [row.flatten(0, 1) for row in states.split(1)])
                        loss.backward()
                    torch.cuda.synchronize()
                table = seen.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=90)
                if options.results:
                    (options.results.parent / f"profile_{variant}_{name}.txt".replace(" ", "_")).write_text(table)
        del module
        features.clear()
        torch.compiler.reset()
        if CUDA:
            torch.cuda.empty_cache()
    if options.tiny:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
