"""LightningCLI whose options default to those of the checkpoint, or of the export, that the command loads.

Flags and config files override them.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from idefics_lit.cli.last_checkpoint import find_last_checkpoint, find_newer_requeue_checkpoint
from idefics_lit.cli.loggers import set_default_logger
from idefics_lit.cli.parser import COMMAND_OPTIONS, COMMANDS, CommandParser, readable_error
from idefics_lit.errors import InputError
from idefics_lit.training.checkpoint import read_checkpoint
from idefics_lit.training.experiment import flatten


class CheckpointOptionsCLI(LightningCLI):
    """LightningCLI with ``ckpt_path``, whose checkpoint completes the options, for all of `COMMANDS`.

    Args:
        args: LightningCLI's arguments by position.
        kwargs: LightningCLI's arguments by name. ``args``, the command line, is required.

    Attributes:
        parsers: the parser of each command that is typed.
        ckpt_path: the checkpoint that the command loads.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self.parsers: dict[str, CommandParser] = {}
        self.ckpt_path: str | None = None
        # The other parsers stay empty, since adding the options of all commands takes as long as importing torch.
        typed = COMMANDS.keys() & set(kwargs["args"])
        config_names_command = not typed and any(arg.startswith("--config") for arg in kwargs["args"])
        self._with_options = {*COMMANDS} if config_names_command else typed
        super().__init__(*args, **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the model, the data and the Trainer, in the order of the help."""
        assert isinstance(parser, CommandParser)
        if parser.command not in self._with_options:
            return
        parser.add_lightning_class_args(self.model_class, "model")  # type: ignore[arg-type]
        parser.add_lightning_class_args(self.datamodule_class, "data")  # type: ignore[arg-type]
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items() if k != "callbacks"})
        assert parser.groups is not None
        parser.groups["trainer"].title = "Most used options of the Trainer (--print_config shows all)"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``ckpt_path`` and the command's own options; use one ``pretrained`` for model and data."""
        assert isinstance(parser, CommandParser)
        if parser.command not in self._with_options:
            return
        self.parsers[parser.command] = parser
        parser.add_argument("--ckpt_path", type=str | None, help="checkpoint to load; its options are the defaults")
        for option, arguments in COMMAND_OPTIONS.get(parser.command, {}).items():
            parser.add_argument(f"--{option}", **arguments)
        parser.link_arguments("model.pretrained", "data.pretrained")
        parser.set_defaults({"data.source": ""})  # not required: the checkpoint may give it

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401
        """Parse the arguments; with a checkpoint parse them again, with its hyperparameters as defaults."""
        self.config = self._parse(parser, args)
        command = self.config.subcommand
        options = self.config[command]
        path, rank = options.ckpt_path, rank_zero_only.rank  # type: ignore[attr-defined]
        complete = command == "fit" and bool(options.data.source)  # the options alone describe the experiment
        if path in ("last", "hpc") or (path is None and complete and SLURMEnvironment.detect()):
            # Ranks may see different files, so rank 0 chooses the checkpoint that is loaded. The other ranks only
            # search where the checkpoint completes their options.
            find = rank == 0 or not complete
            defaults = self.parsers[command].get_defaults()
            search = partial(find_last_checkpoint, options, defaults, self._read_checkpoint)
            path = search(command=command, complete=complete) if find else None
        else:
            complete = path == "best"
        if path and not complete:
            self.parsers[command].set_defaults(_checkpoint_options(self._read_checkpoint(path)))
            self.config = self._parse(parser, args)
        elif not path and command not in ("fit", "check"):  # a fit trains as its options say
            self.parsers[command].set_defaults(_prompt_options(options.model.adapter or options.model.pretrained))
            self.config = self._parse(parser, args)
        explicit = path if options.ckpt_path not in (None, "last", "hpc", "best") else None
        requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and SLURMEnvironment.detect()
        if command == "fit" and explicit and requeued:  # rank 0 chooses for all ranks
            newer = find_newer_requeue_checkpoint(self.config[command], explicit, self._read_checkpoint)
            path = newer or explicit if rank == 0 else None
        # Without a path until `before_instantiate_classes`: LightningCLI reads hyperparameters from it after this
        # method, and they would override the flags.
        self.ckpt_path = path
        self.config[command].ckpt_path = None

    def _parse(self, parser: LightningArgumentParser, args: Any) -> Namespace:  # noqa: ANN401
        try:
            config = parser.parse_args(args)
        except UnicodeDecodeError as error:
            raise InputError(f"a config file isn't UTF-8 text: {error}") from error
        except ArgumentError as error:
            options = {key for command in self.parsers.values() for key in command.get_defaults().keys(branches=True)}
            raise InputError(readable_error(str(error), options)) from error
        for group in ("trainer", "data", "model.lora"):
            if config[config.subcommand].get(group) is None:
                raise InputError(f"{group} is null: give its options, or leave it out")
        set_default_logger(config[config.subcommand].trainer)
        return config

    def _read_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Return a checkpoint whose hyperparameters are valid options.

        Raises:
            InputError: `read_checkpoint` refuses it, or one of its options is unknown or has an invalid value.
        """
        checkpoint, parser = read_checkpoint(path), self.parsers[self.config.subcommand]
        options = _checkpoint_options(checkpoint)
        if unknown := sorted(options.keys() - parser.get_defaults().keys()):
            raise InputError(
                f"ckpt_path {path}: it was trained with {unknown[0]}, which is no option here: another version of this "
                f"program wrote it, or another program"
            )
        try:
            parser.parse_object(options, defaults=False)  # `set_defaults` doesn't check values
        except ArgumentError as error:
            raise InputError(
                f"ckpt_path {path}: it was trained with an invalid option: {readable_error(str(error), [])}: the file "
                f"is damaged, or another version of this program wrote it"
            ) from error
        return checkpoint


def _prompt_options(name: str) -> dict[str, Any]:
    """Return the prompt and image options that an adapter or merged model was trained with, by dotted name."""
    from idefics_lit.training.checkpoint_checks import PROMPT_OPTIONS  # takes seconds to import
    from idefics_lit.training.options import read_training_options

    trained_with = read_training_options(name).get("datamodule_hyper_parameters", {})
    return {f"data.{option}": trained_with[option] for option in PROMPT_OPTIONS if option in trained_with}


def _checkpoint_options(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of model and data that a checkpoint was trained with, by dotted name."""
    options = flatten(
        {"model": checkpoint["hyper_parameters"], "data": checkpoint.get("datamodule_hyper_parameters", {})}
    )
    options.pop("data.pretrained", None)  # linked to model.pretrained
    # Another LightningCLI adds _class_path and _instantiator.
    return {name: value for name, value in options.items() if "._" not in name}
