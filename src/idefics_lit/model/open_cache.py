"""Open the feature cache of a model, with a key of all that its features depend on."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torchvision
import transformers
from torch import nn

from idefics_lit.errors import InputError
from idefics_lit.model.adapter import is_trained
from idefics_lit.model.compat import attention_implementation
from idefics_lit.model.feature_cache import FolderCache, MemoryCache, tensor_bytes
from idefics_lit.model.quiet_imports import bitsandbytes

LIBRARIES = (torch, torchvision, transformers, bitsandbytes)  # whose versions may change pixels and features


def open_cache(options: Any, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> MemoryCache | FolderCache:  # noqa: ANN401
    """Return the cache that a module's options ask for.

    Args:
        options: `Idefics2Module`'s hyperparameters, with ``feature_cache`` set.
        modules: the modules that compute the features, the vision tower first.
        dtype: of their computation.

    Raises:
        InputError: the vision tower is trained, or the folder can't be written.
    """
    if any(map(is_trained, modules.values())):
        raise InputError(
            "model.feature_cache needs a frozen vision tower, but model.lora.target_modules train it: remove one of "
            "the options"
        )
    if options.feature_cache == "memory":
        return MemoryCache(options.feature_cache_gb)
    return FolderCache(options.feature_cache, options.feature_cache_gb, _features_key([*modules.values()], dtype))


def _features_key(modules: Sequence[nn.Module], dtype: torch.dtype) -> str:
    """Return a key of all that features depend on besides an image and the processor's options: weights and code.

    The weights are hashed, since a file's name, size and time don't identify them. For Idefics2-8b's vision tower, 0.8
    GB in 16 bits, this takes a second once a run.
    """
    tower: Any = modules[0]
    digest = hashlib.sha256()
    for name, tensor in chain.from_iterable(module.state_dict().items() for module in modules):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor.cpu()))
    attention, device = attention_implementation(tower.config), tower.device.type
    versions = [f"{library.__name__} {library.__version__}" for library in LIBRARIES]
    return f"{digest.hexdigest()} {tower.config.to_json_string(use_diff=False)} {attention} {versions} " + (
        f"{dtype} {device} {torch.get_float32_matmul_precision()}"
    )
