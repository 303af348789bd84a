"""What the loader's processes know of the feature cache, so that they don't process pages whose features are cached.

These classes import little, since the workers may start before the model is imported.
"""

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


class StoredKeys:
    """The keys of a `MemoryCache`, which the loader's processes see: an empty file for each in a temporary folder.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def add(self, page: str) -> None:
        """Add the key of a page that is stored for good."""
        with suppress(OSError):  # without its file the loader processes the page again
            self._file(page).touch()

    def get(self, page: str) -> Tensor | None:
        """Return an empty tensor in place of a page's features if they are stored, otherwise None."""
        return torch.empty(0) if self._file(page).exists() else None

    def _file(self, page: str) -> Path:
        return self.folder / hashlib.sha256(page.encode()).hexdigest()


class LoaderCache:
    """Looks up cached features in the loader's processes, which may start before the cache is opened.

    The model's process shares the cache through a file in a temporary folder.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="idefics_lit_cache_")
        self._file = Path(self._folder.name) / "loader_get"
        self._get: Callable[[str], Tensor | None] | None = None

    def share(self, loader_get: Callable[[str], Tensor | None]) -> None:
        """Let all processes look features up with a cache's ``loader_get``."""
        written = self._file.with_suffix(".tmp")
        written.write_bytes(pickle.dumps(loader_get))
        os.replace(written, self._file)

    def get(self, key: str) -> Tensor | None:
        """Return the cached features of an image, an empty tensor in their place, or None; see `Batch`."""
        if self._get is None:
            with suppress(FileNotFoundError):
                self._get = pickle.loads(self._file.read_bytes())
        return self._get(key) if self._get else None

    def __getstate__(self) -> dict[str, object]:
        """Leave out the folder's owner, which deletes it."""
        return {"_file": self._file, "_get": None}
