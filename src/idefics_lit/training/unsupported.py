"""Lightning's features that can't work with a frozen base model and an adapter, each refused in one line."""

from typing import Any

from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from idefics_lit.errors import InputError

UNSUPPORTED = {
    BackboneFinetuning: "unfreezes a backbone, but only the adapter is trained: unfreeze layers in a subclass's "
    "configure_model instead",
    ModelPruning: "prunes all layers, but the base model is frozen: leave it out",
    FSDPStrategy: "shards the trained adapter too: give idefics_lit.model.fsdp.FSDP2Strategy",
    ModelParallelStrategy: "shards the trained adapter too: give idefics_lit.model.fsdp.FSDP2Strategy",
    DeepSpeedStrategy: "saves the base model in each checkpoint: give ddp or idefics_lit.model.fsdp.FSDP2Strategy",
}


def check_supported(trainer: Any) -> None:  # noqa: ANN401
    """Check a Trainer's strategy and callbacks.

    Raises:
        InputError: one of them can't work.
    """
    for option, values in (("strategy", [trainer.strategy]), ("callbacks", trainer.callbacks)):
        for value in values:
            for kind, reason in UNSUPPORTED.items():
                if isinstance(value, kind):
                    raise InputError(f"trainer.{option} {type(value).__name__} {reason}")
