"""The folder of a run, which no other run writes to."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from idefics_lit.errors import InputError
from idefics_lit.training.lightning_compat import forget_version


def run_folder(trainer: Trainer) -> Path:
    """Return the run's folder, ``save_dir/name/version``, in which Lightning also creates ``checkpoints``.

    With ``fast_dev_run``, where Lightning writes neither logs nor checkpoints, it is a new temporary folder.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return _temporary_folder()
    folder = log_folder(trainer.loggers, trainer.default_root_dir)
    return folder / _folder_name(trainer.loggers[0].version) if trainer.loggers else folder


def log_folder(loggers: Sequence[Logger], default_root_dir: str | Path, version: int | str | None = None) -> Path:
    """Return the folder that holds the folders of all runs.

    Args:
        loggers: the run's loggers; the first determines the folder.
        default_root_dir: the Trainer's folder, used without a logger.
        version: a version chosen by the user; the folder of that run is returned.
    """
    if not loggers:
        return Path(default_root_dir)
    folder = Path(loggers[0].save_dir or default_root_dir, str(loggers[0].name))
    return folder if version is None else folder / _folder_name(version)


@cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="idefics_lit-fast_dev_run-"))


def _folder_name(version: int | str | None) -> str:
    return version if isinstance(version, str) else f"version_{version}"


@contextmanager
def exclusive_run_folder(
    trainer: Trainer, *, version: int | str | None, fit: bool, ckpt_path: str | None, answers: str | None = None
) -> Iterator[None]:
    """Reserve the run's folder while the context is open. Used on rank 0.

    Without a version, a logger that numbers its versions gets the first free number, and the folder is created at once,
    so that a run that starts at the same time gets the next number. Other loggers choose a random id.

    Args:
        trainer: the run's Trainer.
        version: the version, if the user chose one.
        fit: whether the run writes checkpoints.
        ckpt_path: the checkpoint that a fit resumes from.
        answers: the name of the file of answers that an evaluation writes.

    Raises:
        InputError: another run writes to the folder, or it holds the checkpoints of a fit that isn't resumed; or
            without a logger, the answers of another evaluation.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        yield
    elif logger is None or version is not None:
        folder = log_folder(trainer.loggers, trainer.default_root_dir, version)
        with _locked(folder):
            checkpoints = folder / "checkpoints"
            resumes = ckpt_path is not None and Path(ckpt_path).resolve().parent == checkpoints.resolve()
            if fit and any(checkpoints.glob("*.ckpt")) and not resumes:
                raise InputError(
                    f"{checkpoints} holds another run's checkpoints: resume it with --ckpt_path last, or give another "
                    f"--trainer.default_root_dir or logger"
                )
            if logger is None and answers and (folder / answers).exists():
                raise InputError(
                    f"{folder / answers} holds the answers of another run: move it away, or give another "
                    f"--trainer.default_root_dir or a logger, which numbers folders"
                )
            yield
    elif isinstance(logger, CSVLogger | TensorBoardLogger):
        folder = _create_next_folder(trainer, logger)
        try:
            yield
        finally:
            with suppress(OSError):
                folder.rmdir()  # only if it is empty
    else:
        yield


def _create_next_folder(trainer: Trainer, logger: CSVLogger | TensorBoardLogger) -> Path:
    while True:
        folder = run_folder(trainer)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run has created it since the logger chose the number
            forget_version(logger)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise InputError(f"another run is writing to {folder}: give another folder, or wait until it ends") from error
