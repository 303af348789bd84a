"""Write files and folders atomically, and find files under another form of their name."""

import os
import secrets
import shutil
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from safetensors import SafetensorError

from idefics_lit.errors import InputError, first_line

STALE_AFTER = 3600  # seconds after which an unfinished file belongs to a killed process


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` once it is written; until then ``path`` is unchanged.

    A process that is killed while writing leaves ``path`` unchanged and a file ending in ``.tmp``, which a later
    durable write, or a `new_folder`, in the same folder removes after an hour.

    Args:
        path: the file; missing folders are created.
        durable: call fsync, so that after a power failure ``path`` is either the old or the new file; and remove files
            that killed processes left in the folder.

    Raises:
        InputError: the file can't be written, for example on a full disk; ``path`` is unchanged.
    """
    # A random name, since other processes may write the same file. Process ids recur in containers.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if durable:
                _remove_unfinished(path.parent)
            with temporary.open("xb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if durable and os.name == "posix":  # makes the new name durable
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        state = "the old file is unchanged" if path.exists() else "no file is left"
        raise InputError(f"{path} can't be written: {error.strerror or error}; {state}: free disk space") from error


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Make a temporary folder that is renamed to ``path`` once its files are written.

    A process that is killed before leaves a hidden folder ending in ``.tmp``, see `replacing`.

    Args:
        path: the folder; it must be empty or not exist.

    Raises:
        InputError: ``path`` exists and isn't an empty folder, or it can't be written; the temporary folder is deleted.
    """
    final = Path(path).absolute()
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(8)}.tmp")
    try:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise InputError(f"output {path} exists already: name a new folder, or empty it")
        temporary.mkdir(parents=True)
        _remove_unfinished(temporary.parent)
        try:
            yield temporary
            if final.exists():
                final.rmdir()
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"output {path} can't be written: {reason}; the output was deleted: make room on the disk"
        ) from error


def _remove_unfinished(folder: Path) -> None:
    """Remove files and folders that killed processes left in a folder; they are as large as checkpoints and models."""
    for path in folder.glob("*." + "[0-9a-f]" * 16 + ".tmp"):
        with suppress(OSError):  # another process removes it too
            written = max(file.stat().st_mtime for file in (path, *path.glob("*")))
            if time.time() - written > STALE_AFTER:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_similar_file(path: Path) -> Path | None:
    """Return a file whose path differs from a missing one's only in case, Unicode form or %-escapes, if there is one.

    macOS decomposes accents in the names of files, and other systems tell upper from lower case.
    """
    if path.parent == path:
        return None
    parent = path.parent if os.path.isdir(path.parent) else find_similar_file(path.parent)
    if parent is None:
        return None
    try:
        name = _names(parent, parent.stat().st_mtime_ns).get(_simplified(path.name))
    except OSError:
        return None
    return parent / name if name else None


@lru_cache(maxsize=8)
def _names(folder: Path, modified: int) -> dict[str, str]:
    """Return the names in a folder by their simplified form; a data set may name many missing files."""
    return {_simplified(name): name for name in sorted(os.listdir(folder))}


def _simplified(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(name)).casefold())
