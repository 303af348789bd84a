"""The argument parser of the command line: commands, their help and readable errors.

The help of a command lists the options of the model, the data and the command first, then the most used options of the
Trainer. ``--print_config`` shows all of them.
"""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, Literal

from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

COMMANDS = {
    "fit": "Train the adapter, validate at the configured interval and keep the best checkpoint.",
    "validate": "Score a checkpoint, or the model without one, on the validation split.",
    "test": "Score a checkpoint, or the model without one, on the test split.",
    "predict": "Answer a split's questions, with or without references; writes submission.json and predictions.jsonl.",
    "check": "Report problems in the training and validation questions before training; loads no model.",
    "ask": "Answer questions about images and PDFs with a checkpoint, or the model without one.",
    "demo": "Answer questions in a browser on this machine, with base and fine-tuned model side by side.",
    "export": "Write the adapter of a checkpoint as a folder that peft loads, or merged into its base model.",
}
# Options that only one command has, as keyword arguments of `argparse.ArgumentParser.add_argument`.
COMMAND_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "ask": {
        "image": {"nargs": "+", "action": "extend", "metavar": "F", "help": "images and PDFs"},
        "question": {"nargs": "+", "action": "extend", "metavar": "Q", "help": "questions about each page"},
        "json": {"action": "store_true", "help": "print JSON lines"},
        "min_confidence": {"type": float, "default": 0.0, "help": "say 'not sure' below this confidence, from 0 to 1"},
    },
    "demo": {
        "host": {"type": str, "default": "127.0.0.1", "help": "address to listen on; 0.0.0.0 accepts other machines"},
        "port": {"type": int | None, "help": "port to listen on; by default the first free port from 7860"},
    },
    "export": {
        "output": {"type": str | None, "metavar": "FOLDER", "help": "folder to write"},
        "merge": {"type": bool, "default": False, "help": "write the base model in bfloat16 with the adapter merged"},
        "merge_into": {
            **{"type": Literal["dequantized", "original"], "default": "dequantized"},
            "help": "the 4-bit weights that the adapter was trained on, as 16 bits, or the original 16-bit weights",
        },
        "push_to_hub": {"type": str | None, "metavar": "NAME", "help": "upload it to the Hub as OWNER/NAME"},
    },
}
# The Trainer's options that the help lists.
TRAINER_HELP = {
    "accelerator": "cpu, gpu or auto",
    "devices": "number of devices, a list of their indices, or auto",
    "precision": "16-mixed, bf16-mixed or 32-true; by default what the device has",
    "max_steps": "optimizer steps to train for",
    "max_epochs": "epochs to train for",
    "accumulate_grad_batches": "batches per optimizer step, by data.global_batch_size",
    "gradient_clip_val": "maximum norm of the gradients",
    "val_check_interval": "batches, or fraction of an epoch, between validations",
    "check_val_every_n_epoch": "null counts val_check_interval across epochs",
    "log_every_n_steps": "optimizer steps between logged values",
    "logger": "logger class, CSVLogger by default; false for none",
    "callbacks": "more callbacks, such as ModelCheckpoint",
    "default_root_dir": "output folder of a run without a logger",
}
# Options that take all options of a group at once; the help lists those of the group instead.
OPTION_GROUPS = {"model", "model.lora", "data", "data.pretrained"}


def default_logger() -> Namespace:
    """Return the config of the logger of a run whose user chooses none."""
    return Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=Namespace(save_dir="."))


class CommandParser(LightningArgumentParser):
    """Lightning's parser of one command, with a default logger of which other loggers inherit no arguments.

    Args:
        args: arguments of Lightning's parser.
        command: name of the command; empty for the parser above the commands.
        kwargs: keyword arguments of Lightning's parser.
    """

    def __init__(self, *args: Any, command: str = "", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.command = command

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:  # noqa: ANN401
        """Return the defaults without the other arguments of the default logger than those of `default_logger`.

        A logger that the user chooses inherits the default logger's arguments where it has arguments of the same name.
        ``save_dir`` stays because CSVLogger and TensorBoardLogger require it.
        """
        defaults = super().get_defaults(*args, **kwargs)
        if "trainer.logger" in defaults:
            defaults["trainer.logger"] = default_logger()
        return defaults


class HelpFormatter(DefaultHelpFormatter):
    """Help without types and groups, with the Trainer's options of `TRAINER_HELP` only."""

    def add_argument(self, action: argparse.Action) -> None:
        """Add an option to the help unless it is a group or a less used option of the Trainer."""
        group, _, name = action.dest.partition(".")
        if name in TRAINER_HELP if group == "trainer" else action.dest not in OPTION_GROUPS:
            super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest in COMMANDS:
            return COMMANDS[action.dest]
        text = TRAINER_HELP.get(action.dest.removeprefix("trainer."), action.help or "")
        no_default = action.default in (None, "", argparse.SUPPRESS) or action.dest == "trainer.logger"
        return text if no_default else f"{text} (default: %(default)s)"


def readable_error(error: str, options: Iterable[str]) -> str:
    """Shorten a message of jsonargparse to one line without Python's type syntax.

    Args:
        error: the message.
        options: all options, of which the most similar is suggested in place of an unknown one.
    """
    error = " ".join(error.split())
    for pattern, replacement in (
        (r"Does not validate .* Subtypes: \[(.*)\] Errors: .* Given value: ", r"Expected one of \1. Got value: "),
        (r"<class '([\w.]+)'>|typing\.(?=Literal)", r"\1"),
        (r'Parser key "([\w.]+)"', r"\1"),
    ):
        error = re.sub(pattern, replacement, error)
    if unknown := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", error):
        similar = difflib.get_close_matches(unknown[1], sorted(options), n=1)
        error = f"no option {unknown[1]}" + "".join(f", did you mean {option}?" for option in similar)
    return error
