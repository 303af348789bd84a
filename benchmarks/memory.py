"""Peak GPU memory of training at full size: by batch, image splitting, checkpointing and how the weights are held.

    python benchmarks/memory.py --tokenizer tokenizer.model --results benchmarks/results/memory.json

Each line is two steps, forward, backward and AdamW, on pages of 1700 x 2200 px, one question a page unless "4 a page",
in 16-mixed. Needs what full_size.py needs.
"""

import gc
from typing import Any

import torch
from full_size import arguments, build, save, versions
from lightning import Trainer
from PIL import Image

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.pretrained import load_processor
from idefics_lit.training.module import Idefics2Module

QUESTION = "What is the total amount that the third column of the table gives for the second quarter of the year?"
HELD = {
    "4 bits": {"quantize_vision": True},
    "4 bits, checkpointing": {"quantize_vision": True, "gradient_checkpointing": True},
    "4 bits, vision in 16": {},
    "4 bits, graphs": {"quantize_vision": True, "cuda_graphs": True},
    "4 bits, vision in 16, graphs": {"cuda_graphs": True},
    "16 bits, graphs": {"dequantize": True, "cuda_graphs": True},
}


def peak(module: Idefics2Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> float | None:
    """Train two steps; return GiB, or None where memory doesn't suffice."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(2):
            with torch.autocast("cuda", torch.float16):
                loss, tokens = module.loss(batch)
            (loss / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    except torch.cuda.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    options = arguments(__doc__, "memory").parse_args()
    model, _ = build(options)
    page = Image.effect_noise((1700, 2200), 80).convert("RGB")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": versions(), "peak_gib": {}}
    for held, given in HELD.items():
        module = Idefics2Module(str(model), **{"dequantize": False, **given})  # type: ignore[arg-type]
        module.trainer = Trainer(precision="16-mixed", logger=False, enable_checkpointing=False)
        module.configure_model()
        optimizer = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
        report["peak_gib"][held] = {}
        for splitting in (False, True):
            collate = Idefics2Collator(
                load_processor(str(model), image_splitting=splitting), train=True, pixel_dtype=torch.float16
            )
            for size, on_a_page in ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 4), (16, 4)):
                batch = collate([Example(i, QUESTION, [page], ["$12.00"], page_id=i // on_a_page) for i in range(size)])
                batch = module.transfer_batch_to_device(batch, module.model.device, 0)
                name = f"{'splitting, ' if splitting else ''}{size}{', 4 a page' if on_a_page > 1 else ''}"
                found = peak(module, optimizer, batch)
                report["peak_gib"][held][name] = found and round(found, 1)
                print(f"{held:24} {name:24} {report['peak_gib'][held][name]}", flush=True)
                if found is None:
                    optimizer.zero_grad()
        del module, optimizer
        gc.collect()
        torch.compiler.reset()
        save(report, options)


if __name__ == "__main__":
    main()
