"""Keys that identify a page: digests of its pixels or of its file's content."""

import hashlib
import os
from collections import Counter
from collections.abc import Hashable, Iterable
from contextlib import suppress
from pathlib import Path

from PIL import Image


def page_digest(image: Image.Image) -> str:
    """Return a digest of an image's pixels, whatever file or object they are in."""
    palette = f"{image.mode} {image.size} {image.getpalette()} {image.info.get('transparency')}"
    return digest_bytes(palette.encode(), image.tobytes())


def digest_bytes(*contents: bytes) -> str:
    """Return a digest of the concatenated contents."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return f"sha256:{digest.hexdigest()}"


def digest_file(file: str | Path) -> str:
    """Return the digest of a file's content."""
    with open(file, "rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def file_keys(files: Iterable[str | Path]) -> dict[str | Path, Hashable]:
    """Return a key of each file, the same for all paths of one file and for copies of it.

    Only files of equal size are read, since others can't be copies. Files that don't exist have no key.
    """
    identities: dict[str | Path, tuple[Hashable, ...]] = {}
    for file in files:
        with suppress(OSError, ValueError):
            stat = os.stat(file)
            # Some network file systems have no inode numbers, or change them.
            inode = stat.st_ino or os.path.realpath(file)
            identities[file] = stat.st_size, stat.st_mtime_ns, stat.st_dev, inode
    sizes = Counter(size for size, *_ in set(identities.values()))
    keys: dict[Hashable, Hashable] = {}
    for file, identity in identities.items():
        if identity not in keys:
            keys[identity] = identity
            if sizes[identity[0]] > 1:
                with suppress(OSError):  # an unreadable file is reported when its example is requested
                    keys[identity] = digest_file(file)
    return {file: keys[identity] for file, identity in identities.items()}
