"""The folder of a run, which it has to itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from idefics_lit.errors import InputError


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of this run, the one that Lightning's checkpoints go to: log folder, name, version."""
    folder = log_folder(trainer.loggers, trainer.default_root_dir)
    return folder / _folder_name(trainer.loggers[0].version) if trainer.loggers else folder


def log_folder(loggers: Sequence[Logger], default_root_dir: str | Path, version: int | str | None = None) -> Path:
    """Return the folder in which runs have theirs.

    Args:
        loggers: a run's, of which the first decides.
        default_root_dir: the Trainer's, for a run without a logger.
        version: where it is given there is one run: its folder.
    """
    if not loggers:
        return Path(default_root_dir)
    folder = Path(loggers[0].save_dir or default_root_dir, str(loggers[0].name))
    return folder if version is None else folder / _folder_name(version)


def _folder_name(version: int | str | None) -> str:
    return version if isinstance(version, str) else f"version_{version}"


@contextmanager
def own_folder(
    trainer: Trainer, *, version: int | str | None, fit: bool, resumed: str | None, writes: str | None = None
) -> Iterator[None]:
    """Run in a folder that no other run writes to, at once or after it. For rank 0.

    Args:
        trainer: the run's.
        version: the run's, where it is given. Where it isn't, a logger that numbers folders takes a number here, before
            another run can take it too; others draw an id.
        fit: it writes checkpoints.
        resumed: the checkpoint that a fit goes on from.
        writes: the file of answers that an evaluation writes; without a logger its folder isn't numbered.

    Raises:
        InputError: another run writes there, or a fit's checkpoints, or another evaluation's answers, are there.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is not None and version is None:
        if not isinstance(logger, CSVLogger | TensorBoardLogger):
            yield
            return
        while True:
            try:
                folder = run_folder(trainer)
                folder.mkdir(parents=True)
                break
            except FileExistsError:  # another run has just taken the number
                logger._version = None
        try:
            yield
        finally:
            with suppress(OSError):
                folder.rmdir()  # nothing was written
        return
    folder = log_folder(trainer.loggers, trainer.default_root_dir, version)
    with _locked(folder):
        checkpoints = folder / "checkpoints"
        goes_on = resumed is not None and Path(resumed).resolve().parent == checkpoints.resolve()
        if fit and any(checkpoints.glob("*.ckpt")) and not goes_on:
            raise InputError(
                f"{checkpoints} holds another run's checkpoints: go on with it, --ckpt_path last, or give another "
                f"--trainer.default_root_dir or logger"
            )
        if logger is None and writes and (folder / writes).exists():
            raise InputError(
                f"{folder / writes} holds the answers of another run: move it away, or give another "
                f"--trainer.default_root_dir or a logger, which numbers folders"
            )
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another run is writing to {folder}: give this one another folder, or wait") from error
        yield
