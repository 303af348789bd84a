"""The table of `check` about the fit: its steps, and estimates of its time and memory."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from lightning import Trainer
from rich.markup import escape
from rich.table import Table

from idefics_lit.cli.batch_statistics import BatchStatistics, first_epoch_batches, loader_rate
from idefics_lit.cli.gpu_estimates import is_measured_model, questions_per_second
from idefics_lit.cli.split_statistics import SplitStatistics
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.errors import InputError
from idefics_lit.model.execution import find_device
from idefics_lit.model.memory import WeightCount, activations_gib, count_weights
from idefics_lit.pretrained import DTYPES, load_config
from idefics_lit.training.options_in_effect import describe, options_in_effect

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from idefics_lit.training.module import Idefics2Module


def fit_table(
    splits: Mapping[str, SplitStatistics], trainer: Trainer, module: "Idefics2Module", datamodule: DocVQADataModule
) -> Table:
    """Return the table.

    Args:
        splits: the statistics of the training split, if it isn't a stream, and of the validation split.
        trainer: its options are those of the fit.
        module: its options decide memory and time.
        datamodule: the data; its training loader is timed.
    """
    table = Table("a fit", "", box=None, padding=(0, 2, 0, 0), header_style="bold")
    devices, options = [find_device(trainer.strategy.root_device)], module.hparams
    config = weights = None
    try:
        config = load_config(options.pretrained)
    except InputError as error:
        reason = str(error)
    else:
        weights = count_weights(config, options)
        options = options_in_effect(options, devices, str(trainer.precision), trainer, datamodule, weights)
        table.add_row("options", escape(describe(module.hparams, options, devices, trainer, datamodule)))
    if "train" not in splits:
        table.add_row("training", f"a stream, not read: {trainer.max_steps:,} steps")
        return table
    patch_size = 14 if config is None else config.vision_config.patch_size
    batches = first_epoch_batches(splits["train"], datamodule, patch_size)
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
    device_questions = questions // trainer.world_size
    rate, workers = loader_rate(splits["train"], datamodule, device_questions), datamodule.num_workers
    table.add_row(
        "time of the data",
        f"{_duration(device_questions / rate)}: {device_questions:,} questions a device at {rate:,.1f} questions/s, "
        f"measured with a fit's loader here, {workers} worker{'s' * (workers != 1)}",
    )
    if config is None or weights is None:
        table.add_row("GPU", f"no estimate: {escape(reason)}")
        return table
    for name, text in _gpu_rows(config, weights, batches, questions, trainer, options, datamodule):
        table.add_row(name, text)
    return table


def _gpu_rows(
    config: "PretrainedConfig",
    count: WeightCount,
    batches: Sequence[BatchStatistics],
    questions: int,
    trainer: Trainer,
    options: Any,  # noqa: ANN401
    datamodule: DocVQADataModule,
) -> Iterator[tuple[str, str]]:
    """Yield the estimates of GPU memory and time, or why there are none."""
    precision = str(trainer.precision)
    in_4_bits = options.quantization == "nf4" and not options.dequantize
    longest = max(batch.padded_tokens // batch.rows for batch in batches)
    max_length = config.text_config.max_position_embeddings
    if longest > max_length:
        yield "too long", f"a row of {longest:,} tokens, the model takes {max_length:,}: lower data.max_length"
    weights = count.gib(in_4_bits=in_4_bits, precision=precision)
    yield "weights", f"{weights:.2f} GiB, counted: base, adapter, its gradients and AdamW's moments"
    on_gpu = trainer.strategy.root_device.type == "cuda"
    gpu_precision = precision if on_gpu else "bf16-mixed"  # a CPU's is not that of the GPU that the fit is for
    if "FSDP" in type(trainer.strategy).__name__ or DTYPES.get(gpu_precision, None) in (None, DTYPES["32-true"]):
        yield "GPU memory", "no estimate: memory was measured with 16-bit precision on one GPU only"
    else:
        held = (options.gradient_checkpointing, options.cuda_graphs)
        weights = count.gib(in_4_bits=in_4_bits, precision=gpu_precision)
        peak, largest = max((weights + activations_gib(config, b.patches, b.padded_tokens, *held), b) for b in batches)
        yield (
            "GPU memory",
            f"about {peak:.1f} GiB at the largest batch: {largest.questions} questions, {largest.rows} rows, "
            f"{largest.padded_tokens:,} tokens, {largest.patches:,} patches; an estimate from the weights and from "
            f"peaks{'' if is_measured_model(config) else ' of Idefics2-8b'} measured on one H100: 16-mixed, LoRA of "
            f"rank 8, no compile (docs/memory.md)",
        )
    if not is_measured_model(config):
        yield "time of the GPU", "no estimate: it was measured with Idefics2-8b only"
        return
    for name, rate in questions_per_second(image_splitting=datamodule.hparams.image_splitting).items():
        seconds = questions / trainer.world_size / rate
        yield "time of the GPU", f"{_duration(seconds)} at {rate} questions/s, which one H100 did with {name}"
    yield "", "those rates: pages around 1700 x 2200 pixels, see benchmarks/NOTES.md"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
