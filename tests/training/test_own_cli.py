"""A LightningCLI of another project, in subclass mode, and loading the checkpoints that it writes."""

import importlib
import io
import sys

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from idefics_lit import DocVQADataModule, Idefics2Module, LoRA

PROJECT = """
from idefics_lit import DocVQADataModule, Idefics2Module

class MyModule(Idefics2Module):
    def __init__(self, *args, temperature: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)

class MyData(DocVQADataModule):
    def __init__(self, *args, seed: int = 3, **kwargs):
        super().__init__(*args, seed=seed, **kwargs)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Another project's module."""
    (tmp_path / "their_project.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module("their_project")
    monkeypatch.delitem(sys.modules, "their_project")


def run_cli(command, tiny, module, data, *args):
    arguments = f"""{command} --model {module} --model.init_args.pretrained {tiny} --model.init_args.quantization none
        --model.init_args.max_new_tokens 1 --model.init_args.lora.r 2
        --data {data} --data.init_args.source synthetic:form --data.init_args.pretrained {tiny}
        --data.init_args.limit_train 2 --data.init_args.limit_val 1 --data.init_args.num_workers 0
        --data.init_args.image_size 112 --data.init_args.batch_size 1
        --trainer.accelerator cpu --trainer.logger false --trainer.enable_progress_bar false
        --trainer.enable_model_summary false --trainer.num_sanity_val_steps 0 --trainer.max_steps 1""".split()
    return LightningCLI(
        Idefics2Module,
        DocVQADataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=[*arguments, *map(str, args)],
    )


@pytest.mark.parametrize(
    ("module", "data"),
    [("Idefics2Module", "DocVQADataModule"), ("their_project.MyModule", "their_project.MyData")],
)
def test_a_cli_in_subclass_mode_fits_and_validates_and_its_checkpoints_load(tiny, tmp_path, project, run, module, data):
    cli = run_cli("fit", tiny, module, data)
    assert type(cli.model).__name__ == module.split(".")[-1]
    (path,) = tmp_path.rglob("*.ckpt")
    expected = {name: value.clone() for name, value in cli.model.state_dict().items()}
    validated = run_cli("validate", tiny, module, data, "--ckpt_path", path)
    assert {"val/loss", "val/anls"} < validated.trainer.callback_metrics.keys()
    kind, data_kind = type(cli.model), type(cli.datamodule)
    with path.open("rb") as file:
        loaded = [
            kind.load_from_checkpoint(path),
            kind.load_from_checkpoint(path, weights_only=True, map_location="cpu", strict=True, lr=3.0),
            kind.load_from_checkpoint(io.BytesIO(file.read()), strict=False),
            Idefics2Module.load_from_checkpoint(path),
        ]
    for other in (*loaded, validated.model):
        assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
    assert loaded[0].hparams.lora["r"] == 2 and loaded[1].lr == 3.0
    assert data_kind.load_from_checkpoint(path).hparams.limit_train == 2
    if kind is Idefics2Module:  # the command line reads it, too
        run("export", "--ckpt_path", path, "--output", tmp_path / "adapter")
        assert Idefics2Module(tiny, adapter=str(tmp_path / "adapter"), quantization="none").hparams.lora["r"] == 2
    else:
        assert loaded[0].hparams.temperature == 1.0 and cli.datamodule.hparams.seed == 3


def test_lora_can_be_given_to_load_from_checkpoint(tiny, tmp_path):
    module = Idefics2Module(tiny, quantization="none", lora=LoRA(r=2))
    module.configure_model()
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": {**module.hparams, "lora": {"r": 4}}}
    torch.save({**checkpoint, "pytorch-lightning_version": "2.6.6"}, tmp_path / "a.ckpt")
    loaded = Idefics2Module.load_from_checkpoint(tmp_path / "a.ckpt", lora=LoRA(r=2))
    assert loaded.hparams.lora["r"] == 2
