"""Fits in one and two processes train, score and save the same, and a failure of one process ends both."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image


def fit(tiny, *args):
    """Return the arguments of a fit on nine questions."""
    command = f"""fit --model.pretrained {tiny} --data.source synthetic
        --data.limit_train 9 --data.limit_val 5 --data.image_size 112 --data.num_workers 0
        --data.batch_size 2 --model.lr 1e-4 --model.warmup_steps 0 --model.max_new_tokens 4
        --model.lora.r 32 --trainer.max_steps 4 --trainer.accelerator cpu --trainer.precision 32-true
        --trainer.enable_progress_bar false""".split()
    return [*command, *args]


def in_processes(folder, command):
    """Run a command that starts further processes in a folder; return its output."""
    done = subprocess.run([sys.executable, "-m", "idefics_lit", *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def checkpoint(folder):
    return next((folder / "lightning_logs").rglob("*step=4.ckpt"))


@pytest.mark.slow
def test_two_processes_train_the_same_adapter_as_one(run, tmp_path, tiny):
    """Also where ranks share the questions about a page: the loss is the mean over the answer tokens of both.

    The question that pads nine to ten counts once.
    """
    options = ["--model.lora.dropout", "0", "--model.quantization", "none"]
    ranks = ["--data.batch_size", "1", "--trainer.accumulate_grad_batches", "2", "--trainer.devices", "2"]
    (tmp_path / "two").mkdir()
    in_processes(tmp_path / "two", fit(tiny, *options, *ranks, "--trainer.strategy", "ddp"))
    run(*fit(tiny, *options, "--data.batch_size", "4"))
    one, two = (torch.load(checkpoint(path), weights_only=True)["state_dict"] for path in (tmp_path, tmp_path / "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-5), name


@pytest.mark.slow
def test_two_processes_score_as_one(run, tmp_path, capsys):
    """Every question once, in the set's order, though an odd number is shared out and pages go to one rank."""
    answers, confidences, losses = [], [], []
    for devices in (1, 2):
        command = f"""validate --model.pretrained tiny --model.quantization none
            --data.source synthetic --data.limit_val 33 --data.eval_batch_size 8 --data.num_workers 0
            --trainer.accelerator cpu --trainer.precision 32-true --trainer.devices {devices}
            --trainer.logger false --trainer.default_root_dir {tmp_path / str(devices)}""".split()
        if devices == 1:
            run(*command)
            table = capsys.readouterr().out
        else:
            table = in_processes(tmp_path, command)
        lines = (tmp_path / str(devices) / "val_predictions.jsonl").read_text().splitlines()
        answers.append([json.loads(line) for line in lines])
        confidences.append([answer.pop("confidence") for answer in answers[-1]])
        for answer in answers[-1]:
            del answer["log_probability"], answer["mean_log_probability"]
        scored = sum(record["score"] for record in answers[-1]) / 33
        printed = re.search(r"val/anls +│ +(\S+)", table)
        assert printed and float(printed[1]) == pytest.approx(scored, abs=1e-4)
        losses.append(float(re.search(r"val/loss +│ +(\S+)", table)[1]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert answers[0] == answers[1] and len(answers[0]) == 33
    assert confidences[0] == pytest.approx(confidences[1], abs=1e-4)  # their last digits depend on the batch
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


def last_adapter(folder):
    return torch.load(next(folder.rglob("*step=12.ckpt")), weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("validation", "name"),
    [
        pytest.param(False, "SIGTERM", marks=pytest.mark.long),
        (True, "SIGTERM"),
        pytest.param(False, "Ctrl-C", marks=pytest.mark.long),
    ],
)
def test_a_signal_to_one_rank_ends_both_behind_the_same_batch(two_ranks, tmp_path, validation, name):
    """The ranks don't wait for each other in a batch, and one may have finished a validation before the other."""
    options = ["--trainer.devices", "2", "--trainer.val_check_interval", "4"]
    options += ["--data.limit_val", "200"] if validation else ["--data.limit_val", "4"]
    ranks = two_ranks(tmp_path, *options)
    ranks.wait_for("*step=2.ckpt")
    if validation:  # it follows the second step and takes long
        time.sleep(0.5)
    signal_ = signal.SIGINT if name == "Ctrl-C" else signal.SIGTERM
    ranks.processes[1].send_signal(signal_)
    assert ranks.end() == [128 + signal_] * 2
    assert ranks.printed().count(f"stopped by {name} at step{' 2' if validation else ''}") == 1
    torch.load(next(tmp_path.rglob("interrupted.ckpt")), weights_only=True)
    assert not list(tmp_path.rglob("val_predictions.jsonl" if validation else "*step=12.ckpt"))


@pytest.mark.long
def test_slurm_warns_the_ranks_one_by_one_and_they_save_together(two_ranks, tmp_path):
    """The restarted job ends with the adapter of an uninterrupted one."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/requeued\n")
    (tmp_path / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    job |= {"SLURM_NTASKS": "2", "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}"}
    job["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    options = ["--trainer.devices", "2", "--data.limit_val", "4"]
    first = two_ranks(tmp_path / "job", *options, **job)
    first.wait_for("*step=2.ckpt")
    first.processes[1].send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    first.processes[0].send_signal(signal.SIGUSR1)
    first.wait_for("hpc_ckpt_1.ckpt")
    first.wait_for("*step=6.ckpt")  # training continued
    first.kill()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    again = two_ranks(tmp_path / "job", *options, **job)
    assert again.end() == [0, 0], again.printed()
    assert "hpc_ckpt_1.ckpt" in again.printed()
    alone = two_ranks(tmp_path / "alone", *options)
    assert alone.end() == [0, 0], alone.printed()
    resumed, whole = last_adapter(tmp_path / "job"), last_adapter(tmp_path / "alone")
    for name, value in whole.items():
        assert torch.allclose(value, resumed[name], atol=1e-5), name


def test_a_checkpoint_holds_adapter_and_moments_alone(run, tiny):
    path = checkpoint(run(*fit(tiny, "--data.batch_size", "2")))
    state = torch.load(path, weights_only=True)["state_dict"]
    adapter = sum(value.numel() * value.element_size() for value in state.values())
    assert path.stat().st_size == pytest.approx(3 * adapter, rel=0.05)
