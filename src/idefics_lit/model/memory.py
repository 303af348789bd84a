"""Memory of a fit: weights are counted, activations are scaled from measurements, free memory is asked for."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
import transformers
from torch import nn

from idefics_lit.pretrained import DTYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# NF4 with double quantization (QLoRA, arXiv:2305.14314, section 3): 4 bits per weight, an 8-bit scale per 64 weights
# and a 32-bit scale per 256 of those scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
GIB = 2**30


class Activations(NamedTuple):
    """Peak memory of training beside the weights, with a text model of Idefics2-8b's size in 16 bits."""

    fixed_gib: float
    mib_per_patch: float
    mib_per_token: float


# benchmarks/results/memory.json: these fit each of 28 measured peaks within 0.5 GiB (one H100, torch 2.11, LoRA of rank
# 8). Patches are of 14 x 14 pixels, tokens with padding.
PLAIN = Activations(fixed_gib=0.18, mib_per_patch=0.0, mib_per_token=6.35)
CHECKPOINTING = Activations(fixed_gib=0.08, mib_per_patch=0.0449, mib_per_token=0.0)
# With CUDA graphs, and on a CPU, the resampler's activations are kept too: from the peaks in train_throughput*.json,
# within 2 GiB.
CUDA_GRAPHS = Activations(fixed_gib=0.18, mib_per_patch=0.047, mib_per_token=6.35)
# Idefics3 and SmolVLM have no resampler, and rows of thousands of tokens. Not measured: 1 GiB for the vision tower on a
# page's tiles, and with checkpointing the tokens' hidden states (0.25 MiB) and the tensors of one of 32 layers (0.2).
TILES_PLAIN = Activations(fixed_gib=1.2, mib_per_patch=0.0, mib_per_token=6.35)
TILES_CHECKPOINTING = Activations(fixed_gib=1.1, mib_per_patch=0.0, mib_per_token=0.45)


class Peaks(NamedTuple):
    """An architecture's activations by what of them is kept."""

    plain: Activations
    checkpointing: Activations
    cuda_graphs: Activations


IDEFICS2_TOKEN_BYTES = 32 * (28 * 4096 + 6 * 14336 + 6 * 1024)  # 6.31 MiB, where 6.35 were measured
IDEFICS2_PEAKS = Peaks(PLAIN, CHECKPOINTING, CUDA_GRAPHS)
IDEFICS3_PEAKS = Peaks(TILES_PLAIN, TILES_CHECKPOINTING, TILES_PLAIN)


class WeightCount(NamedTuple):
    """Numbers of weights: those that NF4 can hold, the others of the base, and the adapter's."""

    quantizable: int
    others: int
    trainable: int
    is_vision_trained: bool

    def gib(self, *, in_4_bits: bool, precision: str) -> float:
        """Return the GiB of the weights, and of the adapter's gradients and AdamW's two moments.

        Args:
            in_4_bits: NF4 holds the weights that it can.
            precision: the Trainer's precision.
        """
        bytes_per_weight = DTYPES.get(precision, torch.float32).itemsize
        base = self.quantizable * (NF4_BYTES if in_4_bits else bytes_per_weight) + self.others * bytes_per_weight
        # A trainable weight has four float32 values: itself, its gradient and AdamW's two moments.
        return (base + self.trainable * 16) / GIB


def count_weights(config: "PretrainedConfig", options: Mapping[str, Any]) -> WeightCount:
    """Count the weights of a model with an adapter, without loading any.

    Args:
        config: the model's configuration.
        options: the options of `Idefics2Module`.

    Raises:
        InputError: ``lora.target_modules`` match no layer.
    """
    from idefics_lit.model.adapter import add_lora
    from idefics_lit.model.lora import LoRA, unquantized_modules

    unquantized = unquantized_modules(quantize_vision=options["quantize_vision"])
    # On the meta device too, new weights advance the random state, and the fit's own would then depend on the counting.
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            base = transformers.AutoModelForImageTextToText.from_config(config)
        layers = [layer for name, layer in base.named_modules() if not name.startswith(unquantized)]
        quantizable = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
        others = sum(p.numel() for p in base.parameters()) - quantizable
        adapted = add_lora(base, LoRA(**options["lora"]))
    trainable = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    is_vision_trained = any(".vision_model." in name for name in trainable)
    return WeightCount(quantizable, others, sum(trainable.values()), is_vision_trained)


def activations_gib(
    config: "PretrainedConfig", patches: float, tokens: float, gradient_checkpointing: bool, cuda_graphs: bool = False
) -> float:
    """Estimate the peak memory of training on a batch in 16 bits, beside the weights, for a model of any size.

    Args:
        config: the model's configuration.
        patches: image patches of the batch.
        tokens: tokens of the batch with padding.
        gradient_checkpointing: the module's option.
        cuda_graphs: the module's option.
    """
    from idefics_lit.model.architecture import backbone_class  # takes seconds to import

    peaks = backbone_class(config).peaks
    peak = peaks.checkpointing if gradient_checkpointing else peaks.cuda_graphs if cuda_graphs else peaks.plain
    text = config.text_config
    per_patch = peak.mib_per_patch * text.hidden_size * text.num_hidden_layers / (4096 * 32)
    per_token = peak.mib_per_token * _token_bytes(text) / IDEFICS2_TOKEN_BYTES
    return peak.fixed_gib + (patches * per_patch + tokens * per_token) / 1024


def _token_bytes(text: "PretrainedConfig") -> int:
    """Return the bytes that autograd keeps of a token in 16 bits, counted with ``saved_tensors_hooks`` within 10%."""
    layer = 28 * text.hidden_size + 6 * text.intermediate_size + 6 * key_value_width(text)
    return int(text.num_hidden_layers * layer)


def layer_weights(text_config: "PretrainedConfig") -> int:
    """Return the number of weights of a layer of the text model."""
    hidden = text_config.hidden_size
    return 2 * hidden * (hidden + key_value_width(text_config)) + 3 * hidden * text_config.intermediate_size


def key_value_width(text_config: "PretrainedConfig") -> int:
    """Return the width of a token's keys, and of its values."""
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return int(text_config.num_key_value_heads * head_dim)


def free_gpu_bytes(device: torch.device | None = None) -> int:
    """Return the bytes of a GPU that this process can still allocate: other processes' and its own limit count."""
    # Without a Trainer the device is "cuda"; the limit is read only with an index.
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    # torch < 2.8 has no way to read the limit.
    limit = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(index)
    return min(free, int(limit * total) - torch.cuda.memory_reserved(index))


def available_ram_bytes() -> int:
    """Return the bytes of main memory that this process can still use: a container's limit counts."""
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        read = partial(Path.read_text, encoding="ascii")
        limit, used = (read(group / name).strip() for name in ("memory.max", "memory.current"))
        return available if limit == "max" else min(available, int(limit) - int(used))
    except (OSError, ValueError):  # not in a container with cgroup v2
        return available
