"""The loaders of training batches, of a set and of a stream, which a resumed run goes on with where it was."""

from collections.abc import Iterator
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torchdata.stateful_dataloader import StatefulDataLoader

from idefics_lit.data.streaming import StreamedQuestions
from idefics_lit.distributed import gather_objects
from idefics_lit.errors import InputError


class TrainingLoader(StatefulDataLoader):  # type: ignore[misc]
    """A loader that knows its place in an epoch.

    A place is so many batches: another run finds the same questions behind it when as many devices, workers and
    examples a batch make it. With others its epoch is begun anew, and says so.

    Args:
        dataset: the questions.
        trainer: whose epoch it is.
        options: a DataLoader's.
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
        if place and saved != own:
            differing = ", ".join(f"{name} {saved[name]}, here {own[name]}" for name in own if saved[name] != own[name])
            rank_zero_warn(f"The checkpoint's epoch is begun anew, since its batches were others: {differing}.")
            assert self.trainer is not None
            self.trainer.fit_loop.epoch_loop.batch_progress.reset_on_run()
            place = {}
        super().load_state_dict(place)

    def _made_by(self) -> dict[str, Any]:
        return {
            "trainer.devices": self.trainer.world_size if self.trainer else 1,
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches if self.trainer else 1,
            "data.batch_size": self.batch_size,
            "data.num_workers": self.num_workers,
            "questions": len(self.dataset),
        }


class StreamLoader(StatefulDataLoader):  # type: ignore[misc]
    """The loader of a stream's batches, as many as the whole training takes; its state is every rank's.

    Without a length Lightning would fetch a batch ahead, and a checkpoint would leave it out.

    Args:
        dataset: this rank's part.
        trainer: whose steps and ranks count.
        options: a DataLoader's.

    Raises:
        InputError: when a state is of other ranks or workers.
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
        return {"num_workers": self.num_workers, "ranks": gather_objects(self.trainer, super().state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where this rank was."""
        ranks, workers = len(state_dict["ranks"]), state_dict["num_workers"]
        if (ranks, workers) != (self.trainer.world_size, self.num_workers):
            raise InputError(
                f"the checkpoint's stream was read by {ranks} devices with data.num_workers {workers}, not by "
                f"{self.trainer.world_size} with {self.num_workers}: resume with as many"
            )
        super().load_state_dict(state_dict["ranks"][self.trainer.global_rank])
