"""What the frozen vision tower makes of a page, kept: in memory, or in a folder that runs share.

A page comes again with its other questions and in every epoch; its features are 2 bytes x patches x width, 8.7 MB for a
page of Idefics2-8b.
"""

import hashlib
import os
import tempfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from idefics_lit.errors import InputError, first_line


class FeatureCache:
    """Tensors by key, the least recently used ones dropped when there are too many.

    A folder's files are written under another name and renamed, so that a killed writer leaves nothing wrong and two
    processes may write at once; what can't be read is a miss.

    Args:
        place: "memory", or a folder, made if missing.
        gigabytes: the most to keep, in 10^9 bytes.
        made_by: everything besides the page that features depend on.

    Raises:
        InputError: the folder can't be written.
    """

    def __init__(self, place: str, gigabytes: float, made_by: str) -> None:
        self.folder = None if place == "memory" else Path(place)
        self.room = gigabytes * 1e9
        self.made_by = made_by
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0.0
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder):
                    pass
            except OSError as error:
                raise InputError(f"model.feature_cache {place}: can't be written: {first_line(error)}") from error
            self._bytes = sum(stat.st_size for stat, _ in self._files())

    def get(self, page: str) -> Tensor | None:
        """Return a page's features, on the CPU, or None."""
        name = self._name(page)
        if self.folder is None:
            if name in self._memory:
                self._memory.move_to_end(name)
            return self._memory.get(name)
        file = self.folder / name
        try:
            features = load_file(file)["features"]
            os.utime(file)
        except (OSError, SafetensorError, KeyError):
            return None
        return features

    def put(self, page: str, features: Tensor) -> None:
        """Keep a page's features."""
        # A copy: a slice would keep all of the batch it was made in.
        name, features = self._name(page), features.detach().to("cpu", copy=True).contiguous()
        if self.folder is None:
            if name not in self._memory:
                self._bytes += features.nbytes
            self._memory[name] = features
            while self._bytes > self.room and len(self._memory) > 1:
                self._bytes -= self._memory.popitem(last=False)[1].nbytes
            return
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        os.close(handle)
        try:
            save_file({"features": features}, temporary)
            os.replace(temporary, self.folder / name)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"model.feature_cache {self.folder}: can't be written ({first_line(error)}): lower "
                f"model.feature_cache_gb or leave it out"
            ) from error
        finally:
            Path(temporary).unlink(missing_ok=True)
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
        assert self.folder is not None
        found = []
        for file in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process makes room too
                found.append((file.stat(), file))
        return found

    def _name(self, page: str) -> str:
        return hashlib.sha256(f"{self.made_by} {page}".encode()).hexdigest()[:40] + ".safetensors"
