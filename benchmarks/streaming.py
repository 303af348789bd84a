"""Memory and speed of a stream: 100,000 rows in the form of Docmatix, read once by 2 ranks of 2 workers each.

    python benchmarks/streaming.py --results benchmarks/results/streaming.json

Needs 1.5 GB of disk and no GPU. It writes the rows as 32 parquet files, each row a page of noise with two questions,
and takes turns with the ranks' loaders until all of an epoch is read, every page decoded. Memory is what the process
and its workers hold resident, every 5,000 rows. Loaders that start from the states of the middle have to yield what
these yielded. ``--tiny`` tries all of it with 2,000 rows.
"""

import io
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
from full_size import arguments, save, versions
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from idefics_lit.data.example import Example
from idefics_lit.data.sources.streaming import Stream, find_streams
from idefics_lit.data.streamed_questions import SHUFFLE_WINDOW, StreamedQuestions

RANKS, WORKERS, BATCH, FILES, QUESTIONS = 2, 2, 20, 32, 2


def write(folder: Path, rows: int) -> None:
    """Write the rows, none of whose pages is another's."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({name: datasets.Value("string") for name in ("user", "assistant", "source")}),
        }
    )
    for file in range(FILES):
        written = []
        for row in range(file, rows, FILES):
            page = Image.fromarray(generator.integers(256, size=(96, 128), dtype=np.uint8))
            page.save(png := io.BytesIO(), "PNG", compress_level=0)
            texts = [
                {"user": str(QUESTIONS * row + i), "assistant": "none", "source": "noise"} for i in range(QUESTIONS)
            ]
            written.append({"images": [{"bytes": png.getvalue(), "path": None}], "texts": texts})
        datasets.Dataset.from_list(written, features).to_parquet(folder / f"train-{file:05}-of-{FILES:05}.parquet")


def summary(examples: list[Example]) -> list[tuple[int, int]]:
    """Stand in for the collator: the epoch and the question, of pages that were decoded."""
    assert all(example.images[0].getextrema() for example in examples)
    return [(example.epoch or 0, int(example.question)) for example in examples]


def loader(stream: Stream, rank: int) -> StatefulDataLoader:
    """Return a rank's."""
    part = StreamedQuestions(stream, rank, RANKS, questions_per_page=QUESTIONS)
    return StatefulDataLoader(part, batch_size=BATCH, num_workers=WORKERS, collate_fn=summary)


def resident() -> list[int]:
    """Return what this process and each of its workers hold, in MiB."""
    process = psutil.Process()
    return [round(p.memory_info().rss / 2**20) for p in [process, *process.children()]]


def main() -> None:
    options = arguments(__doc__, "streaming").parse_args()
    rows = 2_000 if options.tiny else 100_000
    datasets.disable_progress_bars()
    data = options.work / f"{rows}_rows"
    if not data.exists():
        write(data, rows)
    stream = find_streams(str(data), None, None, "en")["train"]
    loaders = [loader(stream, rank) for rank in range(RANKS)]
    batches = [iter(some) for some in loaders]
    seen = np.full((rows * QUESTIONS // BATCH, BATCH, 2), -1)  # as large from the beginning
    curve: list[dict[str, Any]] = []

    def done() -> int:
        return int((seen[:, :, 0] >= 0).sum())

    def read(count: int) -> None:
        """Read so many rows on all ranks together, and note what that takes."""
        started, first = time.perf_counter(), done() // BATCH
        for batch in range(first, first + count * QUESTIONS // BATCH):
            seen[batch] = next(batches[batch % RANKS])
        seconds = time.perf_counter() - started
        curve.append({"rows": done() // QUESTIONS, "rows_per_s": round(count / seconds), "mib": resident()})
        print(f"{curve[-1]['rows']:8}  {curve[-1]['rows_per_s']:6}  {curve[-1]['mib']}", flush=True)

    print(f"{'rows':>8}  rows/s  MiB, process and {RANKS * WORKERS} workers")
    for _ in range(10):
        read(rows // 20)
    states, half = [some.state_dict() for some in loaders], len(seen) // 2
    for _ in range(10):
        read(rows // 20)
    resumed = []
    for rank, state in enumerate(states):
        (again := loader(stream, rank)).load_state_dict(state)
        mine = seen[half + rank :: RANKS][:50]
        resumed.append(list(islice(again, len(mine))) == [[tuple(visit) for visit in batch] for batch in mine.tolist()])
    report = {
        "versions": {**versions(), "datasets": version("datasets"), "torchdata": version("torchdata")},
        "rows": rows,
        "bytes": sum(file.stat().st_size for file in data.iterdir()),
        "ranks": RANKS,
        "workers": WORKERS,
        "window": SHUFFLE_WINDOW,
        "questions": done(),
        "different_questions_of_epoch_0": len({number for epoch, number in seen.reshape(-1, 2).tolist() if epoch == 0}),
        "resumed_at_the_right_row": resumed,
        "curve": curve,
    }
    save(report, options)
    print({name: value for name, value in report.items() if name != "curve"})


if __name__ == "__main__":
    main()
