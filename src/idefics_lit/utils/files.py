"""Files that are there as a whole or not at all."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from idefics_lit.errors import InputError

KILLED_AFTER = 3600  # seconds: an unfinished file that is as old is a killed writer's


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when all is written and on disk; until then ``path`` is as it was.

    A process that is killed meanwhile leaves ``path`` and a file ending in ``.tmp``, which the next one removes that
    writes to the folder an hour later.

    Args:
        path: the file; folders are made.
        durable: wait for the disk, so that a power cut leaves one of the two files whole too; and look for what killed
            processes have left.

    Raises:
        InputError: the file can't be written, as on a full disk; nothing but the old one is left then.
    """
    # Others may write the same file. A process id doesn't tell them apart: the first one of every container is 1.
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
        if durable and os.name == "posix":  # the new name must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        kept = "what was there is as it was" if path.exists() else "nothing is left of it"
        raise InputError(f"{path} can't be written: {error.strerror or error}; {kept}: make room") from error


def _remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left in a folder: files of the size of a checkpoint."""
    for file in folder.glob("*." + "[0-9a-f]" * 16 + ".tmp"):
        with suppress(OSError):  # another process removes it too
            if time.time() - file.stat().st_mtime > KILLED_AFTER:
                file.unlink()
