"""Find the checkpoint that ``--ckpt_path last`` and a requeued SLURM job resume from."""

import os
from glob import glob
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.cli import instantiate_class

from idefics_lit.cli.loggers import logger_configs, run_version
from idefics_lit.errors import InputError
from idefics_lit.training.experiment import (
    ReadCheckpoint,
    describe,
    differences,
    latest_of_one_experiment,
    latest_resumable,
    print_status,
)
from idefics_lit.training.run_folder import log_folder


def find_last_checkpoint(
    options: Namespace, defaults: Namespace, read: ReadCheckpoint, *, command: str, complete: bool
) -> str | None:
    """Return the newest checkpoint of the experiment that a command describes.

    A fit without one starts from the beginning, so that a job script can always say "last".

    Args:
        options: the options of the command. ``ckpt_path`` is "last", "hpc" (a checkpoint that Lightning saves before
            SLURM requeues a job), or None for a SLURM job, which resumes its own hpc checkpoint.
        defaults: the defaults of the command's options.
        read: reads a checkpoint; those that it refuses with an `InputError` are skipped.
        command: the command.
        complete: the options alone describe the experiment, and other experiments' checkpoints are skipped. Otherwise
            the checkpoint completes the options, and all checkpoints must belong to one experiment.

    Raises:
        InputError: there is no checkpoint and the command isn't ``fit``; the checkpoints belong to several experiments;
            or the package of a logger isn't installed.
    """
    root = Path(options.trainer.default_root_dir or ".").expanduser()
    version = run_version(options.trainer.logger)
    try:
        loggers = [instantiate_class((), logger.as_dict()) for logger in logger_configs(options.trainer.logger)]
    except ModuleNotFoundError as error:
        raise InputError(f"trainer.logger: {error}") from error
    folder = log_folder(loggers, root, version)
    if not loggers:
        folder /= "checkpoints"
    files = {*root.glob("hpc_ckpt_*.ckpt")}  # where Lightning saves before SLURM requeues a job
    if options.ckpt_path == "last":
        dirpaths = [callback.get("init_args", {}).get("dirpath") for callback in options.trainer.callbacks or []]
        for searched in (folder, *filter(None, dirpaths)):
            files.update(Path(searched, name) for name in glob("**/*.ckpt", root_dir=searched, recursive=True))
    experiment = describe(options.as_dict())
    if complete:
        # A version that the user gives names one run, even if its options have changed.
        path = latest_resumable(
            files,
            lambda path, saved: (
                [] if version is not None and folder in path.parents else differences(saved, experiment)
            ),
            read,
        )
    else:
        default_experiment = describe(defaults.as_dict())
        changed = {name: value for name, value in experiment.items() if value != default_experiment.get(name)}
        path = latest_of_one_experiment(files, changed, read, strict=command == "fit")
    if path is None and command != "fit":
        raise InputError(f"ckpt_path {options.ckpt_path}: no checkpoint in {folder}")
    if path or options.ckpt_path:
        print_status(f"last checkpoint: {path}" if path else f"no checkpoint in {folder} yet: the fit begins")
    return str(path) if path else None


def find_newer_requeue_checkpoint(options: Namespace, ckpt_path: str, read: ReadCheckpoint) -> str | None:
    """Return the checkpoint that Lightning saved before SLURM requeued this job, if it is newer than the job's first.

    Args:
        options: the options of the fit.
        ckpt_path: the checkpoint that the job was first started from.
        read: as for `find_last_checkpoint`.
    """
    experiment, started = describe(options.as_dict()), os.stat(ckpt_path).st_mtime_ns
    paths = Path(options.trainer.default_root_dir or ".").expanduser().glob("hpc_ckpt_*.ckpt")
    newer = [path for path in paths if path.stat().st_mtime_ns > started]
    path = latest_resumable(newer, lambda _, saved: differences(saved, experiment), read)
    if path:
        print_status(f"last checkpoint: {path}, saved when the job was requeued")
    return str(path) if path else None
