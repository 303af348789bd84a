"""The loggers of a config: before they are instantiated, and what Weights & Biases and TensorBoard need."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from idefics_lit.cli.parser import default_logger
from idefics_lit.errors import InputError


def logger_configs(logger: Any) -> list[Namespace]:  # noqa: ANN401
    """Return the configs of ``trainer.logger``, which is one logger, a list of loggers, or false for none."""
    return [*logger] if isinstance(logger, list) else [logger] if isinstance(logger, Namespace) else []


def set_default_logger(trainer: Namespace) -> None:
    """Use the default logger for null and true, and no folder ``lightning_logs`` inside one of that name.

    Args:
        trainer: the options of the Trainer, which are changed.
    """
    if trainer.logger in (None, True):
        trainer.logger = default_logger()
    for logger in logger_configs(trainer.logger):
        # CSVLogger and TensorBoardLogger log to save_dir/lightning_logs by default.
        if logger.init_args.get("name") == Path(logger.init_args.get("save_dir") or ".").name == "lightning_logs":
            logger.init_args.name = ""
        # The folder of the default logger; classes that don't require one have a default of their own.
        requires_folder = logger.class_path.rpartition(".")[2] in ("CSVLogger", "TensorBoardLogger")
        if not requires_folder and logger.init_args.get("save_dir") == default_logger().init_args.save_dir:
            del logger.init_args["save_dir"]


def run_version(logger: Any) -> int | str | None:  # noqa: ANN401
    """Return the version or id that the user gives the first logger, None where the logger chooses one."""
    for first in logger_configs(logger)[:1]:
        args = first.init_args
        run_id = os.environ.get("WANDB_RUN_ID") if first.class_path.endswith("WandbLogger") else None
        return next((x for x in (args.get("version"), args.get("id"), run_id) if x is not None), None)
    return None


def prepare_loggers(trainer: Namespace, command: str) -> None:
    """Replace loggers that ``check`` doesn't need, and run Weights & Biases offline where there is no account.

    Args:
        trainer: the options of the Trainer, which are changed.
        command: the command.

    Raises:
        InputError: TensorBoardLogger is used without tensorboard.
    """
    if command == "check" and (configs := logger_configs(trainer.logger)):
        # check logs no metrics; it only needs a numbered folder for check.txt.
        folders = [config for config in configs if config.class_path.endswith((".CSVLogger", ".TensorBoardLogger"))]
        trainer.logger = folders[0] if folders else default_logger()
    loggers = {logger.class_path.rpartition(".")[2]: logger.init_args for logger in logger_configs(trainer.logger)}
    if "WandbLogger" in loggers:
        _prepare_wandb(loggers["WandbLogger"].get("save_dir") or ".")
    if "TensorBoardLogger" in loggers and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise InputError("trainer.logger TensorBoardLogger writes with tensorboard: pip install tensorboard")


def _prepare_wandb(folder: str) -> None:
    import wandb  # imported where it is used: the import takes a second

    # Staged uploads belong next to the runs, not in the home folder.
    os.environ.setdefault("WANDB_DATA_DIR", os.path.abspath(os.path.join(folder, "wandb")))
    if not wandb.login(prompt=False, verify=False):
        os.environ.setdefault("WANDB_MODE", "offline")
        wandb.teardown()  # wandb.login has read the environment already
