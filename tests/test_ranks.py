"""Processes of their own, one and two: what they train, score and save is the same, and a failure ends all."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import count

import pytest
import torch
from PIL import Image


def fit(folder, tiny, *args):
    """A fit of the module's own data in a process of its own, as a user starts it."""
    command = f"""{sys.executable} -m idefics_lit fit --model.pretrained {tiny} --data.source synthetic
        --data.limit_train 8 --data.limit_val 5 --data.image_size 112 --data.num_workers 0
        --model.lr 1e-4 --model.warmup_steps 0 --model.max_new_tokens 4 --model.lora.r 32
        --trainer.max_steps 4 --trainer.accelerator cpu --trainer.precision 32-true
        --trainer.enable_progress_bar false""".split()
    done = subprocess.run([*command, *args], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(next((folder / "lightning_logs").rglob("*step=4.ckpt")), weights_only=True)


@pytest.mark.slow
def test_two_processes_train_the_same_adapter_as_one(tmp_path, tiny):
    """The mean is over the answer tokens of both ranks, and a question that a sampler repeats counts once."""
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    options = ["--model.lora.dropout", "0", "--model.quantization", "none"]
    two = fit(tmp_path / "two", tiny, *options, "--data.batch_size", "1", "--trainer.accumulate_grad_batches", "2",
              "--trainer.devices", "2", "--trainer.strategy", "ddp")  # fmt: skip
    one = fit(tmp_path / "one", tiny, *options, "--data.batch_size", "4")
    for name, value in one["state_dict"].items():
        assert torch.allclose(value, two["state_dict"][name], atol=1e-5), name


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path):
    """Every question once, in the set's order, though an odd number is shared out and pages go to one rank."""
    answers, losses = [], []
    for devices in (1, 2):
        command = f"""{sys.executable} -m idefics_lit validate --model.pretrained tiny --model.quantization none
            --data.source synthetic --data.limit_val 33 --data.eval_batch_size 8 --data.num_workers 0
            --trainer.accelerator cpu --trainer.precision 32-true --trainer.devices {devices}
            --trainer.logger false --trainer.default_root_dir {tmp_path / str(devices)}""".split()
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / str(devices) / "val_predictions.jsonl").read_text().splitlines()
        answers.append([json.loads(line) for line in lines])
        scored = sum(record["score"] for record in answers[-1]) / 33
        printed = re.search(r"val/anls +│ +(\S+)", done.stdout)
        assert printed and float(printed[1]) == pytest.approx(scored, abs=1e-6)
        losses.append(float(re.search(r"val/loss +│ +(\S+)", done.stdout)[1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert answers[0] == answers[1] and len(answers[0]) == 33
    assert scored > 0.8


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_run_with_its_error(tmp_path, tiny, rank):
    rows = [{"questionId": i, "question": "What?", "image": f"{i}.png", "answers": ["a"]} for i in range(8)]
    (tmp_path / "val.json").write_text(json.dumps({"data": rows}))
    for i in range(8):
        Image.new("L", (60, 80), 255).save(tmp_path / f"{i}.png")
    (tmp_path / f"{5 * rank + 1}.png").write_bytes(b"no image")  # a rank's share is in one piece
    command = f"""{sys.executable} -m idefics_lit validate --model.pretrained {tiny} --data.source {tmp_path}
        --data.eval_batch_size 1 --data.num_workers 0 --model.max_new_tokens 2 --trainer.accelerator cpu
        --trainer.precision 32-true --trainer.devices 2 --trainer.logger false""".split()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"{5 * rank + 1}.png" in done.stderr


class Ranks:
    """Two processes of a fit that saves every second step, started one by one, as torchrun and SLURM do."""

    def __init__(self, folder, tiny, *args, **environment):
        self.folder, self.logs = folder, [folder / f"log_{next(COUNT)}" for _ in range(2)]
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
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
        self.processes = [
            subprocess.Popen(
                [*command, *args],
                cwd=folder,
                env={name: value.format(rank=rank) for name, value in environment.items()},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
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


COUNT = count()
LOCAL = {"LOCAL_RANK": "{rank}", "NODE_RANK": "0", "WORLD_SIZE": "2"}


def last_adapter(folder):
    return torch.load(next(folder.rglob("*step=12.ckpt")), weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("validation", [pytest.param(False, marks=pytest.mark.long), True], ids=["train", "validation"])
def test_sigterm_to_one_rank_ends_both_behind_the_same_batch(tmp_path, tiny, validation):
    """Though neither waits for the other in a batch, and one may be through with a validation."""
    options = ["--trainer.devices", "2", "--trainer.val_check_interval", "4"]
    options += ["--data.limit_val", "600"] if validation else ["--data.limit_val", "4"]
    ranks = Ranks(tmp_path, tiny, *options, **LOCAL)
    ranks.wait_for("*step=2.ckpt")
    if validation:  # behind the second step, and long
        time.sleep(2)
    ranks.processes[1].send_signal(signal.SIGTERM)
    assert ranks.end() == [128 + signal.SIGTERM] * 2
    assert ranks.printed().count("stopped by SIGTERM at step 2" if validation else "stopped by SIGTERM at step") == 1
    torch.load(next(tmp_path.rglob("sigterm.ckpt")), weights_only=True)
    assert not list(tmp_path.rglob("val_predictions.jsonl" if validation else "*step=12.ckpt"))


@pytest.mark.long
def test_slurm_warns_the_ranks_one_by_one_and_they_save_together(tmp_path, tiny):
    """And the job that is started again ends in the adapter of one that was left alone."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/requeued\n")
    (tmp_path / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    job |= {"SLURM_NTASKS": "2", "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}"}
    job["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    options = ["--trainer.devices", "2", "--data.limit_val", "4"]
    (tmp_path / "job").mkdir()
    first = Ranks(tmp_path / "job", tiny, *options, **job)
    first.wait_for("*step=2.ckpt")
    first.processes[1].send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    first.processes[0].send_signal(signal.SIGUSR1)
    first.wait_for("hpc_ckpt_1.ckpt")
    time.sleep(1)
    for process in first.processes:
        process.kill()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    again = Ranks(tmp_path / "job", tiny, *options, **job)
    assert again.end() == [0, 0], again.printed()
    assert "hpc_ckpt_1.ckpt" in again.printed()
    (tmp_path / "alone").mkdir()
    alone = Ranks(tmp_path / "alone", tiny, *options, **LOCAL)
    assert alone.end() == [0, 0], alone.printed()
    resumed, whole = last_adapter(tmp_path / "job"), last_adapter(tmp_path / "alone")
    for name, value in whole.items():
        assert torch.allclose(value, resumed[name], atol=1e-5), name


def test_a_checkpoint_holds_adapter_and_moments_alone(tmp_path, tiny):
    checkpoint = fit(tmp_path, tiny, "--data.batch_size", "2")
    path = next(tmp_path.rglob("*.ckpt"))
    adapter = sum(v.numel() * v.element_size() for v in checkpoint["state_dict"].values())
    assert path.stat().st_size == pytest.approx(3 * adapter, rel=0.05)
