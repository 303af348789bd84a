"""Training speed at full size: transformers' Trainer beside `python -m idefics_lit fit`, one process each, in one run.

    python benchmarks/train_throughput.py --tokenizer tokenizer.model --results benchmarks/results/train_throughput.json

Every contender trains on the same 640 questions, four on each of 160 pages of 14 shapes around 1700 x 2200 px, with 16
questions a step (64 where its name says so) and 12 loader workers, in float16. Seconds are from step to step, loading
included, the first steps (compiling; for the feature cache the first epoch) left out. See full_size.py for what it
needs; ``--tiny`` tries it on a CPU.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from full_size import REPOSITORY, build_model, measure, versions

SIZES = [(1650 + 9 * i, 2200) for i in range(12)] + [(2200, 1700), (1700, 1700)]  # one page in seven is no portrait
WARM_UP = 8


def build_data(folder: Path, tiny: bool) -> None:
    """Write 160 pages with four training questions each, and 8 with four test questions, in the official form."""
    from multiprocessing.pool import ThreadPool

    from PIL import Image

    from idefics_lit.data.synthetic import SyntheticPages, write_docvqa

    for split, pages in (("train", 190), ("test", 12)):
        file = write_docvqa(SyntheticPages(split, pages), folder)
        content = json.loads(file.read_text())
        by_page: dict[str, list[Any]] = {}
        for row in content["data"]:
            by_page.setdefault(row["image"], []).append(row)
        full = [rows[:4] for rows in by_page.values() if len(rows) >= 4][: 160 if split == "train" else 8]
        assert len(full) == (160 if split == "train" else 8)
        content["data"] = [row for rows in full for row in rows]
        file.write_text(json.dumps(content))

    def enlarge(numbered: tuple[int, Path]) -> None:
        number, page = numbered
        Image.open(page).resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC).save(page)

    if not tiny:
        with ThreadPool() as pool:
            pool.map(enlarge, list(enumerate(sorted((folder / "documents").iterdir()))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/idefics_lit_throughput"))
    parser.add_argument("--minutes", type=float, default=60, help="begin no contender later than that")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    started, work = time.perf_counter(), options.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model, data = work / "model", work / "data"
    if options.tiny:
        from idefics_lit.tiny import build_tiny

        build_tiny(model)
    else:
        build_model(model, options.tokenizer)
        torch.cuda.empty_cache()
    build_data(data, options.tiny)
    print(f"model and data built in {time.perf_counter() - started:.0f} s", flush=True)

    def trainer(batch: int, workers: int, steps: int) -> list[str]:
        arguments = ["--model", model, "--data", data, "--work", work, "--batch", batch, "--workers", workers]
        script = REPOSITORY / "benchmarks" / "full_size.py"
        return [sys.executable, str(script), *map(str, arguments), "--steps", str(steps)]

    def ours(questions_per_page: int, *more: object, batch: int = 16, steps: int = 32) -> list[str]:
        config = ["--config", REPOSITORY / "configs" / "docvqa.yaml", "--config", REPOSITORY / "configs" / "fast.yaml"]
        changed = ["--model.pretrained", model, "--data.source", data, "--data.batch_size", batch]
        changed += ["--data.questions_per_page", questions_per_page, "--data.num_workers", 0 if options.tiny else 12]
        changed += ["--trainer.precision", "32-true" if options.tiny else "16-mixed", "--trainer.max_steps", steps]
        changed += ["--trainer.limit_val_batches", 0, "--trainer.logger", "false"]
        changed += ["--trainer.callbacks", "full_size.StepTimes"]
        changed += ["--data.image_size", 112] if options.tiny else []
        return [sys.executable, "-m", "idefics_lit", "fit", *map(str, [*config, *changed, *more])]

    eager, cached = ["--model.compile", "false"], ["--model.feature_cache", "memory"]
    epoch = 640 // 16  # what comes after it finds its pages in the cache
    contenders = {  # the command, questions a step, steps that don't count
        "trainer": (trainer(16, 12, 20), 16, WARM_UP),
        "packed_first": (ours(4), 16, WARM_UP),
        "packed_cached": (ours(4, *cached, steps=epoch + 20), 16, epoch),
        "uncached": (ours(1), 16, WARM_UP),
        "cached": (ours(1, *cached, steps=epoch + 20), 16, epoch),
        "packed_first_64": (ours(4, batch=64, steps=18), 64, WARM_UP),
        "uncached_eager": (ours(1, *eager, steps=20), 16, WARM_UP),
        "packed_first_eager": (ours(4, *eager, steps=20), 16, WARM_UP),
        "recipe": (trainer(2, 0, 14), 16, WARM_UP),
    }
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "contenders": {},
    }
    for name, (command, batch, warm_up) in contenders.items():
        if time.perf_counter() - started > 60 * options.minutes:
            print(f"no time left for {name}", flush=True)
            continue
        result = measure(name, command, work)
        steps = result.get("step_s", [])[warm_up:]
        report["contenders"][name] = {
            "questions_per_s": round(batch / statistics.median(steps), 2) if steps else None,
            "step_s": result.get("step_s"),
            "peak_gib": result.get("peak_gib"),
            "batch": batch,
            "losses": result.get("losses"),
            **({"failed": result["failed"]} if "failed" in result else {}),
        }
        if options.results:
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(report, indent=1).replace(str(work), "WORK") + "\n")
    print(f"\n{report['device']}, {report['versions']}\n{'':20} questions/s  peak GiB")
    for name, result in report["contenders"].items():
        speed, peak = result["questions_per_s"], result["peak_gib"]
        print(f"{name:20} {speed!s:>11}  {f'{peak:.1f}' if peak else ''}  {'FAILED' if 'failed' in result else ''}")


if __name__ == "__main__":
    main()
