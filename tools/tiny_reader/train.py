"""Train the package's small reader from scratch: a randomly initialized Idefics2 with 8M parameters.

    python tools/tiny_reader/train.py --minutes 18.4 --out reader --results reader.json

It uses one GPU and all CPU cores, which render pages during training. The learning rate is a function of the elapsed
time and decays to zero at the end, on any machine. Progress is printed every 20 seconds, and the held-out scores at the
end. `--smoke` runs everything with tiny sizes in about two minutes on a CPU.
"""

import argparse
import json
import math
import os
import sys
import time
from multiprocessing.pool import Pool
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the rendering workers are forked
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import clock
import numpy as np
import torch
import transformers
from clock import log
from evaluate import SETS, answer, question_of, render_held_out, table
from forward import largest_difference
from pages_store import PAGE_BYTES, PageStore, shared_arrays, start_pool
from trainer import Scale, Trainer

SMOKE = Scale(
    pages=1024,
    first_pages=256,
    batch=2,
    monitored=2,
    held_out=2,
    generate_batch=5,
    log_seconds=5,
    save_seconds=15,
    reserve_seconds=40,
)


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=18.4, help="time limit of the whole run, evaluation included")
    parser.add_argument("--out", type=Path, required=True, help="folder to save the reader to")
    parser.add_argument("--results", type=Path, help="JSON file to write the held-out scores to")
    parser.add_argument("--smoke", action="store_true", help="test run with tiny sizes")
    arguments = parser.parse_args()
    scale = SMOKE if arguments.smoke else Scale()

    # Workers must be forked before CUDA is initialized.
    arrays = shared_arrays()
    with start_pool(arrays) as pool:
        run(scale, pool, arrays, arguments.out, arguments.results, clock.START + 60 * arguments.minutes)


def run(scale: Scale, pool: Pool, arrays: dict[str, np.ndarray], out: Path, results: Path | None, end: float) -> None:
    """Train while the pool renders, save the reader to ``out``, and write the held-out scores before ``end``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    log(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, transformers {transformers.__version__}")
    seeds = range(scale.held_out)
    held_out = {pages.name: pool.apply_async(render_held_out, (pages, seeds)) for pages in SETS}
    monitored = pool.apply_async(render_held_out, (SETS[0], range(1000, 1000 + scale.monitored)))
    capacity = torch.cuda.mem_get_info()[0] * 0.65 / PAGE_BYTES if device.type == "cuda" else math.inf
    pages = PageStore(int(min(scale.pages, capacity)), device)
    pages.render(pool, arrays)
    trainer = Trainer(scale, device, out)
    monitored_pages = monitored.get()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        error = largest_difference(trainer.reader, monitored_pages[:6], device)
    log(f"packed forward and transformers' forward: largest difference of logits {error:.1e}")
    if error > 1e-3:
        raise SystemExit("FAILED: the packed forward differs from transformers' forward")
    torch.set_float32_matmul_precision("high")
    while pages.size < min(scale.first_pages, len(pages.on_device["image"]) // 2):
        pages.grow()
        time.sleep(0.01)
    log(f"{pages.size} pages are rendered, training starts")
    try:
        trainer.train(pages, PageStore.of(monitored_pages, device), end - scale.reserve_seconds)
    except (Exception, KeyboardInterrupt) as failure:
        log(f"FAILED after {trainer.steps} steps; saving the last good weights: {failure!r}")
        if trainer.finite_weights:
            trainer.loss.load_state_dict(trainer.finite_weights)
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
