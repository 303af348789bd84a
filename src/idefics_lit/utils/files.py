"""Write files atomically."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from idefics_lit.errors import InputError


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` once it is written; until then ``path`` is unchanged.

    A process that is killed while writing leaves ``path`` unchanged and a file ending in ``.tmp``.

    Args:
        path: the file; missing folders are created.
        durable: call fsync, so that after a power failure ``path`` is either the old or the new file.

    Raises:
        InputError: the file can't be written, for example on a full disk; ``path`` is unchanged.
    """
    # A random name, since other processes may write the same file. Process ids recur in containers.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
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
