"""The command line: LightningCLI on `Idefics2Module` and `DocVQADataModule`, and one line for a user's mistake."""

import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.errors import InputError
from idefics_lit.module import Idefics2Module
from idefics_lit.outputs import FitTable, PredictionWriter, ProgressBar, SaveConfig


class DocVQACLI(LightningCLI):
    """LightningCLI with one ``pretrained`` for module and data, whose flags win over what a checkpoint remembers."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, and the arguments of each that are no options."""
        hidden = {"model", "datamodule", "weights_only", "verbose"}
        return {
            "fit": hidden | {"train_dataloaders", "val_dataloaders"},
            "validate": hidden | {"dataloaders"},
            "test": hidden | {"dataloaders"},
            "predict": hidden | {"dataloaders", "return_predictions"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take the processor from where the model comes from."""
        parser.link_arguments("model.pretrained", "data.pretrained")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401
        """Parse; with a checkpoint parse again, its hyperparameters as defaults below the config and the flags."""
        self.config = parser.parse_args(args)
        command = self.config.subcommand
        path = self.config[command].get("ckpt_path")
        if not path or path in ("best", "last", "hpc"):
            return
        checkpoint = _read_checkpoint(path)
        defaults = {
            f"{group}.{name}": value
            for group, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters"))
            for name, value in checkpoint.get(key, {}).items()
            if f"{group}.{name}" != "data.pretrained"
        }
        self._subcommand_parsers[command].set_defaults(defaults)
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's hyperparameters win over the user's flags."""

    def before_instantiate_classes(self) -> None:
        """Refuse what can't work before anything is loaded, and let wandb run without an account."""
        trainer = self.config[self.config.subcommand].trainer
        if isinstance(trainer.logger, Namespace) and trainer.logger.class_path.endswith("WandbLogger"):
            _allow_wandb_offline()
        on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.cuda.is_available())
        if on_cpu and str(trainer.precision) in ("16", "16-mixed"):
            raise InputError("trainer.precision 16-mixed needs a GPU: give --trainer.precision bf16-mixed or 32-true")

    def after_instantiate_classes(self) -> None:
        """Find out now, not after training, that results can't be written."""
        loggers = self.trainer.loggers
        folder = Path((loggers[0].save_dir if loggers else None) or self.trainer.default_root_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"the output folder {folder} can't be written: {error}") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # A checkpoint is data: nothing in it may run code.
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}


def _allow_wandb_offline() -> None:
    import wandb  # only where it is used: its import takes a second

    if not wandb.api.api_key:
        os.environ.setdefault("WANDB_MODE", "offline")


def _read_checkpoint(path: str) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["state_dict"]
    except FileNotFoundError as error:
        raise InputError(f"ckpt_path {path}: no such file") from error
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"ckpt_path {path}: not a checkpoint of this program, or a damaged one ({reason})") from error
    return checkpoint


def main(args: Sequence[str] | None = None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: the command line, ``sys.argv`` unless given.

    Raises:
        SystemExit: with code 2 and one line on standard error after a user's mistake; ``--debug`` or the environment
            variable ``IDEFICS_LIT_DEBUG=1`` shows the traceback instead.
    """
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args or os.environ.get("IDEFICS_LIT_DEBUG", "0") not in ("", "0")
    try:
        DocVQACLI(
            Idefics2Module,
            DocVQADataModule,
            args=[arg for arg in args if arg != "--debug"],
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={
                "callbacks": [ProgressBar(), PredictionWriter(), FitTable()],
                "enable_model_summary": False,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": ".", "name": "lightning_logs"},
                },
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"description": "Fine-tune Idefics2 on document questions.", "exit_on_error": False},
        )
    except (InputError, MisconfigurationException, ArgumentError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
