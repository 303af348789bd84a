"""Signals that reach the workers of a loader, alone or with the whole process group."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from idefics_lit.data.workers import ignore_group_signals


@pytest.fixture
def fit(tmp_path, short_fit):
    """Start fits of 30 batches with two workers, each in a new process group; kill those that are still running."""
    args = short_fit("--trainer.max_epochs", 6, "--trainer.max_steps", -1, "--trainer.check_val_every_n_epoch", 6)
    args += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "1"]
    args += ["--trainer.val_check_interval", "1.0", "--data.num_workers", "2"]
    log, processes = tmp_path / "log", []

    def start(*more):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "idefics_lit", *args, *more],
                cwd=tmp_path,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        return processes[-1], log

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_checkpoint(process, log):
    end = time.monotonic() + 120
    while not list(log.parent.glob("lightning_logs/version_0/checkpoints/*.ckpt")):
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_to_the_process_group_saves_and_the_fit_resumes(fit):
    process, log = fit()
    wait_for_checkpoint(process, log)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    printed = log.read_text()
    assert printed.count("stopped by SIGTERM at step") == 1
    assert "Traceback" not in printed and "killed by signal" not in printed
    saved = log.parent / "lightning_logs/version_0/checkpoints/interrupted.ckpt"
    assert 0 < torch.load(saved, weights_only=True)["global_step"] < 18
    process, log = fit("--ckpt_path", str(saved))
    assert process.wait(120) == 0, log.read_text()
    assert list(log.parent.glob("lightning_logs/version_1/checkpoints/*step=18.ckpt"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_no_worker_outlives_a_killed_main_process(fit):
    process, log = fit()
    wait_for_checkpoint(process, log)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [pid for pid in children if b"idefics_lit" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="senders of signals are unknown")
def test_workers_ignore_signals_except_the_main_processs_own_sigterm():
    loader = DataLoader(range(40), num_workers=2, worker_init_fn=ignore_group_signals)
    batches = iter(loader)
    seen = [next(batches).item(), next(batches).item()]  # both workers have started
    workers = multiprocessing.active_children()
    for name in ("INT", "TERM", "TERM"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert [*seen, *(batch.item() for batch in batches)] == [*range(40)]
    batches = iter(loader)
    next(batches), next(batches)
    (worker, _) = multiprocessing.active_children()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_a_program_with_idle_workers_ends():
    """At its exit Python sends SIGTERM to the workers, and waits for them."""
    program = (
        "from torch.utils.data import DataLoader\n"
        "from idefics_lit.data.workers import ignore_group_signals\n"
        "loader = DataLoader(range(2), num_workers=2, persistent_workers=True, worker_init_fn=ignore_group_signals)\n"
        "print(sum(int(batch) for batch in loader))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
