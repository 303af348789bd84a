"""The loaders of training batches, of a set and of a stream, which a resumed run goes on with where it was."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torchdata.stateful_dataloader import StatefulDataLoader

from idefics_lit.data.sources.streaming import StreamedQuestions
from idefics_lit.errors import InputError
from idefics_lit.utils.distributed import gather_objects


class TrainingLoader(StatefulDataLoader):  # type: ignore[misc]
    """A loader that knows its place in an epoch.

    A place is so many batches: another run finds the same questions behind it when the same sampler, and as many
    workers and examples a batch, make it. With others its epoch is begun anew, and says so.

    Args:
        dataset: the questions.
        trainer: whose epoch it is.
        options: a DataLoader's, the sampler `TrainSampler` among them.
    """

    def __init__(self, dataset: Any, trainer: Trainer | None, **options: Any) -> None:  # noqa: ANN401
        super().__init__(dataset, **options)
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        """Begin when the first batch is asked for: Lightning iterates before it tells the sampler its epoch."""
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return the place and what it holds for; no place between epochs."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress if self.trainer else None
        inside = batches is None or (batches.current.ready > 0 and not batches.is_last_batch)
        return {"made by": self._made_by(), "place": super().state_dict() if inside else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there, or begin the epoch anew."""
        saved, own, place = state_dict["made by"], self._made_by(), state_dict["place"]
        if place and (differing := _differing(saved, own)):
            rank_zero_warn(f"The checkpoint's epoch is begun anew, since its batches were others: {differing}.")
            assert self.trainer is not None
            self.trainer.fit_loop.epoch_loop.batch_progress.reset_on_run()
            place = {}
        super().load_state_dict(place)

    def _made_by(self) -> dict[str, Any]:
        # A few batches that are overfitted are in the set's order, by a sampler of Lightning's.
        overfitted = {"trainer.overfit_batches": getattr(self.trainer, "overfit_batches", 0)}
        return {
            **getattr(self.sampler, "decided_by", overfitted),
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches if self.trainer else 1,
            "data.batch_size": self.batch_size,
            "data.num_workers": self.num_workers,
        }


class StreamLoader(StatefulDataLoader):  # type: ignore[misc]
    """The loader of a stream's batches, as many as the whole training takes; its state is every rank's.

    Without a length Lightning would fetch a batch ahead, and a checkpoint would leave it out.

    Args:
        dataset: this rank's part.
        trainer: whose steps and ranks count.
        options: a DataLoader's.

    Raises:
        InputError: when a state is of a stream that was read in another order.
    """

    def __init__(self, dataset: StreamedQuestions, trainer: Trainer, **options: Any) -> None:  # noqa: ANN401
        super().__init__(dataset, **options)
        self.trainer, self.begun = trainer, False

    def __len__(self) -> int:
        """Count the batches, on this rank."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Any:  # noqa: ANN401
        """Begin, or go on behind the last batch: an epoch of Lightning's is none of the stream's."""
        if self.begun:
            super().load_state_dict(super().state_dict())
        self.begun = True
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return where all ranks are; all of them must call it."""
        return {"made by": self._made_by(), "ranks": gather_objects(self.trainer, super().state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where this rank was."""
        if "made by" not in state_dict:
            raise InputError(
                "the checkpoint's stream was read by an earlier version, which didn't save what decides its order: "
                "resume with that version, or train anew"
            )
        if differing := _differing(state_dict["made by"], self._made_by()):
            raise InputError(f"the checkpoint's stream was read otherwise, resume with the same: {differing}")
        super().load_state_dict(state_dict["ranks"][self.trainer.global_rank])

    def _made_by(self) -> dict[str, Any]:
        return {
            **self.dataset.decided_by,
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "data.num_workers": self.num_workers,
        }


def _differing(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Say what decides the order of a checkpoint's batches and of a run's own, where it isn't the same."""
    names = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
    return ", ".join(f"{name} {saved.get(name, 'unknown')}, here {own.get(name, 'unknown')}" for name in names)
