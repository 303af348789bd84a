"""LightningCLI on `Idefics2Module` and `DocVQADataModule`; every run writes to a folder of its own."""

import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO

from idefics_lit.cli.checkpoint_options import CheckpointOptionsCLI
from idefics_lit.cli.loggers import prepare_loggers, run_version
from idefics_lit.cli.parser import COMMANDS
from idefics_lit.cli.progress_bar import ProgressBar
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.errors import InputError
from idefics_lit.model.execution import default_precision
from idefics_lit.pretrained import DTYPES
from idefics_lit.training.checkpoint import AtomicCheckpointIO
from idefics_lit.training.lightning_compat import remove_wandb_anonymous, use_checkpoint_connector
from idefics_lit.training.run_folder import exclusive_run_folder

# The file of answers that each evaluation writes.
ANSWER_FILES = {"validate": "val_predictions.jsonl", "test": "test_predictions.jsonl", "predict": "submission.json"}
WITHOUT_RUN = {"ask", "demo", "export"}  # commands that need no data.source and write no run folder


class CommandTrainer(Trainer):
    """A Trainer with a method for each command: LightningCLI requires it, `DocVQACLI` has those that run."""

    def check(self) -> None:
        """Placeholder of a command."""

    ask = demo = export = check


class DocVQACLI(CheckpointOptionsCLI):
    """LightningCLI with more commands, a run folder for each run, and checks before anything is loaded."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands with the arguments of the Trainer's methods, none of which is an option by itself."""
        return {name: {*inspect.signature(getattr(CommandTrainer, name)).parameters} for name in COMMANDS}

    # Instantiation

    def before_instantiate_classes(self) -> None:
        """Check the options that the classes don't check, before anything is loaded."""
        command = self.config.subcommand
        options, trainer = self.config[command], self.config[command].trainer
        options.ckpt_path = self.ckpt_path
        if not options.data.source and command not in WITHOUT_RUN:
            raise InputError("data.source is missing: give --config FILE, or a folder, Hub id or synthetic")
        if trainer.accumulate_grad_batches < 1:
            raise InputError(f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}: give 1 or more")
        if trainer.val_check_interval == 0:
            raise InputError("trainer.val_check_interval 0: give 1 or more batches, or a fraction of an epoch to 1.0")
        if command in WITHOUT_RUN:
            trainer.logger = trainer.enable_progress_bar = False
            trainer.callbacks = None  # among them may be a progress bar
            # One process handles all pages; a config may set several devices and limits for runs.
            trainer.devices, trainer.num_nodes = _first_device(trainer.devices), 1
            trainer.limit_predict_batches, trainer.fast_dev_run, trainer.overfit_batches = None, False, 0.0
            self.trainer_defaults["callbacks"] = []
        has_gpu = trainer.accelerator != "cpu" and torch.cuda.is_available()
        if command == "check" and not has_gpu:
            from idefics_lit.cli.check import use_cpu

            use_cpu(trainer)
        prepare_loggers(trainer, command)
        if trainer.precision is None:
            trainer.precision = default_precision(gpu=has_gpu)
        if not has_gpu and trainer.accelerator in ("auto", "cpu") and str(trainer.precision) in ("16", "16-mixed"):
            raise InputError("trainer.precision 16-mixed needs a GPU: give --trainer.precision bf16-mixed or 32-true")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401
        """Return the Trainer, with the package's progress bar unless the user gives another.

        Raises:
            InputError: the Trainer refuses its arguments or the environment of the job.
        """
        options = self.config_init[self.config_init.subcommand].trainer
        callbacks = options.callbacks if isinstance(options.callbacks, list) else [options.callbacks]
        if options.enable_progress_bar is not False and not any(isinstance(c, BaseProgressBar) for c in callbacks):
            self.trainer_defaults["callbacks"].insert(0, ProgressBar())
        try:
            return super().instantiate_trainer(**kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"trainer: {error}") from error

    def after_instantiate_classes(self) -> None:
        """Write checkpoints atomically, and check before training that the output folder can be written."""
        # At the end of a run Lightning moves all weights to the CPU, 17 GB with Idefics2-8b, where nothing uses them.
        self.model.cpu = partial(_unmoved, self.model)
        use_checkpoint_connector(self.trainer)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if self.config.subcommand in WITHOUT_RUN:
            return
        remove_wandb_anonymous(self.trainer)
        loggers = self.trainer.loggers
        folder = Path((loggers[0].save_dir if loggers else None) or self.trainer.default_root_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"the output folder {folder} can't be written: {error}") from error

    # Commands: LightningCLI calls the method of this name, before the Trainer's

    def fit(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Train; then score all validation questions with the best checkpoint if training scored a part of them."""
        with self._run_folder():
            self.trainer.fit(**kwargs, ckpt_path=self.ckpt_path, weights_only=True)
            if self.datamodule.hparams.val_in_fit is not None:
                best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
                self.trainer.validate(**kwargs, ckpt_path=best or None, verbose=False, weights_only=True)

    def validate(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Score the validation split."""
        with self._run_folder():
            self.trainer.validate(**kwargs, ckpt_path=self.ckpt_path, verbose=False, weights_only=True)

    def test(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Score the test split."""
        with self._run_folder():
            self.trainer.test(**kwargs, ckpt_path=self.ckpt_path, verbose=False, weights_only=True)

    def predict(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Answer the questions of a split."""
        with self._run_folder():
            self.trainer.predict(**kwargs, ckpt_path=self.ckpt_path, weights_only=True)

    def check(self, model: Any, datamodule: DocVQADataModule) -> None:  # noqa: ANN401
        """Report what training would meet in the data."""
        from idefics_lit.cli.check import check

        with self._run_folder():
            check(self.trainer, model, datamodule)

    def ask(self, model: Any, datamodule: DocVQADataModule) -> None:  # noqa: ANN401
        """Print answers to questions about files."""
        from idefics_lit.cli.ask import ask

        options = self.config.ask
        ask(
            self.trainer,
            model,
            datamodule.hparams,
            images=options.image or (),
            questions=options.question or (),
            as_json=options.json,
            min_confidence=options.min_confidence,
            ckpt_path=self.ckpt_path,
        )

    def demo(self, model: Any, datamodule: DocVQADataModule) -> None:  # noqa: ANN401
        """Answer questions in a browser."""
        from idefics_lit.cli.demo import demo

        model.trainer = self.trainer  # gives device and precision
        demo(model, datamodule.hparams, self.ckpt_path, self.config.demo.host, self.config.demo.port)

    def export(self, model: Any, datamodule: DocVQADataModule) -> None:  # noqa: ANN401
        """Write the adapter or the merged model."""
        from idefics_lit.cli.export import export

        options = self.config.export
        export(
            model,
            datamodule.hparams,
            self.ckpt_path,
            options.output,
            device=self.trainer.strategy.root_device,
            dtype=DTYPES.get(str(self.trainer.precision), torch.float32),
            merge=options.merge,
            merge_into=options.merge_into,
            push_to_hub=options.push_to_hub,
        )

    @contextmanager
    def _run_folder(self) -> Iterator[None]:
        """Keep other runs out of this run's folder."""
        if not self.trainer.is_global_zero:
            yield
            return
        command = self.config.subcommand
        fit = command == "fit"
        with exclusive_run_folder(
            self.trainer,
            version=run_version(self.config[command].trainer.logger),
            fit=fit,
            ckpt_path=self.ckpt_path if fit else None,
            answers=ANSWER_FILES.get(command),
        ):
            yield


def _unmoved(model: LightningModule) -> LightningModule:
    return model


def _first_device(devices: list[int] | str | int) -> list[int] | int:
    """Return the first device of ``trainer.devices``, in any of the Trainer's notations."""
    indices = devices.strip(" ,").split(",") if isinstance(devices, str) and "," in devices else devices
    return [int(indices[0])] if isinstance(indices, list) and indices else 1
