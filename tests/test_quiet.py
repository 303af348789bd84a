"""The library prints no more than Lightning does with any module: no messages of the other libraries that it calls."""

import re
import subprocess
import sys
from pathlib import Path

import idefics_lit

CODE = """
import sys
from idefics_lit import DocVQADataModule, Idefics2Module
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
Trainer(max_steps=2, accelerator="cpu", limit_val_batches=1, **quiet).fit(BoringModel())
print("====", file=sys.stderr, flush=True)
module = Idefics2Module("tiny", warmup_steps=0, max_new_tokens=2, gradient_checkpointing=True)
data = DocVQADataModule("synthetic:form", "tiny", limit_train=4, limit_val=2, num_workers=0)
Trainer(max_steps=2, accelerator="cpu", **quiet).fit(module, data)
module.answer(data.examples["val"][0].images[0], "What is the date?")
"""


def test_every_module_imports_bitsandbytes_quietly():
    """bitsandbytes logs on CPUs that have a kernel for it; peft imports it."""
    source = Path(idefics_lit.__file__).parent
    imports = re.compile(r"^(?:from|import) (?:peft|bitsandbytes)\b", flags=re.MULTILINE)
    assert not [path for path in source.rglob("*.py") if imports.search(path.read_text())]


def test_a_fit_and_an_answer_print_what_lightning_prints():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lightnings, ours = done.stderr.split("====\n")
    assert not [line for line in lightnings.splitlines() if "idefics_lit" in line or "gemm_4bit" in line], lightnings
    own = re.compile("trainable params: |Loading weights: |.*each can be given as a flag$")
    extra = [line for line in ours.splitlines() if line and line not in lightnings and not own.match(line)]
    assert not extra, ours
