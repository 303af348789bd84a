"""Benchmarks and tools are run by hand, most of them on a GPU; here it is checked that what they import exists."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["benchmarks", "tools"])
def test_what_a_script_imports_from_the_package_exists(folder):
    """Also in functions, which importing the script doesn't run."""
    scripts = sorted((ROOT / folder).rglob("*.py"))
    found = [
        (node.module, name.name)
        for script in scripts
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("idefics_lit")
        for name in node.names
    ]
    assert found
    for module, name in found:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")  # else it is a module
