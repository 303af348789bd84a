"""The batches of an optimizer step: a step has a number of examples, whatever the batch size and the devices."""

from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from idefics_lit.errors import InputError

DEFAULT_GLOBAL_BATCH_SIZE = 16
TRAINER_OPTIONS = ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch")


class OptimizerStep:
    """Batch size of a fit, and the options of its Trainer that depend on it.

    Args:
        trainer: its ``accumulate_grad_batches`` and ``val_check_interval`` are set until `restore`.
        options: the hyperparameters of `DocVQADataModule`.

    Raises:
        InputError: the options don't multiply to ``global_batch_size``, or give two validation intervals.
    """

    def __init__(self, trainer: Trainer, options: Any) -> None:  # noqa: ANN401
        self.trainer, self.val_every_n_steps = trainer, options.val_every_n_steps
        self.own_options = {name: getattr(trainer, name) for name in TRAINER_OPTIONS}
        interval = self.own_options["val_check_interval"]
        # 1 is every batch, and the default 1.0 every epoch.
        is_default = interval is None or (isinstance(interval, float) and interval == 1)
        if self.val_every_n_steps is not None and not is_default:
            raise InputError(
                f"data.val_every_n_steps {self.val_every_n_steps} and trainer.val_check_interval {interval}: give one "
                f"of them, and null as the other"
            )
        accumulated = trainer.accumulate_grad_batches
        size, batches = split_step(options.global_batch_size, options.batch_size, accumulated, trainer.world_size)
        self.examples_per_device = size * batches
        self.is_batch_size_given = options.batch_size is not None or accumulated > 1
        self.set_batch_size(size)
        if self.val_every_n_steps is not None and not getattr(trainer, "fast_dev_run", False):
            trainer.callbacks.append(ValidateEveryNSteps(self.val_every_n_steps))  # type: ignore[attr-defined]

    @property
    def batch_sizes(self) -> list[int]:
        """The sizes that `set_batch_size` takes, the largest first: the given one, or all divisors of the step."""
        if self.is_batch_size_given:
            return [self.batch_size]
        examples = self.examples_per_device
        return [size for size in range(examples, 0, -1) if examples % size == 0]

    def set_batch_size(self, batch_size: int) -> None:
        """Set the training examples per batch and device; the step and the validation interval in steps stay."""
        self.batch_size = batch_size
        self.trainer.accumulate_grad_batches = self.examples_per_device // batch_size
        if self.val_every_n_steps is not None and not getattr(self.trainer, "fast_dev_run", False):
            self.trainer.val_check_interval = self.val_every_n_steps * self.trainer.accumulate_grad_batches
            self.trainer.check_val_every_n_epoch = None

    def restore(self) -> None:
        """Give the Trainer its own options back."""
        for name, value in self.own_options.items():
            setattr(self.trainer, name, value)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, ValidateEveryNSteps)]


class ValidateEveryNSteps(Callback):
    """Let the Trainer validate after each optimizer step whose number is a multiple of ``n``.

    Lightning counts batches, which drift from the steps where an epoch ends with an incomplete one.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Decide whether to validate after this batch."""
        batches = trainer.fit_loop.epoch_loop.batch_progress
        ends_step = batches.is_last_batch or batches.current.ready % trainer.accumulate_grad_batches == 0
        is_due = ends_step and trainer.global_step > 0 and trainer.global_step % self.n == 0
        # Lightning validates if this divides the number of batches so far.
        trainer.val_check_batch = batches.total.ready if is_due else batches.total.ready + 1

    # A checkpoint may be from before the end of a validation.
    on_train_start = on_train_batch_end  # type: ignore[assignment]


def split_step(
    global_batch_size: int | None, batch_size: int | None, accumulate_grad_batches: int, world_size: int
) -> tuple[int, int]:
    """Return ``data.batch_size`` and ``trainer.accumulate_grad_batches`` of an optimizer step.

    Args:
        global_batch_size: examples of the step over all devices; None is `DEFAULT_GLOBAL_BATCH_SIZE`, or, with a
            ``batch_size``, what the other values multiply to.
        batch_size: examples per batch and device; None is the largest.
        accumulate_grad_batches: batches of a step; 1, the Trainer's default, is raised if the step needs more.
        world_size: the number of devices.

    Raises:
        InputError: the values don't multiply to ``global_batch_size``.
    """
    if batch_size is not None and global_batch_size is None:
        return batch_size, accumulate_grad_batches
    total = global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE
    size, batches = batch_size or max(1, total // (accumulate_grad_batches * world_size)), accumulate_grad_batches
    if batches == 1:
        batches = max(1, total // (size * world_size))
    if size * batches * world_size != total:
        raise InputError(
            f"data.global_batch_size {total} isn't data.batch_size {batch_size or '(any)'} x "
            f"trainer.accumulate_grad_batches {accumulate_grad_batches} x {world_size} "
            f"device{'s' * (world_size > 1)}: change one of them"
        )
    return size, batches
