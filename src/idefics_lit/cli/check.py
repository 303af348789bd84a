"""The command `check`: what a fit would meet in its data and take of the machine, on the screen.

Figures are measured in the run itself, counted, or cited with where they were measured.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import Trainer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from idefics_lit.cli.estimates import RATES, load_config, measured_model, peak_gib, weights_gib
from idefics_lit.cli.survey import Batch, Split, first_epoch, read_split
from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.pretrained import DTYPES
from idefics_lit.training.run_folder import run_folder

if TYPE_CHECKING:
    from idefics_lit.training.module import Idefics2Module

NAMES = {"train": "training", "val": "validation"}
SHOWN = 3  # broken rows, ids and pages on the screen
EXAMPLES = 5  # questions of each split whose texts are
UP_TO = (1, 2, 4, 8, 16, 32, 64)  # tokens of an answer


def check(trainer: Trainer, model: "Idefics2Module", datamodule: DocVQADataModule) -> None:
    """Read what `fit` would train and validate on and print what it would meet. See `DocVQATrainer.check`.

    Raises:
        InputError: when a split can't be opened at all.
        SystemExit: with code 1 when there are broken rows that would end a fit.
    """
    if not trainer.is_global_zero:
        return
    datamodule.trainer = trainer
    datamodule.hparams.val_in_fit = None  # a fit scores the others when it ends
    datamodule.open("fit")
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=trainer.progress_bar_callback is None) as bar:
        splits = {
            name: read_split(datamodule, name, _advance(bar, name, len(examples)))
            for name, examples in datamodule.examples.items()
        }
    for name, split in splits.items():
        _show_texts(console, f"{NAMES[name]} questions", split, datamodule.collator(name))
    for table in (_data(splits, model, datamodule), _answers(splits), _types(splits)):
        if table.row_count:
            console.print(table, "")
    for line in _notes(splits, model.hparams["max_new_tokens"]):
        console.print(escape(line), soft_wrap=True)
    console.print(_fit(splits, trainer, model, datamodule))
    lines = [line for split in splits.values() for line in split.broken.values()]
    if lines:
        _tell_broken(console, splits, lines, run_folder(trainer) / "check.txt")
    if lines and datamodule.hparams.on_bad_example == "raise":
        print(
            f"broken rows: {len(lines)}; mend them, or leave them out with --data.on_bad_example skip", file=sys.stderr
        )
        raise SystemExit(1)


def _advance(bar: Progress, name: str, total: int) -> Callable[[int], None]:
    task = bar.add_task(f"Reading {NAMES[name]} questions", total=total)
    return lambda questions: bar.advance(task, questions)


def _show_texts(console: Console, title: str, split: Split, collator: Idefics2Collator) -> None:
    """A few questions spread over a split, in full and in Python's notation: what is wrong with texts is seen here."""
    good = list(split.good)
    shown = dict.fromkeys(good[place * len(good) // EXAMPLES] for place in range(EXAMPLES) if good)
    if shown:
        console.print(f"{title}, as the model gets them", style="bold")
    for row in shown:
        example = split.examples[row]
        texts = {
            "id": repr(example.question_id),
            "prompt": repr(collator.prompt(example)),
            "answers": ", ".join(map(repr, example.answers)),
        }
        console.print(escape(split.examples.source(row)), soft_wrap=True)
        for name, text in texts.items():
            console.print(f"  {name:<9}{escape(text)}", soft_wrap=True)
    console.print("")


def _data(splits: Mapping[str, Split], model: "Idefics2Module", datamodule: DocVQADataModule) -> Table:
    """Counts, lengths and sizes of each split."""
    table = _by_split("questions and pages", splits)
    most = model.hparams["max_new_tokens"]
    images = datamodule.processor.image_processor
    edge = images.size["longest_edge"] * (2 if images.do_image_splitting else 1)
    good = [list(split.good.values()) for split in splits.values()]
    pages = [len(set(split.examples.page_ids)) for split in splits.values()]
    sizes = [split.sizes for split in splits.values()]

    def row(name: str, cells: Sequence[object]) -> None:
        table.add_row(name, *(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells))

    row("questions", [len(split.examples) for split in splits.values()])
    row("pages", pages)
    questions = zip(splits.values(), pages, strict=True)
    row("questions a page", [f"{len(split.examples) / number:.1f}" for split, number in questions])
    row("broken rows", [len(split.broken) for split in splits.values()])
    row("ids that occur twice", [len(split.repeated) for split in splits.values()])
    table.add_row()
    row("", ["min / median / 95% / max"] * len(splits))
    row("tokens in all", [_spread([q.length for q in some]) for some in good])
    row("tokens of an answer", [_spread([n for q in some for n in q.answers]) for some in good])
    row(f"beyond max_new_tokens {most}", [sum(min(q.answers) > most for q in some) for some in good])
    table.add_row()
    for name, share in (("smallest", 0.0), ("median", 0.5), ("largest", 1.0)):
        by_area = [sorted(some, key=lambda size: size[0] * size[1]) for some in sizes]
        row(f"{name} page, pixels", ["{} x {}".format(*_at(some, share)) if some else "" for some in by_area])
    row(f"pages scaled down to {edge}", [sum(max(size) > edge for size in some) for some in sizes])
    return table


def _answers(splits: Mapping[str, Split]) -> Table:
    """How many answers are how long."""
    table = _by_split("accepted answers of so many tokens", splits)
    lengths = [Counter(n for q in split.good.values() for n in q.answers) for split in splits.values()]
    for least, most in zip((0, *UP_TO), (*UP_TO, sys.maxsize), strict=True):
        counts = [sum(count for n, count in some.items() if least < n <= most) for some in lengths]
        if any(counts):
            name = f"more than {least}" if most == sys.maxsize else f"{least + 1} to {most}" if most > 2 else f"{most}"
            table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _types(splits: Mapping[str, Split]) -> Table:
    """The types of question, the most frequent first."""
    table = _by_split("questions of the type", splits)
    counts = [Counter(kind for q in split.good.values() for kind in q.types) for split in splits.values()]
    for kind, _ in sum(counts, Counter()).most_common():
        table.add_row(escape(kind), *(f"{some[kind]:,}" for some in counts))
    return table


def _notes(splits: Mapping[str, Split], max_new_tokens: int) -> Iterator[str]:
    """What no fit would stop at."""
    if beyond := sum(min(q.answers) > max_new_tokens for q in splits["val"].good.values()):
        yield (
            f"validation questions that can't be answered in full, since no accepted answer fits in "
            f"model.max_new_tokens {max_new_tokens}: {beyond}\n"
        )
    for name, split in splits.items():
        if split.repeated:
            yield f"{NAMES[name]} ids that occur twice: {_some(split.repeated)}\n"
    trained_on = splits["train"].pages if "train" in splits else {}
    if shared := sorted(row for page, row in splits["val"].pages.items() if page in trained_on):
        lines = "\n  ".join(map(splits["val"].examples.source, list(dict.fromkeys(shared))[:SHOWN]))
        yield f"validation pages that are trained on too, by their pixels: {len(shared)}, such as that of\n  {lines}\n"


def _tell_broken(console: Console, splits: Mapping[str, Split], lines: Sequence[str], file: Path) -> None:
    kinds = {name: split.kinds for name, split in splits.items()}
    table = _by_split("broken rows", splits)
    for kind, _ in sum(kinds.values(), Counter()).most_common():
        table.add_row(escape(kind), *(f"{some[kind]:,}" for some in kinds.values()))
    console.print("", table)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for line in lines[:SHOWN]:
        console.print(f"  {escape(line)}", soft_wrap=True)
    console.print(f"all {len(lines)} lines: {file}", soft_wrap=True)


def _fit(splits: Mapping[str, Split], trainer: Trainer, model: "Idefics2Module", datamodule: DocVQADataModule) -> Table:
    """What a fit comes to."""
    table = Table("a fit", "", box=None, padding=(0, 2, 0, 0), header_style="bold")
    seconds, groups = (sum(getattr(split, name) for split in splits.values()) for name in ("seconds", "groups"))
    rate = groups / seconds
    workers = datamodule.num_workers
    table.add_row(
        "the loader here",
        f"{rate:,.1f} pages/s with their questions, {workers} worker{'s' * (workers != 1)}, starting included",
    )
    if "train" not in splits:
        table.add_row("training", f"a stream, not read: {trainer.max_steps:,} steps")
        return table
    batches = first_epoch(splits["train"], datamodule.hparams, trainer.world_size)
    if not batches:
        table.add_row("training", "no question is left to train on")
        return table
    limit = trainer.limit_train_batches
    used = batches[: limit if isinstance(limit, int) else int(len(batches) * limit)] or batches[:1]
    steps = ceil(len(used) / trainer.accumulate_grad_batches)
    ends = [trainer.max_steps / steps] if trainer.max_steps >= 0 else []
    ends += [trainer.max_epochs] if trainer.max_epochs is not None and trainer.max_epochs >= 0 else []
    epochs = min(ends, default=1000 if trainer.max_epochs is None else 1)  # Lightning's default; one of endless ones
    asked = round(epochs * sum(batch.questions for batch in used) * trainer.world_size)
    table.add_row("steps", f"{ceil(epochs * steps):,}, of {steps:,} an epoch: {epochs:,.2f} epochs")
    table.add_row("questions", f"{asked:,} seen on {trainer.world_size} device{'s' * (trainer.world_size > 1)}")
    padding = 1 - sum(batch.tokens for batch in used) / sum(batch.padded for batch in used)
    table.add_row("padding", f"{padding:.0%} of the tokens, with every question's longest answer")
    read = epochs * sum(batch.rows for batch in used)
    table.add_row(
        "time of the data", f"{_duration(read / rate)}: {round(read):,} pages a device at the loader's rate here"
    )
    for name, text in _of_a_gpu(used, asked, trainer, model, datamodule):
        table.add_row(name, text)
    return table


def _of_a_gpu(
    batches: Sequence[Batch],
    asked: int,
    trainer: Trainer,
    model: "Idefics2Module",
    datamodule: DocVQADataModule,
) -> Iterator[tuple[str, str]]:
    options, precision = model.hparams, str(trainer.precision)
    config = load_config(options.pretrained)
    if isinstance(config, str):
        yield "GPU", f"no estimate: the model's configuration can't be loaded ({escape(config)})"
        return
    longest, most = max(batch.padded // batch.rows for batch in batches), config.text_config.max_position_embeddings
    if longest > most:
        yield "too long", f"a row of {longest:,} tokens, the model takes {most:,}: lower data.max_length"
    weights = weights_gib(config, options, precision)
    yield "weights", f"{weights:.2f} GiB, counted: base, adapter, its gradients and AdamW's moments"
    if not measured_model(config):
        yield "GPU", "no estimate of memory and time: measured was Idefics2-8b, this is a model of another size"
        return
    if "FSDP" in type(trainer.strategy).__name__ or DTYPES.get(precision, None) in (None, DTYPES["32-true"]):
        yield "GPU memory", "no estimate: measured was one GPU in 16 bits"
    else:
        checkpointing = options.gradient_checkpointing
        peaks = [(peak_gib(weights, batch.patches, batch.padded, checkpointing), batch) for batch in batches]
        peak, largest = max(peaks)
        yield (
            "GPU memory",
            f"about {peak:.1f} GiB at the largest batch: {largest.questions} questions, {largest.rows} rows, "
            f"{largest.padded:,} tokens, {largest.patches:,} patches; an estimate from the weights and from peaks "
            f"measured on one H100: 16-mixed, LoRA of rank 8, no compile, no CUDA graphs (docs/memory.md)",
        )
    for name, rate in RATES[datamodule.hparams.image_splitting].items():
        per_device = asked / trainer.world_size / rate
        yield "time of the GPU", f"{_duration(per_device)} at {rate} questions/s, which one H100 did with {name}"
    yield "", "those rates: pages around 1700 x 2200 pixels, see benchmarks/NOTES.md"


def _by_split(title: str, splits: Mapping[str, Split]) -> Table:
    table = Table(title, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in splits:
        table.add_column(NAMES[name], justify="right")
    return table


def _at(values: Sequence[Any], share: float) -> Any:  # noqa: ANN401
    """Return the smallest of sorted values that so large a share doesn't exceed."""
    return values[max(ceil(share * len(values)) - 1, 0)]


def _spread(values: Sequence[int]) -> str:
    return " / ".join(str(_at(sorted(values), share)) for share in (0, 0.5, 0.95, 1)) if values else ""


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
