"""How a model is executed on a device: what the user leaves open is worked out from memory and precision.

None of these options changes the loss of an optimizer step. `choose_execution` takes the first of `CANDIDATES`, the
fastest first, that fits the device's memory by the estimate of `idefics_lit.model.memory`.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import ceil, inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from idefics_lit.model.memory import (
    GIB,
    WeightCount,
    activations_gib,
    available_ram_bytes,
    free_gpu_bytes,
    layer_weights,
)
from idefics_lit.pretrained import DTYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The options of `Idefics2Module` that are worked out where they are None.
EXECUTION_OPTIONS = ("dequantize", "cuda_graphs", "compile", "gradient_checkpointing")
CONTEXT_GIB = 0.5  # what CUDA and its libraries take
# CUDA graphs keep the activations of the largest batch, a batch of a new shape runs beside them, and
# `idefics_lit.model.cuda_graphs` releases its graphs where that would take much of what is free.
GRAPHS_ACTIVATIONS = 2.5
ACTIVATIONS = 1.15  # fragmentation
MIN_DEQUANTIZED_BATCH = 8  # with less, room for a larger batch is worth more than 16-bit weights
# On an H200 compiling takes 9 s, once on a machine, and a step then takes 112 to 122 ms instead of 136.
MIN_COMPILED_STEPS = 150
# A question of DocVQA with its answer, and the text around a page.
TOKENS_PER_QUESTION, TOKENS_AROUND_PAGE = 28, 20
# Multiply-adds of a layer's forward on a batch. From the first on, an H200 takes 4 ms for a layer and a tenth of that
# to launch its kernels: CUDA graphs save no time, but take memory. Above the second, a smaller batch is as fast.
MAX_GRAPHS_WORK, MAX_WORK = 1.0e12, 1.5e12
PRECISIONS = {True: "bf16-mixed", False: "16-mixed"}  # by whether a GPU has bfloat16


class Device(NamedTuple):
    """What the choice depends on.

    Attributes:
        name: as its driver calls it.
        type: "cuda" or "cpu".
        gib: memory that this process can use.
        ram_gib: main memory that this process can use.
        can_compile: there are Triton and a C compiler, which it calls.
    """

    name: str
    type: str
    gib: float
    ram_gib: float = 0.0
    can_compile: bool = True


class Workload(NamedTuple):
    """The batches of a fit.

    Attributes:
        batch_sizes: the batch sizes to choose from, the largest first.
        questions_per_row: mean number of questions that share a page's row.
        images_per_page: images that the vision tower encodes for a row.
        longest_edge: of an image or tile, in pixels.
        page_tokens: tokens of a row's pages; by default those of a page of Idefics2.
        steps: optimizer steps of the fit.
    """

    batch_sizes: Sequence[int]
    questions_per_row: float = 1.0
    images_per_page: int = 1
    longest_edge: int = 980
    page_tokens: int = 66
    steps: float = inf


class Execution(NamedTuple):
    """Options in effect."""

    batch_size: int
    dequantize: bool = False
    cuda_graphs: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False

    @property
    def model_options(self) -> dict[str, bool]:
        """The options of `Idefics2Module`, by name."""
        return {name: getattr(self, name) for name in EXECUTION_OPTIONS}


# Measured: benchmarks/NOTES.md. Layers are compiled only with 16-bit weights on a GPU with bfloat16, in long fits.
CANDIDATES = (
    Execution(MIN_DEQUANTIZED_BATCH, dequantize=True, cuda_graphs=True, compile=True),
    Execution(0, cuda_graphs=True),
    Execution(0),
    Execution(1, gradient_checkpointing=True),
)
"""The fastest first, with the smallest batch that each is worth; 0 stands for the questions of a row."""


def find_device(device: torch.device) -> Device:
    """Return a device's name and memory; a limit of this process and the memory of others are left out."""
    ram = available_ram_bytes() / GIB
    if device.type == "cuda":
        usable = free_gpu_bytes(device) + torch.cuda.memory_reserved(device)
        compilers = filter(None, (os.environ.get("CC"), "gcc", "cc", "clang"))
        can_compile = find_spec("triton") is not None and any(map(shutil.which, compilers))
        return Device(torch.cuda.get_device_name(device), "cuda", usable / GIB, ram, can_compile)
    return Device("CPU", device.type, ram, ram)


def default_precision(*, gpu: bool) -> str:
    """Return ``trainer.precision`` for the current GPU, or for the CPU."""
    return PRECISIONS[torch.cuda.is_bf16_supported(including_emulation=False)] if gpu else "32-true"


def known_options(device: Device, options: Mapping[str, Any], precision: str, *, is_sharded: bool) -> dict[str, bool]:
    """Return those of `EXECUTION_OPTIONS` that are given or don't depend on the model's size."""
    known = {name: options[name] for name in EXECUTION_OPTIONS if options[name] is not None}
    if options["quantization"] == "none":
        known.setdefault("dequantize", False)
    if device.type != "cuda" or is_sharded:
        known = {"dequantize": False, "cuda_graphs": False, "compile": False, **known}
    if precision != "bf16-mixed" or not device.can_compile:
        known.setdefault("compile", False)
    if is_sharded:
        known.setdefault("gradient_checkpointing", False)
    return known


def choose_execution(
    device: Device,
    config: "PretrainedConfig",
    weights: WeightCount,
    options: Mapping[str, Any],
    precision: str,
    workload: Workload,
    *,
    is_sharded: bool = False,
) -> Execution:
    """Choose the options that are None, and a batch size.

    Args:
        device: the device, or the smallest of several.
        config: the model's configuration.
        weights: the model's weights, from `count_weights`.
        options: those of `Idefics2Module`.
        precision: the Trainer's precision.
        workload: the batches.
        is_sharded: the strategy shards the weights, which CUDA graphs and compiled layers can't use.

    Returns:
        The options. If nothing fits, those that need the least memory.
    """
    known = known_options(device, options, precision, is_sharded=is_sharded)
    if weights.is_vision_trained:  # a graph per image can't be followed by all their backwards
        known.setdefault("cuda_graphs", False)
    if workload.steps < MIN_COMPILED_STEPS:
        known.setdefault("compile", False)
    if is_sharded:
        return Execution(workload.batch_sizes[0], **known)
    chosen = None
    for candidate in CANDIDATES:
        execution = candidate._replace(**known)
        if execution.cuda_graphs and execution.gradient_checkpointing:
            continue
        in_4_bits = options["quantization"] == "nf4" and not execution.dequantize
        # Beside the weights that load in 4 bits, one layer is dequantized at a time.
        fixed = weights.gib(in_4_bits=in_4_bits, precision=precision) + (CONTEXT_GIB if device.type == "cuda" else 0)
        least = min(candidate.batch_size or round(workload.questions_per_row), workload.batch_sizes[0])
        for size in workload.batch_sizes:
            chosen = execution._replace(batch_size=size)
            patches, tokens = _batch_size(config, size, workload)
            work = tokens * layer_weights(config.text_config)
            if work > MAX_WORK and size != workload.batch_sizes[-1]:
                continue
            if work > MAX_GRAPHS_WORK and "cuda_graphs" not in known:
                chosen = chosen._replace(cuda_graphs=False)
            needed = fixed + _activations_gib(device, config, chosen, precision, patches, tokens)
            if size >= least and needed <= device.gib:
                return chosen
    assert chosen is not None
    return chosen


def _batch_size(config: "PretrainedConfig", questions: int, workload: Workload) -> tuple[int, int]:
    """Return the patches and tokens of a batch."""
    rows = ceil(questions / workload.questions_per_row)
    patches = rows * workload.images_per_page * (workload.longest_edge // config.vision_config.patch_size) ** 2
    return patches, rows * (workload.page_tokens + TOKENS_AROUND_PAGE) + questions * TOKENS_PER_QUESTION


def _activations_gib(
    device: Device, config: "PretrainedConfig", execution: Execution, precision: str, patches: int, tokens: int
) -> float:
    """Estimate the memory of a batch, for a model of any width and depth."""
    # A CPU keeps the connector's activations, as CUDA graphs do.
    keeps_all = execution.cuda_graphs or device.type == "cpu"
    peak = activations_gib(config, patches, tokens, execution.gradient_checkpointing, keeps_all)
    precision_factor = DTYPES.get(precision, torch.float32).itemsize / 2
    return peak * precision_factor * (GRAPHS_ACTIVATIONS if execution.cuda_graphs else ACTIVATIONS)
