"""The command ``check``: print what a fit would meet in its data and need of the machine.

Every figure is measured in the run itself, counted, or given with the measurement that it is estimated from.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from lightning import Trainer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from idefics_lit.cli.fit_estimates import fit_table
from idefics_lit.cli.split_statistics import (
    SplitStatistics,
    compute_statistics,
)
from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.image_layout import page_edge
from idefics_lit.training.run_folder import run_folder

if TYPE_CHECKING:
    from idefics_lit.training.module import Idefics2Module

SPLIT_NAMES = {"train": "training", "val": "validation"}
MAX_SHOWN = 3  # broken rows of a kind, ids and pages on the screen
MAX_KINDS = 10  # of broken rows on the screen
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
        SystemExit: with code 1 if a fit couldn't start: there are broken rows that would end it, or no row is left.
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
    tables = (_size_table(splits, module, datamodule), _page_tokens_table(splits), _answer_length_table(splits))
    for table in (*tables, _question_type_table(splits)):
        if table.row_count:
            console.print(table, "")
    for line in _warnings(splits, module.hparams["max_new_tokens"]):
        console.print(escape(line), soft_wrap=True)
    console.print(fit_table(splits, trainer, module, datamodule))
    lines = [line for split in splits.values() for line in split.errors.values()]
    if lines:
        _print_errors(console, splits, lines, run_folder(trainer) / "check.txt")
    reason = ""
    if empty := [SPLIT_NAMES[name] for name, split in splits.items() if not split.questions]:
        reason = f"no {' and no '.join(empty)} question is left: fix the broken rows"
    elif lines and datamodule.hparams.on_bad_example == "raise":
        reason = f"broken rows: {len(lines)}; fix them, or leave them out with --data.on_bad_example skip"
    if reason:
        print(reason, file=sys.stderr)
        raise SystemExit(1)


def use_cpu(trainer: Namespace) -> None:
    """Replace the options of the Trainer that need a GPU, for `check`, which reads only their numbers.

    Args:
        trainer: the options of the Trainer, which are changed.
    """
    trainer.accelerator = "cpu"
    # A number, a list of indices in either notation, or all devices, of which there are none here.
    devices = str(trainer.devices).strip(" ,[]")
    is_list = isinstance(trainer.devices, list) or "," in str(trainer.devices)
    trainer.devices = len(devices.split(",")) if is_list else int(devices) if devices.isdecimal() else 1
    if str(trainer.precision) in ("16", "16-mixed"):
        trainer.precision = "bf16-mixed"  # as many bytes


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
    max_edge = page_edge(datamodule.processor.image_processor)
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


def _page_tokens_table(splits: Splits) -> Table:
    """Pages by the number of images that the model takes them as, and of their tokens."""
    table = _split_table("pages of so many images", splits)
    counts = [split.image_tokens for split in splits.values()]
    for images, tokens in sorted(set().union(*counts)):
        cells = (f"{counter[images, tokens]:,}" for counter in counts)
        table.add_row(f"{images}, {tokens:,} tokens", *cells)
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
    """Print the kinds of broken rows, the most frequent first, with examples; write all broken rows to a file."""
    kinds = [split.errors_by_kind for split in splits.values()]
    counts = Counter({kind: sum(len(k.get(kind, ())) for k in kinds) for kind in chain.from_iterable(kinds)})
    shown = [kind for kind, _ in counts.most_common(MAX_KINDS)]
    table = _split_table("broken rows", splits)
    for kind in shown:
        table.add_row(escape(kind), *(f"{len(k.get(kind, ())):,}" for k in kinds))
    if others := counts.keys() - {*shown}:
        table.add_row("other kinds", *(f"{sum(len(k.get(kind, ())) for kind in others):,}" for k in kinds))
    console.print("", table)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for kind in shown:
        for line in [line for k in kinds for line in k.get(kind, ())][:MAX_SHOWN]:
            console.print(f"  {escape(line)}", soft_wrap=True)
    console.print(f"all {len(lines)} lines: {file}", soft_wrap=True)


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
