"""Caches of the features of pages, in memory or in a folder that runs share.

A page recurs with each of its questions and in every epoch. Its features take 2 bytes x patches x width: 8.7 MB for a
page of Idefics2-8b, and 1.25 MB for a page of SmolVLM-256M whose connector is frozen too.
"""

import errno
import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from idefics_lit.errors import InputError, first_line
from idefics_lit.model.loader_cache import StoredKeys
from idefics_lit.utils.files import STALE_AFTER, replacing

Device = torch.device | str

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
EVICTION_INTERVAL = 0.01  # share of a folder's limit that a process writes between two checks of the folder's size
NAME_LENGTH = 40  # characters of a file name, without its suffix


class MemoryCache:
    """Cache tensors by key in pinned memory until it is full. Nothing is evicted.

    Pages recur once an epoch: evicting the oldest would evict pages shortly before they recur.

    Args:
        gigabytes: the maximum size, in 10^9 bytes.
    """

    def __init__(self, gigabytes: float) -> None:
        max_bytes = gigabytes * 1e9
        # torch rounds allocations of pinned memory up to powers of two, up to twice a page's size. Pages share slabs
        # instead.
        self.slab_bytes = 1 << max(0, int(min(max_bytes / 8, 2**29)).bit_length() - 1)
        self.max_slabs = int(max_bytes / self.slab_bytes)
        self._slabs: list[Tensor] = []
        self._used = self.slab_bytes
        self._features: dict[str, Tensor] = {}
        self._keys_folder = tempfile.TemporaryDirectory(prefix="idefics_lit_keys_")
        self._stored_keys = StoredKeys(self._keys_folder.name)

    @property
    def loader_get(self) -> Callable[[str], Tensor | None]:
        """`StoredKeys.get`, for the loader's processes, which don't share this memory."""
        return self._stored_keys.get

    def get(self, page: str, device: Device = "cpu") -> Tensor | None:
        """Return a copy of a page's features on a device, or None.

        The copy is made in the device's current stream, as in `put`: features that a GPU has put are for that GPU.
        """
        cached = self._features.get(page)
        # copy=True also from CPU to CPU: the caller may change the features.
        return None if cached is None else cached.to(device, non_blocking=True, copy=True)

    def put(self, page: str, features: Tensor) -> None:
        """Store a page's features; the copy is non-blocking, so reads must be in the same stream."""
        if page in self._features or features.nbytes > self.slab_bytes:
            return
        if self._used + features.nbytes > self.slab_bytes:
            if len(self._slabs) == self.max_slabs:
                return
            self._slabs.append(torch.empty(self.slab_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))
            self._used = 0
        cached = self._slabs[-1][self._used : self._used + features.nbytes].view(features.dtype).view(features.shape)
        cached.copy_(features.detach(), non_blocking=True)
        self._used += -(-features.nbytes // 64) * 64  # a view's start must suit its dtype
        self._features[page] = cached
        self._stored_keys.add(page)


class FolderCache:
    """Cache tensors by key in a folder that runs share; the least recently used are evicted first.

    Files are written under a temporary name and renamed, so processes may write at once and may be killed. A file that
    can't be read or has a wrong checksum is a miss. On a full disk, features are not stored. Each process may exceed
    the common limit by a hundredth of it, or by a page.

    Args:
        folder: created if missing.
        gigabytes: the maximum size, in 10^9 bytes.
        key_prefix: identifies everything that features depend on besides the page.

    Raises:
        InputError: the folder can't be written, except when the disk is full.
    """

    def __init__(self, folder: str, gigabytes: float, key_prefix: str) -> None:
        self.folder, self.max_bytes, self.key_prefix = Path(folder), gigabytes * 1e9, key_prefix
        self._is_warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise InputError(f"model.feature_cache {folder}: can't be written: {first_line(error)}") from error
        self._evict()

    @property
    def loader_get(self) -> Callable[[str], Tensor | None]:
        """`get`, for the loader's processes: a file that they have read may be evicted afterwards."""
        return self.get

    def get(self, page: str, device: Device = "cpu") -> Tensor | None:
        """Return a page's features on a device, or None."""
        file = self._file(page)
        try:
            stored = load(file.read_bytes())  # not memory-mapped: a truncated file would be a bus error
            features = stored["features"]
            if stored["crc32"].item() != _crc32(features):
                return None
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            return None
        with suppress(OSError):  # the file may belong to another user
            os.utime(file)
        return features.to(device, non_blocking=True)

    def put(self, page: str, features: Tensor) -> None:
        """Store a page's features."""
        # A copy: a slice would be saved with the storage of its batch.
        features = features.detach().to("cpu", copy=True).contiguous()
        stored = save({"features": features, "crc32": torch.tensor(_crc32(features))})
        if len(stored) > self.max_bytes:
            return
        try:
            with replacing(self._file(page), durable=False) as file:  # a truncated file is a miss
                file.write(stored)
        except InputError as error:
            if not self._is_warned:
                rank_zero_warn(
                    f"model.feature_cache: {error}, or lower model.feature_cache_gb. Until then, pages that aren't "
                    f"in the cache are encoded again."
                )
            self._is_warned = True
            return
        self._bytes_written += len(stored)
        if self._bytes_written > EVICTION_INTERVAL * self.max_bytes:
            self._evict()

    def _evict(self) -> None:
        """Delete the least recently used files of all processes, and unfinished files of killed ones.

        The folder shrinks to 0.9 of the limit, so that files aren't deleted at every page.
        """
        self._bytes_written, total, files = 0, 0, []
        for file in self.folder.glob("[0-9a-f]" * NAME_LENGTH + ".safetensors*"):
            with suppress(OSError):  # another process may delete the file
                stat = file.stat()
                if file.suffix == ".safetensors":
                    files.append((stat.st_mtime_ns, stat.st_size, file))
                elif time.time() - stat.st_mtime > STALE_AFTER:
                    file.unlink()
                    continue
                total += stat.st_size
        if total <= self.max_bytes:
            return
        for _, size, file in sorted(files):
            if total <= 0.9 * self.max_bytes:
                break
            with suppress(OSError):
                file.unlink(missing_ok=True)
                total -= size

    def _file(self, page: str) -> Path:
        name = hashlib.sha256(f"{self.key_prefix} {page}".encode()).hexdigest()[:NAME_LENGTH]
        return self.folder / f"{name}.safetensors"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a CPU tensor's bytes."""
    return tensor.detach().flatten().view(torch.uint8).numpy().data


def _crc32(features: Tensor) -> int:
    return zlib.crc32(tensor_bytes(features), zlib.crc32(f"{features.dtype} {tuple(features.shape)}".encode()))
