"""The names that `idefics_lit` exports, and what importing it loads."""

import subprocess
import sys

import pytest

import idefics_lit

EXPORTED = {
    *("ANLS", "DocVQADataModule", "Example", "Idefics2Collator", "Idefics2Module", "InputError", "LoRA"),
    *("anls", "export_adapter", "load_processor"),
}


def run_python(code):
    """Return what a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_package_exports_the_public_api():
    assert set(idefics_lit.__all__) == EXPORTED
    assert set(dir(idefics_lit)) >= EXPORTED


def test_importing_the_package_loads_no_libraries():
    code = "import sys, idefics_lit; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run_python(code).split())
    assert "idefics_lit" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "lightning", "peft", "bitsandbytes", "numpy", "PIL"})


def test_star_import_gives_every_exported_name():
    code = f"from idefics_lit import *; assert {EXPORTED!r} <= set(globals()); print(Idefics2Module.__module__)"
    assert run_python(code) == "idefics_lit.training.module\n"


def test_an_exported_name_is_the_object_of_its_module():
    from idefics_lit.metrics import anls
    from idefics_lit.model.loading import LoRA

    assert idefics_lit.anls is anls
    assert idefics_lit.LoRA is LoRA


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'idefics_lit' has no attribute 'Idefics3Module'"):
        _ = idefics_lit.Idefics3Module
    with pytest.raises(ImportError, match="Idefics3Module"):
        from idefics_lit import Idefics3Module  # noqa: F401
