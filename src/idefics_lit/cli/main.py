"""The command line: LightningCLI on `Idefics2Module` and `DocVQADataModule`, and one line for a user's mistake."""

import argparse
import difflib
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]
from jsonargparse import ArgumentError, DefaultHelpFormatter, Namespace, dict_to_namespace
from lightning import Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from idefics_lit.cli.progress_bar import ProgressBar
from idefics_lit.cli.trainer import OPTIONS, DocVQATrainer
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.errors import InputError
from idefics_lit.reporting.report import Report
from idefics_lit.reporting.results import PredictionWriter, Results, SaveConfig, SkippedExamples
from idefics_lit.training.checkpoint import AtomicCheckpointIO, CheckpointConnector, read_checkpoint
from idefics_lit.training.experiment import describe, differences, flatten, only_experiment, resumable, tell
from idefics_lit.training.preemption import SaveOnSigterm
from idefics_lit.training.run_folder import log_folder, own_folder

COMMANDS = {
    "fit": "Train the adapter, validate as often as the config says, keep the best checkpoint.",
    "validate": "Score a checkpoint, or the model without one, on the validation split.",
    "test": "Score a checkpoint, or the model without one, on the test split.",
    "predict": "Answer a split's questions, with or without references: submission.json and predictions.jsonl.",
    "check": "Read all training and validation questions and say what training would meet; no model is loaded.",
    "ask": "Ask a checkpoint, or the model without one, questions about the pages of images and PDFs.",
    "demo": "Ask in the browser, on a page that this machine alone reaches; base and tuned model side by side.",
    "export": "Write a checkpoint's adapter as a folder that plain peft loads, or merged into its base.",
}
WITHOUT_DATA = {"ask", "demo", "export"}  # commands for which no data.source is needed, and which leave no run behind
PARTS = {"model", "model.lora", "data", "data.pretrained"}
TRAINER_OPTIONS = {
    "accelerator": "cpu, gpu or auto",
    "devices": "how many, a list of which, or auto",
    "precision": "16-mixed, bf16-mixed or 32-true",
    "max_steps": "optimizer steps to train for",
    "max_epochs": "rounds through the training questions to train for",
    "accumulate_grad_batches": "batches an optimizer step",
    "gradient_clip_val": "the largest norm of the gradients",
    "val_check_interval": "batches, or share of an epoch, between validations",
    "check_val_every_n_epoch": "null lets val_check_interval count over epochs",
    "log_every_n_steps": "optimizer steps between logged values",
    "logger": "where values are logged, false for nowhere",
    "callbacks": "further callbacks, such as ModelCheckpoint",
    "default_root_dir": "the output folder where there is no logger",
}

NO_MEMORY = (
    "the GPU's memory doesn't suffice: lower data.batch_size and raise trainer.accumulate_grad_batches by as much, or "
    "give --model.gradient_checkpointing true, or for an evaluation lower data.eval_batch_size"
)


LOGGER_FOLDER = "."
LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": LOGGER_FOLDER}}


# The files that evaluations write.
ANSWERS = {"validate": "val_predictions.jsonl", "test": "test_predictions.jsonl", "predict": "submission.json"}


class _Parser(LightningArgumentParser):
    """Lightning's parser, whose default logger leaves nothing to another one that is given in its place."""

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:  # noqa: ANN401
        """Return the defaults, the logger's without those of its class: a class that has them too would inherit them.

        ``save_dir`` stays, which CSVLogger and TensorBoardLogger require; see `_parse` for others.
        """
        defaults = super().get_defaults(*args, **kwargs)
        if "trainer.logger" in defaults:
            defaults["trainer.logger"] = dict_to_namespace(LOGGER)
        return defaults


class DocVQACLI(LightningCLI):
    """LightningCLI with one ``pretrained`` for module and data, whose flags win over what a checkpoint remembers."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, and the arguments of each that are no options."""
        hidden = {"model", "datamodule", "ckpt_path", "weights_only", "verbose"}
        return {
            "fit": hidden | {"train_dataloaders", "val_dataloaders"},
            "validate": hidden | {"dataloaders"},
            "test": hidden | {"dataloaders"},
            "predict": hidden | {"dataloaders", "return_predictions"},
            "check": hidden,
            **{command: hidden | options.keys() for command, options in OPTIONS.items()},
        }

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:  # noqa: ANN401
        usage = "%(prog)s [--config FILE] [--OPTION VALUE ...]"
        super()._add_subcommands(parser, **{c: {"description": COMMANDS[c], "usage": usage} for c in COMMANDS})
        for name, options in OPTIONS.items():  # by a method's signature a list would be typed as --image+ alone
            for option, how in options.items():
                self._subcommand_parsers[name].add_argument(f"--{option}", **how)
            self._subcommand_method_arguments[name] = [*options, "ckpt_path"]
        assert parser._subcommands_action is not None
        for command in parser._subcommands_action._choices_actions:  # Lightning's lines are cut off
            command.help = COMMANDS[command.dest]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``ckpt_path``, take the processor from where the model comes from, and list the Trainer last."""
        parser.add_argument("--ckpt_path", type=str | None, help="the checkpoint to start from; its options are kept")
        parser.link_arguments("model.pretrained", "data.pretrained")
        # A checkpoint may name the source, so that it isn't required before the checkpoint is read.
        parser.set_defaults({"data.source": ""})
        assert parser.groups is not None
        trainer = parser.groups["trainer"]
        trainer.title = "The Trainer's, most used (--print_config shows all)"
        parser._action_groups = sorted(parser._action_groups, key=lambda group: group is trainer)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401
        """Parse; with a checkpoint parse again, its hyperparameters as defaults below the config and the flags."""
        self.config = self._parse(parser, args)
        command = self.config.subcommand
        options = self.config[command]
        path, rank = options.ckpt_path, rank_zero_only.rank  # type: ignore[attr-defined]
        complete = command == "fit" and bool(options.data.source)  # the command itself says what is trained
        if path in ("last", "hpc") or (path is None and complete and SLURMEnvironment.detect()):
            # Ranks may see different files: rank 0 tells them, but what they need for their config they look up.
            path = self._find_checkpoint(complete=complete) if rank == 0 or not complete else None
        else:
            complete = path == "best"
        if path and not complete:
            self._subcommand_parsers[command].set_defaults(_remembered(self._read_checkpoint(path)))
            self.config = self._parse(parser, args)
        named = path if options.ckpt_path not in (None, "last", "hpc", "best") else None
        requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and SLURMEnvironment.detect()
        if command == "fit" and named and requeued:  # rank 0 tells the others, as above
            path = self._saved_since(named) or named if rank == 0 else None
        self.config[command].ckpt_path = path

    def _saved_since(self, begun_from: str) -> str | None:
        """Find what Lightning saved when SLURM queued this job again, newer than what the job began from."""
        options = self.config.fit
        own, begun = describe(options.as_dict()), os.stat(begun_from).st_mtime_ns
        files = Path(options.trainer.default_root_dir or ".").expanduser().glob("hpc_ckpt_*.ckpt")
        path = resumable(
            [file for file in files if file.stat().st_mtime_ns > begun],
            lambda _, saved: differences(saved, own),
            self._read_checkpoint,
        )
        if path:
            tell(f"last checkpoint: {path}, saved when the job was queued again")
        return str(path) if path else None

    def _read_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Return a checkpoint whose options are options here.

        Raises:
            InputError: as `read_checkpoint` does, and when one of its options isn't known or can't have its value.
        """
        checkpoint = read_checkpoint(path)
        remembered, parser = _remembered(checkpoint), self._subcommand_parsers[self.config.subcommand]
        if unknown := sorted(remembered.keys() - {action.dest for action in parser._actions}):
            raise InputError(
                f"ckpt_path {path}: {unknown[0]}, which it was trained with, is no option here: it is another "
                f"version's, or another program's"
            )
        try:
            parser.parse_object(remembered, defaults=False)  # defaults, which they become, aren't checked
        except ArgumentError as error:
            raise InputError(
                f"ckpt_path {path}: what it was trained with can't be: {_explain(str(error), [])}: it is damaged, or "
                f"another version's"
            ) from error
        return checkpoint

    def _find_checkpoint(self, *, complete: bool) -> str | None:
        """Find what "last" means, or a SLURM job's own checkpoint where none is asked for.

        A fit that finds none begins, so that a job's script can always say "last".

        Args:
            complete: the command says what it trains, and goes on with that alone.
        """
        command = self.config.subcommand
        options = self.config[command]
        root = Path(options.trainer.default_root_dir or ".").expanduser()
        version = _given_version(options.trainer.logger)
        try:
            loggers = [instantiate_class((), logger.as_dict()) for logger in _loggers(options.trainer.logger)]
        except ModuleNotFoundError as error:
            raise InputError(f"trainer.logger: {error}") from error
        folder = log_folder(loggers, root, version)
        if not loggers:
            folder /= "checkpoints"
        files = {*root.glob("hpc_ckpt_*.ckpt")}  # where Lightning saves before SLURM queues a job again
        if options.ckpt_path == "last":
            others = [callback.get("init_args", {}).get("dirpath") for callback in options.trainer.callbacks or []]
            for some in (folder, *filter(None, others)):
                files.update(Path(some, name) for name in glob("**/*.ckpt", root_dir=some, recursive=True))
        own = describe(options.as_dict())
        if complete:
            # A version that the user gives is one run, whatever it was trained with.
            named = version is not None
            path = resumable(
                files,
                lambda path, saved: [] if named and folder in path.parents else differences(saved, own),
                self._read_checkpoint,
            )
        else:
            defaults = describe(self._subcommand_parsers[command].get_defaults().as_dict())
            given = {name: value for name, value in own.items() if value != defaults.get(name)}
            path = only_experiment(files, given, self._read_checkpoint, strict=command == "fit")
        if path is None and command != "fit":
            raise InputError(f"ckpt_path {options.ckpt_path}: no checkpoint in {folder}")
        if path or options.ckpt_path:
            tell(f"last checkpoint: {path}" if path else f"no checkpoint in {folder} yet: the fit begins")
        return str(path) if path else None

    def _parse(self, parser: LightningArgumentParser, args: Any) -> Namespace:  # noqa: ANN401
        try:
            config = parser.parse_args(args)
        except UnicodeDecodeError as error:
            raise InputError(f"a config file is no text in UTF-8: {error}") from error
        except ArgumentError as error:
            known = {action.dest for command in self._subcommand_parsers.values() for action in command._actions}
            raise InputError(_explain(str(error), sorted(known))) from error
        for part in ("trainer", "data", "model.lora"):
            if config[config.subcommand].get(part) is None:
                raise InputError(f"{part} is null: give its options, or leave it out")
        trainer = config[config.subcommand].trainer
        if trainer.logger in (None, True):
            trainer.logger = self._subcommand_parsers[config.subcommand].get_defaults().trainer.logger
        for logger in _loggers(trainer.logger):
            # CSVLogger and TensorBoardLogger log into a folder lightning_logs, also of one that is called so already.
            if logger.init_args.get("name") == Path(logger.init_args.get("save_dir") or ".").name == "lightning_logs":
                logger.init_args.name = ""
            # The default logger's, which other classes have a default of their own for.
            requires_folder = logger.class_path.rpartition(".")[2] in ("CSVLogger", "TensorBoardLogger")
            if not requires_folder and logger.init_args.get("save_dir") == LOGGER_FOLDER:
                del logger.init_args["save_dir"]
        return config

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's hyperparameters win over the user's flags."""

    def before_instantiate_classes(self) -> None:
        """Refuse what can't work before anything is loaded, and let wandb run without an account."""
        options = self.config[self.config.subcommand]
        if not options.data.source and self.config.subcommand not in WITHOUT_DATA:
            raise InputError("data.source is missing: give --config FILE, or a folder, Hub id or synthetic")
        trainer = options.trainer
        if trainer.accumulate_grad_batches < 1:
            raise InputError(f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}: give 1 or more")
        if trainer.val_check_interval == 0:
            raise InputError("trainer.val_check_interval 0: give 1 or more batches, or a share of an epoch up to 1.0")
        if self.config.subcommand in WITHOUT_DATA:
            trainer.logger = trainer.enable_progress_bar = False
            # One process answers page by page; what a config limits, it limits for runs.
            trainer.devices, trainer.num_nodes = _one_device(trainer.devices), 1
            trainer.limit_predict_batches, trainer.fast_dev_run, trainer.overfit_batches = None, False, 0.0
            self.trainer_defaults["callbacks"] = []
        loggers = {logger.class_path.rpartition(".")[2]: logger.init_args for logger in _loggers(trainer.logger)}
        if self.config.subcommand == "check" and loggers and not {"CSVLogger", "TensorBoardLogger"} & loggers.keys():
            # It logs nothing: the first free number is enough for its file.
            trainer.logger = self._subcommand_parsers["check"].get_defaults().trainer.logger
        elif "WandbLogger" in loggers:
            _prepare_wandb(loggers["WandbLogger"].get("save_dir") or ".")
        if "TensorBoardLogger" in loggers and not (find_spec("tensorboard") or find_spec("tensorboardX")):
            raise InputError("trainer.logger TensorBoardLogger writes with tensorboard: pip install tensorboard")
        if trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].insert(0, ProgressBar())
        on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.cuda.is_available())
        if on_cpu and str(trainer.precision) in ("16", "16-mixed"):
            raise InputError("trainer.precision 16-mixed needs a GPU: give --trainer.precision bf16-mixed or 32-true")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401
        """Return the Trainer; what it refuses, such as a job's wrong environment, is a user's mistake."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"trainer: {error}") from error

    def after_instantiate_classes(self) -> None:
        """Find out now, not after training, that results can't be written; read and write checkpoints our way."""
        self.trainer._checkpoint_connector = CheckpointConnector(self.trainer)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if self.config.subcommand in WITHOUT_DATA:
            return
        loggers = self.trainer.loggers
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger._wandb_init.pop("anonymous", None)  # wandb warns of it, asked for or not
        folder = Path((loggers[0].save_dir if loggers else None) or self.trainer.default_root_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"the output folder {folder} can't be written: {error}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Give a run a folder of its own."""
        if subcommand in WITHOUT_DATA or not self.trainer.is_global_zero:
            super()._run_subcommand(subcommand)
            return
        options = self.config[subcommand]
        resumed = options.ckpt_path if subcommand == "fit" else None
        with own_folder(
            self.trainer,
            version=_given_version(options.trainer.logger),
            fit=subcommand == "fit",
            resumed=resumed,
            writes=ANSWERS.get(subcommand),
        ):
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        """Score all validation questions where the fit scored some: with the best checkpoint, if one is kept."""
        if self.datamodule.hparams.val_in_fit is not None:
            best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
            self.trainer.validate(self.model, self.datamodule, ckpt_path=best or None, weights_only=True)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # A checkpoint is data: nothing in it may run code.
        given = super()._prepare_subcommand_kwargs(subcommand)
        if hasattr(Trainer, subcommand):
            given |= {"ckpt_path": self.config_init[subcommand].ckpt_path, "weights_only": True}
        return given


def _remembered(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a checkpoint was trained with, by dotted name."""
    parts = {"model": checkpoint["hyper_parameters"], "data": checkpoint.get("datamodule_hyper_parameters", {})}
    remembered = flatten(parts)
    remembered.pop("data.pretrained", None)  # linked to the model's
    return remembered


def _one_device(devices: list[int] | str | int) -> list[int] | int:
    """Return the first of ``trainer.devices``, in any of the Trainer's notations."""
    named = devices.strip(" ,").split(",") if isinstance(devices, str) and "," in devices else devices
    return [int(named[0])] if isinstance(named, list) and named else 1


class _Help(DefaultHelpFormatter):
    """Help without types, without options that take a part's whole config, and with the Trainer's most used only."""

    def add_argument(self, action: argparse.Action) -> None:
        part, _, name = action.dest.partition(".")
        listed = name in TRAINER_OPTIONS if part == "trainer" else action.dest not in PARTS
        if listed:
            super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = TRAINER_OPTIONS.get(action.dest.removeprefix("trainer."), action.help or "")
        return text if action.default in (None, "", argparse.SUPPRESS) else f"{text} (default: %(default)s)"


def _explain(error: str, options: Sequence[str]) -> str:
    """Make jsonargparse's message readable: type names without Python around them, and the option that was meant."""
    error = " ".join(error.split())
    for pattern, readable in (
        (r"Does not validate .* Subtypes: \[(.*)\] Errors: .* Given value: ", r"Expected one of \1. Got value: "),
        (r"<class '([\w.]+)'>|typing\.(?=Literal)", r"\1"),
        (r'Parser key "([\w.]+)"', r"\1"),
    ):
        error = re.sub(pattern, readable, error)
    if unknown := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", error):
        close = difflib.get_close_matches(unknown[1], options, n=1)
        error = f"no option {unknown[1]}" + "".join(f", did you mean {option}?" for option in close)
    return error


def _loggers(logger: Any) -> list[Namespace]:  # noqa: ANN401
    """Return the loggers of a config, of which there may be none, one or several."""
    return [*logger] if isinstance(logger, list) else [logger] if isinstance(logger, Namespace) else []


def _given_version(logger: Any) -> int | str | None:  # noqa: ANN401
    """Return the version that the user gives the first logger, by which a run is known; Weights & Biases' is an id."""
    for first in _loggers(logger)[:1]:
        args = first.init_args
        drawn = os.environ.get("WANDB_RUN_ID") if first.class_path.endswith("WandbLogger") else None
        return next((x for x in (args.get("version"), args.get("id"), drawn) if x is not None), None)
    return None


def _prepare_wandb(folder: str) -> None:
    import wandb  # only where it is used: its import takes a second

    # What waits to be uploaded lies with the runs that it is of, and not in the home folder.
    os.environ.setdefault("WANDB_DATA_DIR", os.path.abspath(os.path.join(folder, "wandb")))
    if not wandb.login(prompt=False, verify=False):
        os.environ.setdefault("WANDB_MODE", "offline")
        wandb.teardown()  # it has read the environment already


def _hide_noise(*, training: bool, quiet: bool) -> None:
    """Silence what libraries say about themselves and no user of this program can act on."""
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING if quiet else logging.NOTSET)
    if quiet and not are_progress_bars_disabled():
        transformers.logging.disable_progress_bar()  # of loading; it takes the Hub's along
        enable_progress_bars()
    if not training:  # which callbacks a checkpoint remembers matters to a resumed fit only
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
        warnings.filterwarnings("ignore", message="The dirpath has changed from")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\). is deprecated")
    warnings.filterwarnings("ignore", message=r".*gradient_checkpointing(_enable)?. is deprecated")
    # A stream's length is the training's, whatever its workers read.
    warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata's loader calls it
    # DDP's gradients arrive on the stream that graphs are replayed on.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
    # With float16 the first steps are skipped until the scale fits.
    warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
    for name in (
        "bitsandbytes.backends.cpu.ops",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "transformers.processing_utils",
    ):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    old = (
        "Failed to load CPU gemm_4bit_forward|💡 Tip: |TPU available: False|`Trainer.fit` stopped: `max_|"
        "You are using a CUDA device .* that has Tensor Cores|Chat templates should be in a 'chat_template.jinja' file"
    )
    return not re.match(old, record.getMessage())


def _is_lightnings(error: Exception) -> bool:
    """Whether Lightning itself refuses something, such as a callback's metric that isn't logged."""
    if isinstance(error, MisconfigurationException):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    folder = Path(lightning.__file__).parent
    return folder in Path(frame.filename).parents and (frame.line or "").startswith("raise ")


def main(args: Sequence[str] | None = None) -> None:
    """Run one of `COMMANDS`.

    Args:
        args: the command line, ``sys.argv`` unless given.

    Raises:
        SystemExit: with code 2 and one line on standard error after a user's mistake; ``--debug`` or the environment
            variable ``IDEFICS_LIT_DEBUG=1`` shows the traceback instead. With code 143 after SIGTERM.
    """
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args or os.environ.get("IDEFICS_LIT_DEBUG", "0") not in ("", "0")
    _hide_noise(training="fit" in args, quiet=not WITHOUT_DATA.isdisjoint(args))
    from idefics_lit.training.module import Idefics2Module  # bitsandbytes talks when it is imported

    results = Results()
    try:
        DocVQACLI(
            Idefics2Module,
            DocVQADataModule,
            trainer_class=DocVQATrainer,
            args=[arg for arg in args if arg != "--debug"],
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={
                "callbacks": [SaveOnSigterm(), PredictionWriter(), results, SkippedExamples(), Report(results)],
                "enable_model_summary": False,
                "logger": LOGGER,
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=_Parser,
            parser_kwargs={
                "prog": Path(sys.argv[0]).name if "idefics-lit" in sys.argv[0] else "python -m idefics_lit",
                "description": "Fine-tune Idefics2 on document questions.",
                "formatter_class": _Help,
                "exit_on_error": False,
            },
        )
    except Exception as error:
        if debug or not (isinstance(error, InputError | torch.OutOfMemoryError) or _is_lightnings(error)):
            raise
        text = NO_MEMORY if isinstance(error, torch.OutOfMemoryError) else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except SIGTERMException:  # Lightning's has exit code 0
        raise SystemExit(128 + signal.SIGTERM) from None
