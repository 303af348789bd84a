"""What ``data.source`` names: the splits that it has, and how each is opened."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.data.example import Examples
from idefics_lit.data.sources.hub import HubDocVQA, is_saved, load_splits
from idefics_lit.data.sources.official import OfficialDocVQA, find_official_splits
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.data.sources.tables import PACKED, TableDocVQA, find_nested_tables, find_tables
from idefics_lit.data.sources.text_files import KINDS

SYNTHETIC_PAGES = {"train": 2000, "validation": 200, "test": 200}
# What the names of splits begin with, here or for `datasets`, and what such a split is called here.
SPLIT_NAMES = {"train": "train", "val": "validation", "dev": "validation", "eval": "test", "test": "test"}


def find_splits(
    source: str, subset: str | None, columns: Mapping[str, str] | None, language: str, seed: int
) -> dict[str, Callable[[], Examples]]:
    """Return how to open each split; see `DocVQADataModule` for the arguments.

    Raises:
        InputError: when the source can't be read.
    """
    name, _, families = source.partition(":")
    if name == "synthetic":
        chosen = {"families": families.split(",")} if families else {}
        return {
            split: partial(SyntheticPages, split, pages, seed, **chosen) for split, pages in SYNTHETIC_PAGES.items()
        }
    if not is_saved(source):
        if files := find_official_splits(Path(source)):
            _warn_of_unread(Path(source), files.values())
            return {split: partial(OfficialDocVQA, file) for split, file in files.items()}
        if files := find_tables(Path(source)):
            _warn_of_unread(Path(source), files.values())
            return {split: partial(TableDocVQA, file, columns, language) for split, file in files.items()}
        root, nested = find_nested_tables(source, subset)
        if nested:
            _warn_of_unread(Path(root), [file for some in nested.values() for file in some])
            return {split: partial(TableDocVQA, some, columns, language, Path(root)) for split, some in nested.items()}
    folder = source if Path(source).exists() else None
    return {
        split: partial(HubDocVQA, rows, f"{source} {split}", columns, language, folder)
        for split, rows in load_splits(source, subset).items()
    }


def _warn_of_unread(source: Path, read: Collection[Path]) -> None:
    """Name the files that look like splits and aren't read beside those that are, in any form or folder."""
    if not source.is_dir():
        return
    own = next(iter(read)).suffix
    known, copies = {file.resolve() for file in read}, {file.stem for file in read}
    unread = []
    for path in sorted(source.iterdir()):
        split = next((split for start, split in SPLIT_NAMES.items() if path.name.lower().startswith(start)), None)
        for file in sorted(path.iterdir()) if split and path.is_dir() else [path]:
            unpacked = file.with_suffix("") if file.suffix.lower() in PACKED else file
            # A JSON in a folder may be of one page.
            forms = (*KINDS, ".parquet", ".arrow", *([".json"] if file is path and own != ".json" else []))
            found = unpacked.suffix.lower() in forms and unpacked.stem not in copies
            if split and found and file.resolve() not in known:
                unread.append((str(file.relative_to(source)), split))
    if unread:
        names, (_, split) = ", ".join(name for name, _ in unread[:3]), unread[0]
        rank_zero_warn(
            f"{source}: not read beside {next(iter(read)).name}: {names}. If it is a split, save it in the same form "
            f"as {split}{own}"
        )
