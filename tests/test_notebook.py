"""The notebook: what CI executes on a CPU, and what it would type on a GPU."""

import os
import re
import shlex
import shutil
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest
import torch
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

from idefics_lit.cli.main import main

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "docvqa_colab.ipynb"


@pytest.fixture
def code():
    """The code cells' sources."""
    return {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"}


def test_it_is_valid_and_holds_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.colab.gpuType == "T4"
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.parametrize("gpu", [False, True])
def test_every_command_is_understood(code, gpu, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    names = {"best": "best.ckpt", "PAGE": "page.png", "QUESTION": "'What is the date?'"}
    exec(code["config"], names)
    commands = re.findall(r"^!python -m idefics_lit (.*)$", "\n".join(code.values()), flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["fit", "validate", "ask", "export"]
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([*shlex.split(command.format(**names)), "--print_config"])
        assert stop.value.code == 0
        assert "trainer:" in capsys.readouterr().out


def test_the_cells_that_create_folders_run_twice(code, tmp_path, monkeypatch):
    """With folders in place of the clone and of the exported adapter; both commands refuse a folder that exists."""
    created = {"git": "idefics_lit/configs", "python": "my-adapter"}

    def shell(command):
        if folder := created.get(command.split()[0]):
            Path(folder).mkdir(parents=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")  # the notebook sets it; so that it is restored
    names = {"shell": shell, "best": "best.ckpt", "HARDWARE": ""}
    for cell in ("install", "install", "export", "export", "new kernel", "install"):
        if cell == "new kernel":
            monkeypatch.chdir(tmp_path)
            continue
        source = code[cell].replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/idefics_lit"')
        exec(re.sub(r"^( *)[!%](.*)$", r'\1shell(f"\2")', source, flags=re.MULTILINE), names)
        assert Path.cwd() == tmp_path / "idefics_lit"
    assert Path("my-adapter").is_dir()


@pytest.mark.long
def test_it_runs_without_a_gpu(tmp_path):
    """In a copy of the repository and an environment of its own, over this one's packages."""
    for name in ("configs", "notebooks", "src", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True, symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": environment})
    Path(packages, "these.pth").write_text(sysconfig.get_path("purelib"))
    changed = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    kernel = AsyncKernelManager(kernel_name="python3")
    kernel.kernel_spec.argv[0] = str(environment / "bin" / "python")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, km=kernel, timeout=600, resources={"metadata": {"path": tmp_path / "notebooks"}})
    client.execute(env={name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | changed)

    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert {output.get("name", "stdout") for of_cell in outputs.values() for output in of_cell} == {"stdout"}
    text = {cell: "".join(output.get("text", "") for output in of_cell) for cell, of_cell in outputs.items()}
    text = {cell: re.sub(r"\x1b\[[\d;?]*\w", "", coloured) for cell, coloured in text.items()}
    del text["install"]  # what pip says of its own
    assert not re.search(r"^error:|Traceback|Warning\b", "\n".join(text.values()), flags=re.MULTILINE), text
    drawn = [cell for cell in outputs if any("image/png" in output.get("data", {}) for output in outputs[cell])]
    assert drawn == ["data", "curves"]
    assert Path(tmp_path, "lightning_logs", "version_0", "checkpoints", "best.ckpt").exists()
    before, after = re.search(r"│ all +│ ([\d.]+) +│ ([\d.]+) +│", text["fit"]).groups()
    assert float(after) >= float(before) + 0.2
    assert re.search(r"val/anls\W+(\d\.\d+)", text["validate"])
    assert "page.png" in text["ask"]
    assert "adapter_model.safetensors" in text["export"]
