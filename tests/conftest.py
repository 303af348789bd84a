import os
import shutil
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Small models: threads cost more than they bring, and on a busy machine far more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from idefics_lit.tiny import build_tiny

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A randomly initialised small Idefics2 in the Hub's form."""
    return str(build_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def hub_files(tmp_path_factory):
    """Idefics2-8b's small files in the Hub's own form, with the tokeniser's model."""
    import mistral_common

    folder = tmp_path_factory.mktemp("idefics2-8b")
    shutil.copytree(DATA / "idefics2-8b-files", folder, dirs_exist_ok=True)
    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(model, folder / "tokenizer.model")
    return folder


@pytest.fixture
def docvqa():
    """Real pages in the official DocVQA form: 24 training and 5 validation questions."""
    return DATA / "docvqa-public-domain"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Type a command as a user would, in a folder of its own; returns that folder."""
    from idefics_lit.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*args):
        main([str(arg) for arg in args])
        return tmp_path

    return run


@pytest.fixture
def short_fit(tiny, docvqa):
    """The arguments of a fit of three epochs of five batches, two a step, with validation inside each epoch."""

    def short_fit(*more):
        flags = ["fit", "--model.pretrained", tiny, "--model.quantization", "none", "--model.max_new_tokens", 2]
        flags += ["--model.lr", "1e-2", "--model.warmup_steps", 0, "--data.source", docvqa, "--data.image_size", 112]
        flags += ["--data.limit_train", 10, "--data.limit_val", 2, "--data.num_workers", 0]
        flags += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
        flags += ["--trainer.max_steps", 9, "--trainer.max_epochs", 4, "--trainer.val_check_interval", 3]
        flags += ["--trainer.accumulate_grad_batches", 2, "--trainer.num_sanity_val_steps", 0]
        return [str(flag) for flag in (*flags, *more)]

    return short_fit


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium: the system's, or the one that `playwright install chromium` fetched."""
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except Error as error:
            if "CI" in os.environ:
                raise
            pytest.skip(f"no browser, `playwright install chromium` fetches one: {error.message.splitlines()[0]}")
        yield chromium
        chromium.close()
