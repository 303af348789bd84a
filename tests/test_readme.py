"""What the README says is there; test_docs.py types what it says can be typed."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_of_reuse_runs(tmp_path, tiny):
    example = ROOT / "examples" / "reuse.py"
    assert len(example.read_text().splitlines()) <= 40
    done = subprocess.run([sys.executable, example, tiny], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"ANLS \d\.\d{3}", done.stdout)


def test_every_file_that_is_named_is_there():
    for path in re.findall(r"(?:configs|docs|examples|benchmarks|tools|tests)/[\w./-]+\.\w+", README):
        assert (ROOT / path).exists(), path


def test_the_tree_is_the_packages():
    modules = {path.name for path in (ROOT / "src" / "idefics_lit").rglob("*.py") if path.parent.name != "pages"}
    tree = next(code for language, code in BLOCKS if language == "text")
    assert modules - {"__init__.py", "__main__.py"} <= set(re.findall(r"\w+\.py", tree))
