"""What the frozen vision tower makes of a page, kept: in memory, or in a folder that runs share.

A page comes again with its other questions and in every epoch; its features are 2 bytes x patches x width, 8.7 MB for a
page of Idefics2-8b.
"""

import errno
import hashlib
import os
import tempfile
import time
import zlib
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import torchvision
import transformers
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from idefics_lit.errors import InputError, first_line
from idefics_lit.model.loading import is_vision_trained
from idefics_lit.utils.files import KILLED_AFTER, replacing

Device = torch.device | str

LIBRARIES = (torch, torchvision, transformers, bitsandbytes)  # that make pixels of an image and features of pixels
FULL = (errno.ENOSPC, errno.EDQUOT)
LOOK_AFTER = 0.01  # of a folder's limit: what a process writes before it looks again at what all of them have written
NAME = 40  # characters of a file's


class MemoryCache:
    """Tensors by key, in memory from which a GPU fetches them by itself; the oldest make room for new ones.

    Args:
        gigabytes: the most to keep, in 10^9 bytes.
    """

    def __init__(self, gigabytes: float) -> None:
        room = gigabytes * 1e9
        # Pinned memory comes in powers of two; a page's own would take twice its size. A slab is forgotten as a whole.
        self.slab = 1 << max(0, int(min(room / 8, 2**29)).bit_length() - 1)
        self.slabs = int(room / self.slab)
        self._slabs: deque[tuple[Tensor, list[str]]] = deque()
        self._used = self.slab
        self._found: dict[str, Tensor] = {}

    def get(self, page: str, device: Device = "cpu") -> Tensor | None:
        """Return a page's features on a device, or None; they are the caller's own, as the memory is used again.

        The copy is made in the device's stream, as `put`'s is: features that a GPU has put are for that GPU.
        """
        kept = self._found.get(page)
        # From CPU to CPU it would be the same memory, which another page's features may take before they are read.
        return None if kept is None else kept.to(device, non_blocking=True, copy=True)

    def put(self, page: str, features: Tensor) -> None:
        """Keep a page's features, once the GPU has got there: what reads them has to wait in its stream."""
        if page in self._found or features.nbytes > self.slab:
            return
        if self._used + features.nbytes > self.slab:
            self._next_slab()
        memory, pages = self._slabs[-1]
        kept = memory[self._used : self._used + features.nbytes].view(features.dtype).view(features.shape)
        kept.copy_(features.detach(), non_blocking=True)
        self._used += -(-features.nbytes // 64) * 64  # a view's start must suit its dtype
        self._found[page] = kept
        pages.append(page)

    def _next_slab(self) -> None:
        if len(self._slabs) < self.slabs:
            memory = torch.empty(self.slab, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        else:
            memory, pages = self._slabs.popleft()
            for page in pages:
                del self._found[page]
        self._slabs.append((memory, []))
        self._used = 0


class FolderCache:
    """Tensors by key, in a folder that runs share, the least recently used ones dropped when there are too many.

    Files are written under another name and renamed, so that a killed writer leaves nothing wrong and two processes may
    write at once; what can't be read, or isn't what was written, is a miss, and so is what a full disk doesn't take.
    All processes together keep to the limit, each to a hundredth of it, or a page.

    Args:
        folder: made if missing.
        gigabytes: the most to keep, in 10^9 bytes.
        made_by: everything besides the page that features depend on.

    Raises:
        InputError: the folder can't be written, for another reason than that the disk is full.
    """

    def __init__(self, folder: str, gigabytes: float, made_by: str) -> None:
        self.folder, self.room, self.made_by = Path(folder), gigabytes * 1e9, made_by
        self._is_warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            if error.errno not in FULL:
                raise InputError(f"model.feature_cache {folder}: can't be written: {first_line(error)}") from error
        self._make_room()

    def get(self, page: str, device: Device = "cpu") -> Tensor | None:
        """Return a page's features on a device, or None."""
        file = self._file(page)
        try:
            stored = load(file.read_bytes())  # as a memory map a file that is cut off would be a bus error
            features = stored["features"]
            if stored["crc32"].item() != _crc32(features):
                return None
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            return None
        with suppress(OSError):  # it may be another user's
            os.utime(file)
        return features.to(device, non_blocking=True)

    def put(self, page: str, features: Tensor) -> None:
        """Keep a page's features, where there is room."""
        # A copy: a slice would keep all of the batch it was made in.
        features = features.detach().to("cpu", copy=True).contiguous()
        stored = save({"features": features, "crc32": torch.tensor(_crc32(features))})
        if len(stored) > self.room:
            return
        try:
            with replacing(self._file(page), durable=False) as file:  # what is cut off is a miss
                file.write(stored)
        except InputError as error:
            if not self._is_warned:
                rank_zero_warn(
                    f"model.feature_cache: {error}, or lower model.feature_cache_gb. Until then pages that aren't kept "
                    f"are encoded again."
                )
            self._is_warned = True
            return
        self._unseen += len(stored)
        if self._unseen > LOOK_AFTER * self.room:
            self._make_room()

    def _make_room(self) -> None:
        """Drop what was used longest ago of all that processes have written, and what killed ones have left.

        A tenth more than needed, so that it isn't done at every page.
        """
        self._unseen, seen, found = 0, 0, []
        for file in self.folder.glob("[0-9a-f]" * NAME + ".safetensors*"):
            with suppress(OSError):  # another process makes room too
                stat = file.stat()
                if file.suffix == ".safetensors":
                    found.append((stat.st_mtime_ns, stat.st_size, file))
                elif time.time() - stat.st_mtime > KILLED_AFTER:
                    file.unlink()
                    continue
                seen += stat.st_size
        if seen <= self.room:
            return
        for _, size, file in sorted(found):
            if seen <= 0.9 * self.room:
                break
            with suppress(OSError):
                file.unlink(missing_ok=True)
                seen -= size

    def _file(self, page: str) -> Path:
        name = hashlib.sha256(f"{self.made_by} {page}".encode()).hexdigest()[:NAME]
        return self.folder / f"{name}.safetensors"


def open_cache(options: Any, model: PeftModel, dtype: torch.dtype) -> MemoryCache | FolderCache:  # noqa: ANN401
    """Return the cache of a model's features.

    Args:
        options: `Idefics2Module`'s, of which ``feature_cache`` is given.
        model: whose features it holds.
        dtype: what they are made in.

    Raises:
        InputError: the vision tower is trained, or the folder can't be written.
    """
    if is_vision_trained(model):
        raise InputError(
            "model.feature_cache keeps what a frozen vision tower sees, but model.lora.target_modules train it: leave "
            "one of them out"
        )
    if options.feature_cache == "memory":
        return MemoryCache(options.feature_cache_gb)
    return FolderCache(
        options.feature_cache, options.feature_cache_gb, _made_by(model, dtype, is_compiled=options.compile)
    )


def _made_by(model: PeftModel, dtype: torch.dtype, *, is_compiled: bool) -> str:
    """Describe all that features depend on besides an image and the processor's options: the tower as it is, and code.

    The weights of Idefics2-8b's tower, 0.8 GB in 16 bits, take a second once a run; a file's name, size and time don't
    tell what is in it.
    """
    base: Any = model.get_base_model()
    tower = base.model.vision_model
    digest = hashlib.sha256()
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor.cpu()))
    attention, device = tower.config._attn_implementation, base.device.type
    versions = [f"{library.__name__} {library.__version__}" for library in LIBRARIES]
    return f"{digest.hexdigest()} {tower.config.to_json_string(use_diff=False)} {attention} {versions} " + (
        f"{dtype} {device} {torch.get_float32_matmul_precision()} {is_compiled}"
    )


def _bytes(tensor: Tensor) -> memoryview:
    """Return a CPU tensor's bytes."""
    return tensor.detach().flatten().view(torch.uint8).numpy().data


def _crc32(features: Tensor) -> int:
    return zlib.crc32(_bytes(features), zlib.crc32(f"{features.dtype} {tuple(features.shape)}".encode()))
