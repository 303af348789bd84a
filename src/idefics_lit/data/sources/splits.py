"""Find the splits of ``data.source``: the kind of source is told by its name and files."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.data.example import Examples
from idefics_lit.data.sources.hub import HubDocVQA, is_saved, load_splits
from idefics_lit.data.sources.official import OfficialDocVQA, find_official_splits
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.data.sources.tables import COMPRESSED, TableDocVQA, find_nested_tables, find_tables
from idefics_lit.data.sources.text_files import TABLE_SUFFIXES

# Beginnings of file names that stand for splits, here or for `datasets`, with the name that is read here.
SPLIT_PREFIXES = {"train": "train", "val": "validation", "dev": "validation", "eval": "test", "test": "test"}
# A page has about eight questions. `predict` answers those of the test split in a minute on a CPU.
SYNTHETIC_PAGES = {"train": 2000, "validation": 200, "test": 24}


def find_splits(
    source: str, subset: str | None, columns: Mapping[str, str] | None, language: str, seed: int
) -> dict[str, Callable[[], Examples]]:
    """Return a function for each split that opens it; see `DocVQADataModule` for the arguments.

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
        if official := find_official_splits(Path(source)):
            _warn_of_unread_files(Path(source), [*official.values()])
            return {split: partial(OfficialDocVQA, file) for split, file in official.items()}
        if tables := find_tables(Path(source)):
            _warn_of_unread_files(Path(source), [*tables.values()])
            return {split: partial(TableDocVQA, file, columns, language) for split, file in tables.items()}
        folder, nested = find_nested_tables(source, subset)
        if nested:
            _warn_of_unread_files(Path(folder), [file for files in nested.values() for file in files])
            return {
                split: partial(TableDocVQA, files, columns, language, Path(folder)) for split, files in nested.items()
            }
    options = {"columns": columns, "language": language, "folder": source if Path(source).exists() else None}
    return {
        split: partial(HubDocVQA, rows, f"{source} {split}", **options)
        for split, rows in load_splits(source, subset).items()
    }


def _warn_of_unread_files(folder: Path, read: Sequence[Path]) -> None:
    """Warn of files that look like splits but aren't read, because of their name, format or subfolder.

    Args:
        folder: the source.
        read: the files that are read.
    """
    if not folder.is_dir():
        return
    suffix = read[0].suffix
    resolved, stems = {file.resolve() for file in read}, {file.stem for file in read}
    unread = []
    for path in sorted(folder.iterdir()):
        split = next((split for prefix, split in SPLIT_PREFIXES.items() if path.name.lower().startswith(prefix)), None)
        for file in sorted(path.iterdir()) if split and path.is_dir() else [path]:
            unpacked = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
            # A JSON file in a subfolder may belong to one page.
            json_suffixes = [".json"] if file is path and suffix != ".json" else []
            suffixes = (*TABLE_SUFFIXES, ".parquet", ".arrow", *json_suffixes)
            is_data = unpacked.suffix.lower() in suffixes and unpacked.stem not in stems
            if split and is_data and file.resolve() not in resolved:
                unread.append((str(file.relative_to(folder)), split))
    if unread:
        names, split = ", ".join(name for name, _ in unread[:3]), unread[0][1]
        rank_zero_warn(
            f"{folder}: not read beside {read[0].name}: {names}. If it is a split, save it in the same form as "
            f"{split}{suffix}"
        )
