"""kill -9 at random moments, each time resumed: the adapter must end as the uninterrupted run's, bit for bit.

    python benchmarks/kills.py --kills 20 --results benchmarks/results/kills.json

A fit of a small model in NF4 on a CPU, with two workers, dropout and accumulation, that saves a checkpoint every step
and is started again with the same command, ``--ckpt_path last``. Every third kill waits for a checkpoint's temporary
file and hits its writing, one in five hits before the first new step.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from idefics_lit.model.tiny import build_tiny

DATA = Path(__file__).resolve().parents[1] / "tests" / "assets" / "docvqa-public-domain"


def command(tiny: Path, steps: int) -> list[str]:
    args: dict[str, Any] = {
        "--model.pretrained": tiny,
        "--model.lr": 1e-2,
        "--model.warmup_steps": 0,
        "--model.max_new_tokens": 2,
        "--data.source": DATA,
        "--data.image_size": 112,
        "--data.limit_train": 10,
        "--data.limit_val": 2,
        "--data.num_workers": 2,
        "--data.batch_size": 2,
        "--data.questions_per_page": 1,
        "--trainer.accelerator": "cpu",
        "--trainer.precision": "32-true",
        "--trainer.accumulate_grad_batches": 2,
        "--trainer.max_steps": steps,
        "--trainer.num_sanity_val_steps": 0,
        "--trainer.check_val_every_n_epoch": 5,
        "--trainer.enable_progress_bar": "false",
        "--trainer.callbacks+": "ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps": 1,
        "--trainer.callbacks.filename": "{step}",
    }
    options = [f"{name}={value}" for name, value in args.items()]
    return [sys.executable, "-m", "idefics_lit", "fit", *options, "--ckpt_path", "last"]


def newest(folder: Path) -> Path | None:
    found = sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1] if found else None


def unfinished(folder: Path) -> set[Path]:
    return set(folder.rglob("*.tmp"))


def steps_of(checkpoint: Path | None) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint else 0


def kill(folder: Path, args: list[str], moment: str, chance: random.Random) -> dict[str, Any] | None:
    """Start, kill, and say where; None where the fit ended first."""
    before, left = newest(folder), unfinished(folder)
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(args, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        started = time.monotonic()
        if moment == "starting":
            time.sleep(chance.uniform(0, 8))
        else:
            while newest(folder) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 2))
            while moment == "writing" and process.poll() is None and not unfinished(folder) - left:
                pass
        if process.poll() is not None:
            assert process.returncode == 0, (folder / "log").read_text()
            return None
        os.killpg(process.pid, signal.SIGKILL)
        seconds = time.monotonic() - started
        process.wait()
    return {
        "moment": moment,
        "seconds": round(seconds, 2),
        "steps saved": steps_of(newest(folder)),
        "left unfinished": len(unfinished(folder) - left),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of the fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as work:
        tiny = build_tiny(Path(work, "model"))
        whole, killed = Path(work, "whole"), Path(work, "killed")
        for folder in (whole, killed):
            folder.mkdir()
        args = command(tiny, options.steps)
        subprocess.run(args, cwd=whole, check=True, capture_output=True)
        chance = random.Random(options.seed)
        kills = []
        while len(kills) < options.kills:
            number = len(kills)
            moment = "starting" if number % 5 == 4 else "writing" if number % 3 == 1 else "training"
            done = kill(killed, args, moment, chance)
            if done is None:
                raise SystemExit(f"the fit ended after {number} kills: give more --steps")
            kills.append(done)
            print(json.dumps(done), flush=True)
        subprocess.run(args, cwd=killed, check=True, capture_output=True)
        ends = [torch.load(newest(folder), weights_only=True) for folder in (whole, killed)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == options.steps
    same = all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())
    result = {
        "command": " ".join(["python benchmarks/kills.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "kills": len(kills),
        "steps": options.steps,
        "in the middle of a write": sum(done["left unfinished"] for done in kills),
        "same bits": same,
        "each": kills,
    }
    print(json.dumps({name: value for name, value in result.items() if name != "each"}, indent=2))
    if options.results:
        options.results.write_text(json.dumps(result, indent=2) + "\n")
    if not same:
        raise SystemExit("the adapters differ")


if __name__ == "__main__":
    main()
