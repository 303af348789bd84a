"""Processes of their own, one and two: what they train, score and save is the same, and a failure ends all."""

import json
import re
import subprocess
import sys

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


def test_a_checkpoint_holds_adapter_and_moments_alone(tmp_path, tiny):
    checkpoint = fit(tmp_path, tiny, "--data.batch_size", "2")
    path = next(tmp_path.rglob("*.ckpt"))
    adapter = sum(v.numel() * v.element_size() for v in checkpoint["state_dict"].values())
    assert path.stat().st_size == pytest.approx(3 * adapter, rel=0.05)
