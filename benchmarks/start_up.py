"""How long commands take before they do their work, as ratios to ``import lightning``.

    python benchmarks/start_up.py --results benchmarks/results/start_up.json

On a CPU. The commands run in turns, `ROUNDS` times after one round that isn't counted. CPU seconds are user and system
time of the process and vary less than wall time on a machine with other load; the smallest of each is taken.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROUNDS = 3
COMMANDS = {
    "import lightning": ["-c", "import lightning"],
    "--help": ["-m", "idefics_lit", "--help"],
    "fit --help": ["-m", "idefics_lit", "fit", "--help"],
    "unknown option": ["-m", "idefics_lit", "fit", "--model.lrr", "1"],
    "invalid value": ["-m", "idefics_lit", "fit", "--model.lr", "high"],
    "missing config": ["-m", "idefics_lit", "fit", "--config", "missing.yaml"],
    "missing source": ["-m", "idefics_lit", "fit", "--data.source", "missing.csv", "--trainer.accelerator", "cpu"],
    "ask": ["-m", "idefics_lit", "ask", "--model.pretrained", "tiny", "--image", "page.png", "--question", "Title?"],
}


def seconds(arguments: list[str], folder: str) -> tuple[float, float]:
    """Return CPU seconds and wall seconds of a command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (448, 336), "white").save(Path(folder) / "page.png")
        rounds = [
            {name: seconds(command, folder) for name, command in COMMANDS.items()} for _ in range(arguments.rounds + 1)
        ][1:]
    smallest = {name: [min(values) for values in zip(*(r[name] for r in rounds), strict=True)] for name in COMMANDS}
    base_cpu, base_wall = smallest["import lightning"]
    results = {
        name: {
            "CPU seconds": round(cpu, 2),
            "wall seconds": round(wall, 2),
            "CPU ratio": round(cpu / base_cpu, 2),
            "wall ratio": round(wall / base_wall, 2),
        }
        for name, (cpu, wall) in smallest.items()
    }
    results["machine"] = {"cores": os.cpu_count(), "rounds": arguments.rounds, "python": sys.version.split()[0]}
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.results:
        arguments.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
