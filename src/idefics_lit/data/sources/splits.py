"""Find the splits of ``data.source``: the kind of source is told by its name and files."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from idefics_lit.data.example import Examples
from idefics_lit.data.sources.hub import HubDocVQA, is_saved, load_splits
from idefics_lit.data.sources.official import OfficialDocVQA, find_official_splits
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.data.sources.tables import TableDocVQA, find_nested_tables, find_tables

SYNTHETIC_PAGES = {"train": 2000, "validation": 200, "test": 200}


def find_splits(
    source: str, subset: str | None, columns: Mapping[str, str] | None, language: str, seed: int
) -> dict[str, Callable[[], Examples]]:
    """Return a function for each split that opens it; see `DocVQADataModule` for the arguments.

    Raises:
        InputError: when the source can't be read.
    """
    name, _, families = source.partition(":")
    if name == "synthetic":
        options = {"families": families.split(",")} if families else {}
        return {
            split: partial(SyntheticPages, split, pages, seed, **options) for split, pages in SYNTHETIC_PAGES.items()
        }
    if not is_saved(source):
        if official := find_official_splits(Path(source)):
            return {split: partial(OfficialDocVQA, file) for split, file in official.items()}
        if tables := find_tables(Path(source)):
            return {split: partial(TableDocVQA, file, columns, language) for split, file in tables.items()}
        folder, nested = find_nested_tables(source, subset)
        if nested:
            return {
                split: partial(TableDocVQA, files, columns, language, Path(folder)) for split, files in nested.items()
            }
    local_folder = source if Path(source).exists() else None
    return {
        split: partial(HubDocVQA, rows, f"{source} {split}", columns, language, local_folder)
        for split, rows in load_splits(source, subset).items()
    }
