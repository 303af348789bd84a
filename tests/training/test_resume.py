"""A fit that is interrupted anywhere resumes and ends with the same bits."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning import Callback

from idefics_lit.cli.main import DocVQACLI

SIGNALS = {"sigterm": [signal.SIGTERM], "sigint": [signal.SIGINT], "sigint twice": [signal.SIGINT] * 2}


class Stop(Exception):
    pass


class CutOff(Callback):
    """Save a checkpoint after every batch, and interrupt the fit at a chosen place."""

    def __init__(self, place=None, batches=0):
        self.place, self.left = place, batches
        self.visited = []

    def save(self, trainer, name):
        self.path = f"{self.place or 'whole'}-{name}.ckpt"
        trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.visited += batch.question_ids
        self.left -= 1
        self.save(trainer, f"{trainer.current_epoch}-{batch_idx}")
        if self.left == 0 and self.place == "batch":
            raise Stop
        if self.left == 0 and self.place in SIGNALS:
            for signal_ in SIGNALS[self.place]:
                os.kill(os.getpid(), signal_)

    def on_validation_end(self, trainer, module):
        if self.left <= 0 and self.place == "validation":
            self.save(trainer, "validation")
            raise Stop

    def on_train_epoch_end(self, trainer, module):
        if self.left <= 0 and self.place == "epoch":
            self.save(trainer, "epoch")
            raise Stop


@pytest.fixture
def cut(run, monkeypatch):
    """Run with a `CutOff` callback; return the folder and the callback."""

    def cut(args, place=None, batches=0):
        callback = CutOff(place, batches)
        before = DocVQACLI.before_instantiate_classes
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it

        def with_callback(cli):
            cli.trainer_defaults["callbacks"].append(callback)
            before(cli)

        with monkeypatch.context() as patch:
            patch.setattr(DocVQACLI, "before_instantiate_classes", with_callback)
            try:
                folder = run(*args)
            finally:
                assert signal.signal(signal.SIGINT, previous) in (signal.default_int_handler, signal.SIG_IGN)
        return folder, callback

    return cut


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(first, second):
    """Adapter, optimizer, schedule and the report's curves are the same bits."""
    assert first["global_step"] == second["global_step"]
    assert first["callbacks"]["Report"]["steps"] == second["callbacks"]["Report"]["steps"]
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    states = (checkpoint["optimizer_states"][0]["state"].values() for checkpoint in (first, second))
    for a, b in zip(*states, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert first["lr_schedulers"] == second["lr_schedulers"]


# In the middle of a step, at the end of an epoch and of the next, after a validation within an epoch and at its end.
@pytest.mark.parametrize(
    ("place", "batches", "workers"),
    [
        ("batch", [1, 2], 2),
        ("batch", [5, 5, 1], 0),
        ("sigterm", [3, 2, 5], 0),
        ("sigint", [3, 2], 0),
        ("validation", [3, 2], 0),
        ("epoch", [5, 5], 2),
    ],
)
def test_it_goes_on_from_anywhere_and_from_there_again(cut, short_fit, place, batches, workers, tmp_path):
    args = short_fit("--data.num_workers", workers)
    folder, callback = cut(args)
    whole = load(callback.path)
    for left in batches:
        with pytest.raises((Stop, SystemExit)) as caught:
            cut(args, place, left)
        assert caught.type is Stop or caught.value.code == 128 + SIGNALS[place][0]
        saved = folder.rglob("interrupted.ckpt") if place in SIGNALS else folder.glob(f"{place}-*.ckpt")
        newest = max(saved, key=lambda path: path.stat().st_mtime_ns)
        args = [*short_fit("--data.num_workers", workers), "--ckpt_path", newest]
    _, callback = cut(args)
    assert_same(whole, load(callback.path))


def test_idefics3_and_smolvlm_go_on_in_the_same_bits(cut, short_fit, stand_in):
    """A resumed fit computes features again, beside those of other pages, that the whole fit had cached."""
    args = short_fit("--model.pretrained", stand_in, "--data.image_size", 224, "--model.feature_cache", "memory")
    whole = load(cut(args)[1].path)
    with pytest.raises(Stop):
        cut(args, "batch", 7)
    (saved,) = Path.cwd().glob("batch-1-1.ckpt")
    assert_same(whole, load(cut([*args, "--ckpt_path", saved])[1].path))


def test_a_second_ctrl_c_ends_the_fit_at_once(cut, short_fit, tmp_path, capfd):
    with pytest.raises(SystemExit) as caught:
        cut(short_fit(), "sigint twice", 3)
    assert caught.value.code == 128 + signal.SIGINT
    assert not list(tmp_path.rglob("interrupted.ckpt"))
    assert "Traceback" not in capfd.readouterr().err


def test_another_number_of_workers(cut, short_fit, monkeypatch):
    """By default the checkpoint's number is used, whatever the number of cores. With another one the epoch restarts."""
    args = short_fit("--data.num_workers", 1)
    folder, callback = cut(args)
    whole, middle = load(callback.path), folder / "whole-0-2.ckpt"
    monkeypatch.setattr("idefics_lit.data.datamodule.suggested_max_num_workers", lambda _: 2)
    _, callback = cut([*args[:-1], "null", "--ckpt_path", middle])
    assert_same(whole, load(callback.path))
    with pytest.warns(UserWarning, match=r"epoch restarts.*: data.num_workers 1, here 2\."):
        _, callback = cut([*args[:-1], "2", "--ckpt_path", middle])
    assert not all(map(torch.equal, whole["state_dict"].values(), load(callback.path)["state_dict"].values()))


def copy_with(source, folder, change):
    """Copy an official data set whose training rows are changed."""
    shutil.copytree(source, folder)
    file = next(folder.glob("train*.json"))
    content = json.loads(file.read_text())
    change(content["data"])
    file.write_text(json.dumps(content))
    return folder


def test_another_order_of_the_questions_begins_the_epoch_anew(cut, short_fit, docvqa, tmp_path):
    """The warning names what changed the order, and the epoch visits each question once."""
    args = short_fit("--trainer.max_epochs", 1, "--trainer.check_val_every_n_epoch", 9)
    args[args.index("--trainer.val_check_interval") + 1] = "1.0"
    copy_with(docvqa, tmp_path / "moved", lambda rows: None)
    copy_with(docvqa, tmp_path / "turned", lambda rows: rows.reverse())
    folder, callback = cut(args)
    args += ["--ckpt_path", str((folder / "whole-0-2.ckpt").rename(folder / "middle"))]
    visited = callback.visited
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*epoch restarts")
        assert cut([*args, "--data.source", "moved"])[1].visited == visited[6:]
    others = ("--data.seed", "1", "--data.questions_per_page", "2", "--data.source", "turned")
    differing = "data.seed 0, here 1, data.questions_per_page 1, here 2 in blocks, "
    differing += r"training questions 10 \((\w+)\), here 10 \((?!\1)\w+\)"
    with pytest.warns(UserWarning, match=rf"checkpoint's epoch restarts, .* other settings: {differing}\."):
        _, callback = cut([*args, *others])
    assert len(callback.visited) == len(set(callback.visited)) >= 5
    assert callback.visited != visited


class Process:
    """The program in a separate process."""

    def __init__(self, folder, args, **environment):
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "idefics_lit", *args],
            cwd=folder,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
        )
        self.folder = folder

    def wait_for(self, pattern):
        """Wait until a file exists."""
        end = time.monotonic() + 120
        while not list(self.folder.glob(pattern)):
            assert self.process.poll() is None and time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.01)

    def end(self, signal_=None):
        """Send a signal, to the workers too, as a terminal does; returns the exit code and what was printed."""
        if signal_:
            os.killpg(self.process.pid, signal_)
        code = self.process.wait(120)
        return code, (self.folder / "log").read_text()


LONG = ("--trainer.max_epochs", "6", "--trainer.check_val_every_n_epoch", "6")
EVERY_STEP = (
    *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "1"),
    *("--trainer.callbacks.save_top_k", "2", "--trainer.callbacks.monitor", "step", "--trainer.callbacks.mode", "max"),
)


def last_weights(folder):
    newest = max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return load(newest)


@pytest.fixture
def uninterrupted(run, short_fit):
    """Return the arguments of a long fit and the weights that it ends with."""
    args = short_fit(*LONG, *EVERY_STEP)
    args[args.index("--trainer.val_check_interval") + 1] = "1.0"
    with contextlib.redirect_stdout(io.StringIO()):
        folder = run(*args)
    whole = last_weights(folder)
    (folder / "lightning_logs").rename(folder / "whole")
    return args, whole


def test_ctrl_c_saves_and_the_same_command_goes_on(uninterrupted, tmp_path):
    """With a worker that waits for the next validation since the sanity check."""
    args, whole = uninterrupted
    args = [*args, "--data.num_workers", "1", "--trainer.num_sanity_val_steps", "1", "--ckpt_path", "last"]
    first = Process(tmp_path, args)
    first.wait_for("lightning_logs/version_0/checkpoints/*.ckpt")
    code, printed = first.end(signal.SIGINT)
    assert code == 128 + signal.SIGINT, printed
    assert "no checkpoint in lightning_logs yet: the fit begins" in printed
    assert printed.count("press Ctrl-C again to stop at once") == 1
    assert "stopped by Ctrl-C at step" in printed and "Traceback" not in printed
    saved = tmp_path / "lightning_logs/version_0/checkpoints/interrupted.ckpt"
    assert 0 < load(saved)["global_step"] < whole["global_step"]
    code, printed = Process(tmp_path, args).end()
    assert code == 0 and f"last checkpoint: {saved.relative_to(tmp_path)}" in printed
    assert_same(whole, last_weights(tmp_path / "lightning_logs"))


@pytest.mark.parametrize("seconds", [1, 8])
def test_ctrl_c_before_training_ends_without_a_traceback(tmp_path, seconds):
    """In the imports, and later."""
    process = Process(tmp_path, ["predict", "--model.pretrained", "tiny", "--data.source", "synthetic"])
    time.sleep(seconds)
    code, printed = process.end(signal.SIGINT)
    # The shell's code is 130 in both cases; Python ends itself by SIGINT if it interrupted an `exec` of a text.
    assert code in (128 + signal.SIGINT, -signal.SIGINT) and "Traceback" not in printed, printed


@pytest.mark.long
def test_slurm_requeues_the_job_and_its_next_start_goes_on(uninterrupted, tmp_path):
    """As Lightning gives it: SLURM's warning signal saves, `scontrol requeue` is called, and SIGTERM is bypassed."""
    args, whole = uninterrupted
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* > {tmp_path}/requeued\n")
    (tmp_path / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    job |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    first = Process(tmp_path, args, **job)
    first.wait_for("lightning_logs/version_0/checkpoints/*.ckpt")
    first.process.send_signal(signal.SIGUSR1)
    first.wait_for("requeued")
    first.end(signal.SIGKILL)
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    saved = load(tmp_path / "hpc_ckpt_1.ckpt")
    assert 0 < saved["global_step"] < whole["global_step"]
    code, printed = Process(tmp_path, args, **job).end()
    assert code == 0 and "hpc_ckpt_1.ckpt" in printed
    assert last_weights(tmp_path / "lightning_logs")["global_step"] == whole["global_step"]


@pytest.mark.long
def test_it_is_killed_and_ends_in_the_same_bits():
    """Three of the kills of benchmarks/kills.py: in training, in the writing of a checkpoint, and in training."""
    script = Path(__file__).parents[2] / "benchmarks" / "kills.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "3", "--steps", "40"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{\n") :])["same bits"] is True
