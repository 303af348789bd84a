"""The command ``check``: print what a fit would meet in its data and need of the machine.

Every figure is measured in the run itself, counted, or given with the measurement that it is estimated from.
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

from idefics_lit.cli.gpu_estimates import (
    is_measured_model,
    load_config,
    questions_per_second,
)
from idefics_lit.cli.split_statistics import (
    BatchStatistics,
    SplitStatistics,
    compute_statistics,
    first_epoch_batches,
)
from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.model.execution import find_device
from idefics_lit.model.memory import peak_gib, weights_gib
from idefics_lit.pretrained import DTYPES
from idefics_lit.training.execution import describe, options_in_effect
from idefics_lit.training.run_folder import run_folder

if TYPE_CHECKING:
    from idefics_lit.training.module import Idefics2Module

SPLIT_NAMES = {"train": "training", "val": "validation"}
MAX_SHOWN = 3  # broken rows, ids and pages on the screen
SHOWN_EXAMPLES = 5  # questions of each split on the screen
TOKEN_BINS = (1, 2, 4, 8, 16, 32, 64)  # upper limits of the histogram of answer lengths

Splits = Mapping[str, SplitStatistics]


def check(trainer: Trainer, module: "Idefics2Module", datamodule: DocVQADataModule) -> None:
    """Read all training and validation questions and print what training would meet.

    Args:
        trainer: its options are those of the fit.
        module: its options decide memory and time; no weights are loaded.
        datamodule: the data.

    Raises:
        InputError: a split can't be opened.
        SystemExit: with code 1 if there are broken rows that would end a fit.
    """
    if not trainer.is_global_zero:
        return
    datamodule.trainer = trainer
    datamodule.hparams.val_in_fit = None  # a fit scores the remaining questions at its end
    datamodule.open("fit")
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=trainer.progress_bar_callback is None) as bar:
        splits = {
            name: compute_statistics(datamodule, name, _advance(bar, name, len(examples)))
            for name, examples in datamodule.examples.items()
        }
    for name, split in splits.items():
        _print_examples(console, f"{SPLIT_NAMES[name]} questions", split, datamodule.collator(name))
    for table in (_size_table(splits, module, datamodule), _answer_length_table(splits), _question_type_table(splits)):
        if table.row_count:
            console.print(table, "")
    for line in _warnings(splits, module.hparams["max_new_tokens"]):
        console.print(escape(line), soft_wrap=True)
    console.print(_fit_table(splits, trainer, module, datamodule))
    lines = [line for split in splits.values() for line in split.errors.values()]
    if lines:
        _print_errors(console, splits, lines, run_folder(trainer) / "check.txt")
    if lines and datamodule.hparams.on_bad_example == "raise":
        print(
            f"broken rows: {len(lines)}; fix them, or leave them out with --data.on_bad_example skip", file=sys.stderr
        )
        raise SystemExit(1)


def _advance(bar: Progress, name: str, total: int) -> Callable[[int], None]:
    task = bar.add_task(f"Reading {SPLIT_NAMES[name]} questions", total=total)
    return lambda questions: bar.advance(task, questions)


def _print_examples(console: Console, title: str, split: SplitStatistics, collator: Idefics2Collator) -> None:
    """Print questions from all over a split, as Python literals, which show invisible characters."""
    rows = list(split.questions)
    shown = dict.fromkeys(rows[i * len(rows) // SHOWN_EXAMPLES] for i in range(SHOWN_EXAMPLES) if rows)
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


def _size_table(splits: Splits, module: "Idefics2Module", datamodule: DocVQADataModule) -> Table:
    """Numbers of questions and pages, token lengths and page sizes."""
    table = _split_table("questions and pages", splits)
    max_new_tokens = module.hparams["max_new_tokens"]
    image_processor = datamodule.processor.image_processor
    max_edge = image_processor.size["longest_edge"] * (2 if image_processor.do_image_splitting else 1)
    questions = [list(split.questions.values()) for split in splits.values()]
    page_counts = [len(set(split.examples.page_ids)) for split in splits.values()]
    page_sizes = [split.page_sizes for split in splits.values()]

    def add_row(name: str, cells: Sequence[object]) -> None:
        table.add_row(name, *(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells))

    add_row("questions", [len(split.examples) for split in splits.values()])
    add_row("pages", page_counts)
    counts = zip(splits.values(), page_counts, strict=True)
    add_row("questions a page", [f"{len(split.examples) / pages:.1f}" for split, pages in counts])
    add_row("broken rows", [len(split.errors) for split in splits.values()])
    add_row("ids that occur twice", [len(split.repeated_ids) for split in splits.values()])
    table.add_row()
    add_row("", ["min / median / 95% / max"] * len(splits))
    add_row("tokens in all", [_quantiles([q.total_tokens for q in split]) for split in questions])
    add_row("tokens of an answer", [_quantiles([n for q in split for n in q.answer_tokens]) for split in questions])
    too_long = [sum(min(q.answer_tokens) > max_new_tokens for q in split) for split in questions]
    add_row(f"beyond max_new_tokens {max_new_tokens}", too_long)
    table.add_row()
    by_area = [sorted(sizes, key=lambda size: size[0] * size[1]) for sizes in page_sizes]
    for name, share in (("smallest", 0.0), ("median", 0.5), ("largest", 1.0)):
        cells = ["{} x {}".format(*_quantile(sizes, share)) if sizes else "" for sizes in by_area]
        add_row(f"{name} page, pixels", cells)
    add_row(f"pages scaled down to {max_edge}", [sum(max(size) > max_edge for size in sizes) for sizes in page_sizes])
    return table


def _answer_length_table(splits: Splits) -> Table:
    """Histogram of the tokens of accepted answers."""
    table = _split_table("accepted answers of so many tokens", splits)
    lengths = [Counter(n for q in split.questions.values() for n in q.answer_tokens) for split in splits.values()]
    for low, high in zip((0, *TOKEN_BINS), (*TOKEN_BINS, sys.maxsize), strict=True):
        counts = [sum(count for n, count in counter.items() if low < n <= high) for counter in lengths]
        if any(counts):
            name = f"more than {low}" if high == sys.maxsize else f"{low + 1} to {high}" if high > 2 else f"{high}"
            table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _question_type_table(splits: Splits) -> Table:
    """Questions by type, the most frequent type first."""
    table = _split_table("questions of the type", splits)
    counts = [Counter(name for q in split.questions.values() for name in q.types) for split in splits.values()]
    for name, _ in sum(counts, Counter()).most_common():
        table.add_row(escape(name), *(f"{counter[name]:,}" for counter in counts))
    return table


def _warnings(splits: Splits, max_new_tokens: int) -> Iterator[str]:
    """Problems at which a fit doesn't stop."""
    if unanswerable := sum(min(q.answer_tokens) > max_new_tokens for q in splits["val"].questions.values()):
        yield (
            f"validation questions that can't be answered in full, since no accepted answer fits in "
            f"model.max_new_tokens {max_new_tokens}: {unanswerable}\n"
        )
    for name, split in splits.items():
        if split.repeated_ids:
            yield f"{SPLIT_NAMES[name]} ids that occur twice: {_first_ones(split.repeated_ids)}\n"
    train_pages = splits["train"].page_rows if "train" in splits else {}
    if shared := sorted(row for page, row in splits["val"].page_rows.items() if page in train_pages):
        lines = "\n  ".join(map(splits["val"].examples.source, list(dict.fromkeys(shared))[:MAX_SHOWN]))
        yield f"validation pages that are trained on too, by their pixels: {len(shared)}, such as that of\n  {lines}\n"


def _print_errors(console: Console, splits: Splits, lines: Sequence[str], file: Path) -> None:
    """Print the broken rows by kind and the first of them; write all of them to a file."""
    kinds = [split.error_kinds for split in splits.values()]
    table = _split_table("broken rows", splits)
    for kind, _ in sum(kinds, Counter()).most_common():
        table.add_row(escape(kind), *(f"{counter[kind]:,}" for counter in kinds))
    console.print("", table)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for line in lines[:MAX_SHOWN]:
        console.print(f"  {escape(line)}", soft_wrap=True)
    console.print(f"all {len(lines)} lines: {file}", soft_wrap=True)


def _fit_table(splits: Splits, trainer: Trainer, module: "Idefics2Module", datamodule: DocVQADataModule) -> Table:
    """Steps, time and memory of the fit."""
    table = Table("a fit", "", box=None, padding=(0, 2, 0, 0), header_style="bold")
    pages_per_second = sum(s.processed_pages for s in splits.values()) / sum(s.seconds for s in splits.values())
    workers = datamodule.num_workers
    devices, options = [find_device(trainer.strategy.root_device)], module.hparams
    if not isinstance(load_config(options.pretrained), str):
        options = options_in_effect(options, devices, str(trainer.precision), trainer, datamodule)
        table.add_row("options", escape(describe(module.hparams, options, devices, trainer, datamodule)))
    table.add_row(
        "the loader here",
        f"{pages_per_second:,.1f} pages/s with their questions, {workers} worker{'s' * (workers != 1)}, starting "
        f"included",
    )
    if "train" not in splits:
        table.add_row("training", f"a stream, not read: {trainer.max_steps:,} steps")
        return table
    batches = first_epoch_batches(splits["train"], datamodule.hparams, datamodule.batch_size, trainer.world_size)
    if not batches:
        table.add_row("training", "no question is left to train on")
        return table
    limit = trainer.limit_train_batches
    batches = batches[: limit if isinstance(limit, int) else int(len(batches) * limit)] or batches[:1]
    steps_per_epoch = ceil(len(batches) / trainer.accumulate_grad_batches)
    limits = [trainer.max_steps / steps_per_epoch] if trainer.max_steps >= 0 else []
    limits += [trainer.max_epochs] if trainer.max_epochs is not None and trainer.max_epochs >= 0 else []
    # Without limits, 1000 epochs are Lightning's default; of endless training, one epoch is shown.
    epochs = min(limits, default=1000 if trainer.max_epochs is None else 1)
    questions = round(epochs * sum(batch.questions for batch in batches) * trainer.world_size)
    table.add_row("steps", f"{ceil(epochs * steps_per_epoch):,}, of {steps_per_epoch:,} an epoch: {epochs:,.2f} epochs")
    table.add_row("questions", f"{questions:,} seen on {trainer.world_size} device{'s' * (trainer.world_size > 1)}")
    padding = 1 - sum(batch.tokens for batch in batches) / sum(batch.padded_tokens for batch in batches)
    table.add_row("padding", f"{padding:.0%} of the tokens, with every question's longest answer")
    pages = epochs * sum(batch.rows for batch in batches)
    table.add_row(
        "time of the data",
        f"{_duration(pages / pages_per_second)}: {round(pages):,} pages a device at the loader's rate here",
    )
    for name, text in _gpu_rows(batches, questions, trainer, options, datamodule):
        table.add_row(name, text)
    return table


def _gpu_rows(
    batches: Sequence[BatchStatistics],
    questions: int,
    trainer: Trainer,
    options: Any,  # noqa: ANN401
    datamodule: DocVQADataModule,
) -> Iterator[tuple[str, str]]:
    """Yield the estimates of GPU memory and time, or why there are none."""
    precision = str(trainer.precision)
    config = load_config(options.pretrained)
    if isinstance(config, str):
        yield "GPU", f"no estimate: the model's configuration can't be loaded ({escape(config)})"
        return
    longest = max(batch.padded_tokens // batch.rows for batch in batches)
    max_length = config.text_config.max_position_embeddings
    if longest > max_length:
        yield "too long", f"a row of {longest:,} tokens, the model takes {max_length:,}: lower data.max_length"
    weights = weights_gib(config, options, precision)
    yield "weights", f"{weights:.2f} GiB, counted: base, adapter, its gradients and AdamW's moments"
    if not is_measured_model(config):
        yield "GPU", "no estimate of memory and time: they were measured with Idefics2-8b only"
        return
    on_gpu = trainer.strategy.root_device.type == "cuda"
    gpu_precision = precision if on_gpu else "bf16-mixed"  # a CPU's is not that of the GPU that the fit is for
    if "FSDP" in type(trainer.strategy).__name__ or DTYPES.get(gpu_precision, None) in (None, DTYPES["32-true"]):
        yield "GPU memory", "no estimate: memory was measured with 16-bit precision on one GPU only"
    else:
        held = (options.gradient_checkpointing, options.cuda_graphs)
        weights = weights_gib(config, options, gpu_precision)
        peak, largest = max((peak_gib(weights, b.patches, b.padded_tokens, *held), b) for b in batches)
        yield (
            "GPU memory",
            f"about {peak:.1f} GiB at the largest batch: {largest.questions} questions, {largest.rows} rows, "
            f"{largest.padded_tokens:,} tokens, {largest.patches:,} patches; an estimate from the weights and from "
            f"peaks measured on one H100: 16-mixed, LoRA of rank 8, no compile (docs/memory.md)",
        )
    for name, rate in questions_per_second(image_splitting=datamodule.hparams.image_splitting).items():
        seconds = questions / trainer.world_size / rate
        yield "time of the GPU", f"{_duration(seconds)} at {rate} questions/s, which one H100 did with {name}"
    yield "", "those rates: pages around 1700 x 2200 pixels, see benchmarks/NOTES.md"


def _split_table(title: str, splits: Splits) -> Table:
    table = Table(title, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in splits:
        table.add_column(SPLIT_NAMES[name], justify="right")
    return table


def _quantile(sorted_values: Sequence[Any], share: float) -> Any:  # noqa: ANN401
    """Return the smallest value that at least this share of the values doesn't exceed."""
    return sorted_values[max(ceil(share * len(sorted_values)) - 1, 0)]


def _quantiles(values: Sequence[int]) -> str:
    ordered = sorted(values)
    return " / ".join(str(_quantile(ordered, share)) for share in (0, 0.5, 0.95, 1)) if values else ""


def _first_ones(values: Sequence[object]) -> str:
    more = f" and {len(values) - MAX_SHOWN} more" if len(values) > MAX_SHOWN else ""
    return ", ".join(map(str, values[:MAX_SHOWN])) + more


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
