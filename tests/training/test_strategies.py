"""Lightning's strategies with several processes, on a CPU.

Each test runs in a new process with one thread: a fork of a process whose threads hold locks may wait for ever.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.model.lora import LoRA
from idefics_lit.training.module import Idefics2Module
from idefics_lit.training.trained_weights import trained_parameters


def in_a_new_process(function, *arguments):
    """Call a function of this file."""
    call = f"import {Path(__file__).stem} as tests; tests.{function.__name__}(*{[str(a) for a in arguments]!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    folder = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", call], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr


def fit(module, folder, strategy, **options):
    """Make two steps of two questions each."""
    pages = SyntheticPages("train", 4)
    collate = module.collator(train=True, image_size=112)
    loader = DataLoader([pages[i] for i in range(4)], batch_size=options.pop("batch_size", 1), collate_fn=collate)
    trainer = Trainer(
        **{"accelerator": "cpu", "strategy": strategy, "max_steps": 2, "default_root_dir": folder, "logger": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "devices": 2, **options},
    )
    trainer.fit(module, loader)
    return trainer


def make_module(tiny, kind=Idefics2Module):
    seed_everything(0)
    return kind(tiny, quantization="none", lora=LoRA(r=2, dropout=0.0), lr=1e-2, warmup_steps=0, max_new_tokens=2)


@pytest.mark.parametrize(
    "strategy", ["ddp_fork", *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp_spawn", "ddp_notebook"))]
)
def test_trained_weights_come_back_from_the_processes(tiny, tmp_path, strategy):
    in_a_new_process(check_trained_weights, tiny, tmp_path, strategy)


def check_trained_weights(tiny, tmp_path, strategy):
    trainer = fit(module := make_module(tiny), tmp_path, strategy)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    trained = trained_parameters(module)
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], parameter) for name, parameter in trained.items())
    assert any(parameter.any() for name, parameter in trained.items() if "lora_B" in name)
    assert len(module.answer(SyntheticPages("val", 1)[0].images, "What is the date?")) == 1


class TrainsANorm(Idefics2Module):
    def configure_model(self):
        super().configure_model()
        self.model.get_base_model().model.text_model.norm.weight.requires_grad_(True)


class SaveRank(Callback):
    """Save each rank's gradients of the first step and its weights at the end."""

    def __init__(self, folder):
        self.folder = folder

    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = {name: p.grad for name, p in trained_parameters(module).items() if p.grad is not None}
        if trainer.global_step == 1:
            torch.save(gradients, self.folder / f"gradients_{trainer.global_rank}.pt")

    def on_train_end(self, trainer, module):
        torch.save(module.state_dict(), self.folder / f"weights_{trainer.global_rank}.pt")


def test_what_a_subclass_unfreezes_is_trained_on_all_ranks(tiny, tmp_path):
    in_a_new_process(check_unfrozen_weights, tiny, tmp_path)


def check_unfrozen_weights(tiny, tmp_path):
    folders = {devices: Path(tmp_path) / str(devices) for devices in (1, 2)}
    for devices, folder in folders.items():
        folder.mkdir()
        fit(
            make_module(tiny, TrainsANorm), folder, "ddp_fork" if devices == 2 else "auto", devices=devices,
            batch_size=2 // devices, callbacks=[SaveRank(folder)], enable_checkpointing=False,
        )  # fmt: skip
    for name in ("gradients", "weights"):
        one, first, second = (
            torch.load(folders[devices] / f"{name}_{rank}.pt", weights_only=True)
            for devices, rank in ((1, 0), (2, 0), (2, 1))
        )
        assert one.keys() == first.keys() and any("text_model.norm" in name for name in one)
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        if name == "gradients":
            assert all(torch.allclose(value, one[name], atol=1e-5) for name, value in first.items())
