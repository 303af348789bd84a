import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Small models: threads cost more than they bring, and on a busy machine far more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hub_files import FAMILY, hub_folder
from stand_ins import KINDS, build_stand_in

from idefics_lit.model.tiny import build_tiny

DATA = Path(__file__).parent / "assets"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hide the GPUs, so that a test is the same on every machine, unless it is marked `gpu`."""
    if item.get_closest_marker("gpu"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setattr("torch.cuda.device_count", lambda: 0)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that the test starts
        return (yield)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a randomly initialised small Idefics2, in the Hub's format."""
    return str(build_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def stand_in_folders(tmp_path_factory):
    """Folders with a randomly initialised small Idefics3 and SmolVLM, in the Hub's format, by kind."""
    return {kind: str(build_stand_in(kind, tmp_path_factory.mktemp(kind))) for kind in KINDS}


@pytest.fixture(scope="session", params=KINDS)
def stand_in(request, stand_in_folders):
    """A folder with a randomly initialised small Idefics3 or SmolVLM, in the Hub's format."""
    return stand_in_folders[request.param]


@pytest.fixture(scope="session", params=FAMILY)
def family_files(request, tmp_path_factory):
    """A folder with the small files of a model of Idefics3's family on the Hub, named as there, and its tokenizer."""
    return hub_folder(request.param, tmp_path_factory.mktemp("family") / request.param)


@pytest.fixture(scope="session")
def hub_files(tmp_path_factory):
    """A folder with the small files of Idefics2-8b on the Hub and its tokenizer's model."""
    import mistral_common

    folder = tmp_path_factory.mktemp("idefics2-8b")
    shutil.copytree(DATA / "idefics2-8b-files", folder, dirs_exist_ok=True)
    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(model, folder / "tokenizer.model")
    return folder


@pytest.fixture
def docvqa():
    """Real pages in the official DocVQA format: 24 training and 5 validation questions."""
    return DATA / "docvqa-public-domain"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command as a user would, in a new folder; return that folder."""
    from idefics_lit.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*args):
        main([str(arg) for arg in args])
        return tmp_path

    return run


@pytest.fixture
def in_effect(monkeypatch):
    """Return the config that a command would run with, without running it."""

    from idefics_lit.cli.main import DocVQACLI, main

    def in_effect(*args):
        seen = []
        with monkeypatch.context() as patch:
            for command in DocVQACLI.subcommands():
                patch.setattr(DocVQACLI, command, lambda cli, **_: seen.append(cli.config[cli.subcommand]))
            main([str(arg) for arg in args])
        return seen[0]

    return in_effect


@pytest.fixture
def short_fit(tiny, docvqa):
    """Return the arguments of a fit: epochs of five batches, two batches a step, a validation within each epoch."""

    def short_fit(*more):
        flags = ["fit", "--model.pretrained", tiny, "--model.quantization", "none", "--model.max_new_tokens", 2]
        flags += ["--model.lr", "1e-2", "--model.warmup_steps", 0, "--data.source", docvqa, "--data.image_size", 112]
        flags += ["--data.limit_train", 10, "--data.limit_val", 2, "--data.num_workers", 0]
        flags += ["--data.batch_size", 2, "--data.questions_per_page", 1]
        flags += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
        flags += ["--trainer.max_steps", 9, "--trainer.max_epochs", 4, "--trainer.val_check_interval", 3]
        flags += ["--trainer.accumulate_grad_batches", 2, "--trainer.num_sanity_val_steps", 0]
        return [str(flag) for flag in (*flags, *more)]

    return short_fit


class Ranks:
    """Two processes of a fit that saves every second step, started one by one, as torchrun and SLURM do.

    In the values of their environment "{rank}" is the rank.
    """

    def __init__(self, folder, tiny, *args, **environment):
        folder.mkdir(exist_ok=True)
        self.folder, self.logs = folder, [folder / f"log_{rank}" for rank in "01"]
        command = f"""{sys.executable} -m idefics_lit fit --model.pretrained {tiny} --data.source synthetic
            --data.limit_train 64 --data.image_size 112 --data.num_workers 0 --data.batch_size 1
            --data.eval_batch_size 1 --model.lr 1e-3 --model.warmup_steps 0 --model.lora.r 32
            --model.quantization none --model.max_new_tokens 4 --trainer.accelerator cpu --trainer.precision 32-true
            --trainer.num_sanity_val_steps 0 --trainer.accumulate_grad_batches 2 --trainer.max_steps 12
            --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps 2
            --trainer.callbacks.save_top_k -1 --trainer.enable_progress_bar false""".split()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = environment or {"LOCAL_RANK": "{rank}", "NODE_RANK": "0", "WORLD_SIZE": "2"}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
        self.processes = [
            subprocess.Popen(
                [*command, *args],
                cwd=folder,
                env={name: value.replace("{rank}", str(rank)) for name, value in environment.items()},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
            )
            for rank, log in enumerate(self.logs)
        ]

    def printed(self):
        return "".join(log.read_text() for log in self.logs)

    def wait_for(self, pattern):
        end = time.monotonic() + 120
        while not list(self.folder.rglob(pattern)):
            assert all(process.poll() is None for process in self.processes), self.printed()
            assert time.monotonic() < end, self.printed()
            time.sleep(0.01)

    def end(self):
        return [process.wait(120) for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(autouse=True)
def own_environment():
    """Undo a test's changes of the environment: Lightning's DDP leaves LOCAL_RANK, which the next test's ranks read."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def two_ranks(tiny):
    """Start `Ranks`, which are killed at the end of the test."""
    started = []

    def two_ranks(folder, *args, **environment):
        started.append(Ranks(folder, tiny, *args, **environment))
        return started[-1]

    yield two_ranks
    for ranks in started:
        ranks.kill()


@pytest.fixture
def end_wandb():
    """End W&B's run and its process, which reads the environment when it starts; before, in and after a test."""
    import wandb

    def end():
        wandb.finish()
        wandb.teardown()

    end()
    yield end
    end()


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium: the system's, or the one that `playwright install chromium` downloaded."""
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
