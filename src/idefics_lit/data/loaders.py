"""Loaders whose workers can start early; training loaders can be resumed, for a split with an index or a stream.

The state of a training loader is the position in the data and the settings that the position depends on. The keys of
the state are those of existing checkpoints.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from idefics_lit.errors import InputError
from idefics_lit.utils.distributed import gather_objects

if TYPE_CHECKING:
    from idefics_lit.data.streamed_questions import StreamedQuestions


class EvalLoader(DataLoader[Any]):
    """A DataLoader whose workers can prepare their first batches before it is iterated."""

    _started: Iterator[Any] | None = None

    @property
    def is_started(self) -> bool:
        """Whether the next iteration continues with the batches of `start`."""
        return self._started is not None

    def start(self) -> None:
        """Start the workers; torch's random numbers are as if they hadn't been started."""
        with torch.random.fork_rng(devices=[]):
            self._started = super().__iter__()

    def __iter__(self) -> Any:  # noqa: ANN401
        """Return an iterator over the batches."""
        started, self._started = self._started, None
        return started or super().__iter__()


class _ResumableLoader(StatefulDataLoader):  # type: ignore[misc]
    """torchdata's loader, which also has a position after a fit, when Lightning has dropped its iterator."""

    is_started = False
    """Whether the next iteration continues with the batches of `start`."""
    _left_at: dict[str, Any] | None = None  # the position at which an iteration was left

    def __init__(self, dataset: Any, **options: Any) -> None:  # noqa: ANN401
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            super().__init__(dataset, **options)

    def start(self) -> None:
        """Start the workers, as `EvalLoader.start`."""
        with torch.random.fork_rng(devices=[]):
            super().state_dict()  # opens an iterator, which the next iteration continues
        self.is_started = True

    def __iter__(self) -> Iterator[Any]:
        """Iterate lazily over the batches."""
        self.is_started, self._left_at = False, None
        try:
            yield from super().__iter__()
        except GeneratorExit:
            self._left_at = super().state_dict()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        position: dict[str, Any] = self._left_at or super().state_dict()
        return position

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a position."""
        self.is_started, self._left_at = False, None
        super().load_state_dict(state_dict)


class TrainingLoader(_ResumableLoader):
    """A loader that resumes in the middle of an epoch.

    Its position is a number of batches, so it depends on the sampler's order, the batch size and the number of workers.
    If one of them differs from the checkpoint's, the epoch restarts, with a warning.

    Args:
        dataset: the questions.
        trainer: whose epoch progress decides whether the state has a position.
        options: a DataLoader's; the sampler is a `TrainSampler`.
    """

    def __init__(self, dataset: Any, trainer: Trainer | None, **options: Any) -> None:  # noqa: ANN401
        super().__init__(dataset, **options)
        self.trainer = trainer

    def start(self) -> None:
        """Start the workers with the sampler's current epoch."""
        super().start()
        self._started_epoch = self.sampler.epoch

    def __iter__(self) -> Iterator[Any]:
        """Iterate lazily: Lightning calls ``iter`` before it calls the sampler's ``set_epoch``."""
        if self.is_started and self.sampler.epoch != self._started_epoch:
            super().load_state_dict({})  # closes what was started
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return the position and its settings; between epochs there is no position."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress if self.trainer else None
        in_epoch = progress is None or (progress.current.ready > 0 and not progress.is_last_batch)
        return {"made by": self._settings(), "place": super().state_dict() if in_epoch else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a position, or restart the epoch if its settings differ."""
        position, settings = _parts(state_dict, self.trainer, "place", "made by")
        if position and (differences := _differences(settings, self._settings())):
            rank_zero_warn(f"The checkpoint's epoch restarts, because its batches had other settings: {differences}.")
            assert self.trainer is not None
            self.trainer.fit_loop.epoch_loop.batch_progress.reset_on_run()
            position = {}
        super().load_state_dict(position)

    def _settings(self) -> dict[str, Any]:
        # With trainer.overfit_batches, Lightning replaces the sampler with a sequential one.
        overfit = {"trainer.overfit_batches": getattr(self.trainer, "overfit_batches", 0)}
        return {
            **getattr(self.sampler, "order_settings", overfit),
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches if self.trainer else 1,
            "data.batch_size": self.batch_size,
            "data.num_workers": self.num_workers,
        }


class StreamLoader(_ResumableLoader):
    """A loader of a stream, whose length is the length of training and whose state has the position of every rank.

    It has a length, because Lightning prefetches one batch of a loader without one, which a checkpoint would lose.

    Args:
        dataset: this rank's part of the stream.
        trainer: has the number of steps and the ranks.
        options: a DataLoader's.

    Raises:
        InputError: when a loaded state is of a stream in another order.
    """

    def __init__(self, dataset: "StreamedQuestions", trainer: Trainer, **options: Any) -> None:  # noqa: ANN401
        super().__init__(dataset, **options)
        self.trainer, self.was_iterated = trainer, False

    def __len__(self) -> int:
        """Return the number of batches of the training on this rank."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[Any]:
        """Start, or continue after the last batch: an epoch of Lightning's is not an epoch of the stream."""
        if self.was_iterated:
            super().load_state_dict(super().state_dict())
        self.was_iterated = True
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of all ranks, and their settings; all ranks must call it."""
        return {"made by": self._settings(), "ranks": gather_objects(self.trainer, super().state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at this rank's position."""
        if "made by" not in state_dict:
            raise InputError(
                "the checkpoint's stream was read by an earlier version, which didn't save the settings of its order: "
                "resume with that version, or train anew"
            )
        settings, positions = _parts(state_dict, self.trainer, "made by", "ranks")
        if differences := _differences(settings, self._settings()):
            raise InputError(f"the checkpoint's stream had another order, resume with the same: {differences}")
        super().load_state_dict(positions[self.trainer.global_rank])

    def _settings(self) -> dict[str, Any]:
        return {
            **self.dataset.order_settings,
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "data.num_workers": self.num_workers,
        }


def _parts(state: Mapping[str, Any], trainer: Trainer | None, *names: str) -> list[Any]:
    """Return parts of a loader's state.

    Raises:
        InputError: one is missing.
    """
    if not isinstance(state, Mapping) or not {*names} <= {*state}:
        path = trainer.ckpt_path if trainer else ""
        raise InputError(f"ckpt_path {path}: its position in the training data is damaged, take an earlier checkpoint")
    return [state[name] for name in names]


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    names = [name for name in {**current, **saved} if saved.get(name) != current.get(name)]
    return ", ".join(f"{name} {saved.get(name, 'unknown')}, here {current.get(name, 'unknown')}" for name in names)
