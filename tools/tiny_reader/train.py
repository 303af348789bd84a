"""Trains the package's small reader from nothing: a randomly initialised Idefics2 of 8M parameters learns to read.

    python tools/tiny_reader/train.py --minutes 18.4 --out reader --results reader.json

One GPU and some cores; pages are rendered while it trains. The schedule follows the clock: whatever the machine, the
learning rate has come down to nothing when the time is up. Prints a line every 20 seconds and the held-out table at
the end; `--smoke` runs all of it in about two minutes on a CPU, and learns nothing.
"""

import argparse
import json
import math
import os
import sys
import time
from multiprocessing.pool import Pool
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the renderers are forked
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import clock
import numpy as np
import torch
import transformers
from clock import log
from evaluate import SETS, answer, question_of, render_held_out, table
from forward import difference
from pages_store import PAGE_BYTES, PageStore, shared_arrays, start_pool
from trainer import Scale, Trainer

SMOKE = Scale(
    pages=1024,
    first_pages=256,
    batch=2,
    checked=2,
    held_out=2,
    generate_batch=5,
    log_seconds=5,
    save_seconds=15,
    reserve_seconds=40,
)


def main() -> None:
    """Render, train, save, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=18.4, help="for everything, from start to table")
    parser.add_argument("--out", type=Path, required=True, help="folder for the reader, in the Hub's form")
    parser.add_argument("--results", type=Path, help="JSON file for the held-out table")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    arguments = parser.parse_args()
    scale = SMOKE if arguments.smoke else Scale()

    # The workers are forked, so they come before anything touches the GPU.
    arrays = shared_arrays()
    with start_pool(arrays) as pool:
        run(scale, pool, arrays, arguments.out, arguments.results, clock.START + 60 * arguments.minutes)


def run(scale: Scale, pool: Pool, arrays: dict[str, np.ndarray], out: Path, results: Path | None, end: float) -> None:
    """Train while the pool renders, save the reader to ``out``, print and write the held-out table before ``end``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    log(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, transformers {transformers.__version__}")
    seeds = range(scale.held_out)
    held_out = {kind.name: pool.apply_async(render_held_out, (kind, seeds)) for kind in SETS}
    checked = pool.apply_async(render_held_out, (SETS[0], range(1000, 1000 + scale.checked)))
    room = torch.cuda.mem_get_info()[0] * 0.65 / PAGE_BYTES if device.type == "cuda" else math.inf
    pages = PageStore(int(min(scale.pages, room)), device)
    pages.render(pool, arrays)
    trainer = Trainer(scale, device, out)
    checked_pages = checked.get()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        error = difference(trainer.reader, checked_pages[:6], device)
    log(f"packed forward against transformers': largest difference of a logit {error:.1e}")
    if error > 1e-3:
        raise SystemExit("FAILED: the packed forward is not transformers' forward")
    torch.set_float32_matmul_precision("high")
    while pages.size < min(scale.first_pages, len(pages.on_device["image"]) // 2):
        pages.grow()
        time.sleep(0.01)
    log(f"{pages.size} pages are there, training begins")
    try:
        trainer.train(pages, PageStore.of(checked_pages, device), end - scale.reserve_seconds)
    except (Exception, KeyboardInterrupt) as failure:
        log(f"FAILED after {trainer.steps} steps; what was learned is saved: {failure!r}")
        if trainer.good:
            trainer.loss.load_state_dict(trainer.good)
    trainer.save()
    log(f"saved {out}, {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.2f} MB")

    test_pages = {name: result.get() for name, result in held_out.items()}
    answers = answer(out, test_pages, device, scale.generate_batch, end - 10)
    scores = table(test_pages, answers)
    print(f"{'held-out':36} exact   ANLS  pages")
    for name, score in scores.items():
        print(f"{name:36} {score.exact:.3f}  {score.anls:.3f}  {score.pages:5}")
    for page, text in list(zip(test_pages[SETS[0].name], answers[SETS[0].name], strict=False))[:12]:
        question = question_of(page)
        print(
            f"  {'right' if text in question.answers else 'WRONG'}  {question.text}  {question.answers[0]!r}: {text!r}"
        )
    if results:
        facts = {
            "machine": machine,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "seconds": round(time.monotonic() - clock.START),
            "steps": trainer.steps,
            "pages": pages.rendered,
            "held_out": {name.strip(): score._asdict() for name, score in scores.items()},
        }
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(facts, indent=2) + "\n")
    log("done")


if __name__ == "__main__":
    main()
