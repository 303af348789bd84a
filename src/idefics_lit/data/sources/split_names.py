"""The names of splits, in the names of files and in data sets."""

import re
from pathlib import Path

VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")
# Other spellings of a name.
SPELLINGS = {"training": "train", "testing": "test", "evaluation": "eval"}
# Not within a word: values.csv is no validation split, and contest.csv no test split.
SPLIT_NAME = re.compile(rf"(?<![a-z])(?:{'|'.join(('train', 'test', *SPELLINGS, *VALIDATION_NAMES))})(?![a-z])")


def split_of_file(file: Path) -> str | None:
    """Return the split that a file's name begins with, or else the only one that it holds; None if there is none."""
    name = file.name.lower()
    found = {SPELLINGS.get(split, split) for split in SPLIT_NAME.findall(name)}
    if first := SPLIT_NAME.match(name):
        return SPELLINGS.get(first[0], first[0])
    return found.pop() if len(found) == 1 else None
