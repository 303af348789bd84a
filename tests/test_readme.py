"""README.md: the paths that it names exist. test_docs.py runs its commands, test_examples.py the examples."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_named_files_exist():
    paths = re.findall(r"(?:configs|docs|examples|benchmarks|tools|tests|src|notebooks)/[\w./-]+\.\w+", README)
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def layout():
    """The paths of the repository layout; two spaces of indentation are one level."""
    (block,) = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)
    parents = []
    for line in block.splitlines():
        names, *_ = re.split(r" {2,}", line.strip())  # the second column describes them
        depth = (len(line) - len(line.lstrip())) // 2
        for name in names.split(", "):
            parents[depth:] = [name]
            yield "".join(parents)


def test_the_layout_names_existing_files_and_every_package():
    paths = list(layout())
    assert not [path for path in paths if not (ROOT / path).exists()]
    packages = {f"src/idefics_lit/{init.parent.name}/" for init in (ROOT / "src/idefics_lit").glob("*/__init__.py")}
    assert packages
    assert packages <= {*paths}
