"""Find the splits of ``data.source``: the kind of source is told by its name and files."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from idefics_lit.data.example import Examples
from idefics_lit.data.sources.hub import HubDocVQA, is_saved, load_splits
from idefics_lit.data.sources.official import OfficialDocVQA, find_official_splits
from idefics_lit.data.sources.split_names import split_of_file
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.data.sources.tables import COMPRESSED, TableDocVQA, find_nested_tables, find_tables
from idefics_lit.data.sources.text_files import TABLE_SUFFIXES
from idefics_lit.errors import InputError

# The columns that `datasets` makes of a folder of images or texts.
WITHOUT_QUESTIONS = {"image", "label", "text"}
SPREADSHEETS = (".xlsx", ".xls", ".ods")
# A page has about eight questions. `predict` answers those of the test split in a minute on a CPU.
SYNTHETIC_PAGES = {"train": 2000, "validation": 200, "test": 24}


def find_splits(
    source: str,
    subset: str | None,
    columns: Mapping[str, str] | None,
    language: str,
    seed: int,
    image_root: str | None = None,
) -> dict[str, Callable[[], Examples]]:
    """Return a function for each split that opens it; see `DocVQADataModule` for the arguments.

    Raises:
        InputError: when the source can't be read.
    """
    root = None if image_root is None else Path(image_root)
    if root and not root.is_dir():
        raise InputError(f"data.image_root {image_root}: no such folder")
    name, _, families = source.partition(":")
    if name == "synthetic":
        chosen = {"families": families.split(",")} if families else {}
        return {
            split: partial(SyntheticPages, split, pages, seed, **chosen) for split, pages in SYNTHETIC_PAGES.items()
        }
    if not is_saved(source):
        if official := find_official_splits(Path(source)):
            _warn_of_unread_files(Path(source), [*official.values()])
            return {split: partial(OfficialDocVQA, file, root) for split, file in official.items()}
        if tables := find_tables(Path(source)):
            _warn_of_unread_files(Path(source), [*tables.values()])
            return {
                split: partial(TableDocVQA, file, columns, language, image_root=root) for split, file in tables.items()
            }
        folder, nested = find_nested_tables(source, subset)
        if nested:
            _warn_of_unread_files(Path(folder), [file for files in nested.values() for file in files])
            return {
                split: partial(TableDocVQA, files, columns, language, Path(folder), root)
                for split, files in nested.items()
            }
    splits = load_splits(source, subset)
    local_folder = source if Path(source).exists() else None
    if local_folder and all({*rows.column_names} <= WITHOUT_QUESTIONS for rows in splits.values()):
        files = sorted(path.name for path in Path(source).iterdir() if not path.name.startswith("."))
        raise InputError(
            f"{source}: no questions in {', '.join(files[:3])}: add train.csv, with the columns question, image and "
            f"answers"
        )
    options = {"columns": columns, "language": language, "folder": image_root or local_folder}
    return {split: partial(HubDocVQA, rows, f"{source} {split}", **options) for split, rows in splits.items()}


def _warn_of_unread_files(folder: Path, read: Sequence[Path]) -> None:
    """Warn of files that may be splits but aren't read, because of their name, format or subfolder.

    Args:
        folder: the source.
        read: the files that are read.
    """
    if not folder.is_dir():
        return
    suffix = read[0].suffix
    resolved, stems = {file.resolve() for file in read}, {file.stem for file in read}
    default = "validation" if "train" in map(split_of_file, read) else "train"
    unread = []
    for path in sorted(folder.iterdir()):
        split = split_of_file(path)
        for file in sorted(path.iterdir()) if split and path.is_dir() else [path]:
            unpacked = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
            # A JSON file in a subfolder, or without the name of a split, may belong to one page.
            json_suffixes = [".json"] if split and file is path and suffix != ".json" else []
            suffixes = (*TABLE_SUFFIXES, *SPREADSHEETS, ".parquet", ".arrow", *json_suffixes)
            is_data = unpacked.suffix.lower() in suffixes and unpacked.stem not in stems
            if is_data and file.resolve() not in resolved and not file.name.startswith((".", "~")):
                unread.append((str(file.relative_to(folder)), split or default))
    if unread:
        names, split = ", ".join(name for name, _ in unread[:3]), unread[0][1]
        rank_zero_warn(
            f"{folder}: not read beside {read[0].name}: {names}. If it is a split, save it in the same form as "
            f"{split}{suffix}"
        )
