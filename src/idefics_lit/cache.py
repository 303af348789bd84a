"""What the frozen vision tower makes of a page, kept: in memory, or in a folder that runs share.

A page comes again with its other questions and in every epoch; its features are 2 bytes x patches x width, 8.7 MB for a
page of Idefics2-8b.
"""

import hashlib
import os
import tempfile
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from idefics_lit.errors import InputError, first_line
from idefics_lit.files import replacing
from idefics_lit.model import is_vision_trained
from idefics_lit.pretrained import fingerprint


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

    def get(self, page: str) -> Tensor | None:
        """Return a page's features, or None."""
        return self._found.get(page)

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
    write at once; what can't be read is a miss.

    Args:
        folder: made if missing.
        gigabytes: the most to keep, in 10^9 bytes.
        made_by: everything besides the page that features depend on.

    Raises:
        InputError: the folder can't be written.
    """

    def __init__(self, folder: str, gigabytes: float, made_by: str) -> None:
        self.folder, self.room, self.made_by = Path(folder), gigabytes * 1e9, made_by
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise InputError(f"model.feature_cache {folder}: can't be written: {first_line(error)}") from error
        self._bytes = sum(stat.st_size for stat, _ in self._files())

    def get(self, page: str) -> Tensor | None:
        """Return a page's features, on the CPU, or None."""
        file = self._file(page)
        try:
            features = load_file(file)["features"]
            os.utime(file)
        except (OSError, SafetensorError, KeyError):
            return None
        return features

    def put(self, page: str, features: Tensor) -> None:
        """Keep a page's features."""
        # A copy: a slice would keep all of the batch it was made in.
        stored = save({"features": features.detach().to("cpu", copy=True).contiguous()})
        try:
            with replacing(self._file(page), durable=False) as file:  # what is cut off is a miss
                file.write(stored)
        except InputError as error:
            raise InputError(f"model.feature_cache: {error}, lower model.feature_cache_gb, or leave it out") from error
        self._bytes += features.nbytes
        if self._bytes > self.room:
            self._make_room()

    def _make_room(self) -> None:
        """Drop the files that were used longest ago, a tenth more than needed so that it isn't done at every page."""
        found = self._files()
        self._bytes = sum(stat.st_size for stat, _ in found)
        for stat, file in sorted(found, key=lambda pair: pair[0].st_mtime_ns):
            if self._bytes <= 0.9 * self.room:
                break
            file.unlink(missing_ok=True)
            self._bytes -= stat.st_size

    def _files(self) -> list[tuple[os.stat_result, Path]]:
        found = []
        for file in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process makes room too
                found.append((file.stat(), file))
        return found

    def _file(self, page: str) -> Path:
        name = hashlib.sha256(f"{self.made_by} {page}".encode()).hexdigest()[:40]
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
    revision = getattr(model.get_base_model().config, "_commit_hash", None) or fingerprint(options.pretrained)
    quantized = options.quantization if options.quantize_vision else "none"
    made_by = f"{options.pretrained} {revision} {dtype} {quantized}"
    return FolderCache(options.feature_cache, options.feature_cache_gb, made_by)
