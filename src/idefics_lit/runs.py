"""The folder of a run, which it has to itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from idefics_lit.errors import InputError


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of this run, the one that Lightning's checkpoints go to: log folder, name, version."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


@contextmanager
def own_folder(trainer: Trainer, *, numbered: bool, resumed: str | None) -> Iterator[None]:
    """Run in a folder that no other run writes to, at once or after it. For rank 0.

    Args:
        trainer: the run's.
        numbered: its logger numbers the folder, which is then taken here, before another run can take it too.
        resumed: the checkpoint that a fit goes on from.

    Raises:
        InputError: another run writes there, or a fit's checkpoints are there.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is not None and not isinstance(logger, CSVLogger | TensorBoardLogger):
        yield  # Weights & Biases draws an id
        return
    if logger is not None and numbered:
        while True:
            try:
                run_folder(trainer).mkdir(parents=True)
                break
            except FileExistsError:  # another run has just taken the number
                logger._version = None
        yield
        return
    folder = run_folder(trainer)
    with _locked(folder):
        checkpoints = folder / "checkpoints"
        goes_on = resumed is not None and Path(resumed).resolve().parent == checkpoints.resolve()
        if any(checkpoints.glob("*.ckpt")) and not goes_on:
            raise InputError(
                f"{checkpoints} holds another run's checkpoints: go on with it, --ckpt_path last, or give another "
                f"--trainer.default_root_dir or logger"
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
