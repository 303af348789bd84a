"""Checkpoints: how they are written and read, and what they must agree in with the run that loads them."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from idefics_lit.errors import InputError, first_line
from idefics_lit.files import replacing

# Other answers can't be told from worse ones when these differ from what the adapter was trained with.
TRAINED_WITH = {
    "hyper_parameters": ("model", ("quantization",)),
    "datamodule_hyper_parameters": ("data", ("prompt_style", "image_splitting", "image_size")),
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints so that a kill or a full disk leaves the last one whole; load no code with them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ANN401
        """Write a checkpoint.

        Raises:
            InputError: when it can't be written.
        """
        if "://" in str(path):  # a bucket has its own way
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # torch's own writer has no error for a full disk
        torch.save(checkpoint, content)
        try:
            with replacing(Path(path)) as file:
                file.write(content.getbuffer())
        except InputError as error:
            raise InputError(f"{error}, then go on with --ckpt_path last") from error


class CheckpointConnector(_CheckpointConnector):
    """Lightning's, in which rank 0 tells the others what is loaded, and SLURM's checkpoint is no special one.

    Lightning (2.6) loads ``hpc_ckpt_N.ckpt`` of whichever run where a job gives no checkpoint.
    """

    _hpc_resume_path = None

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:  # noqa: ANN401
        """Load what rank 0 says.

        Raises:
            InputError: this rank has taken its options from another checkpoint.
        """
        path = self.trainer.strategy.broadcast(checkpoint_path)
        if checkpoint_path and checkpoint_path != path:
            raise InputError(f"ckpt_path: rank 0 found {path}, this rank {checkpoint_path}: give it by name")
        super().resume_start(path, weights_only)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint, its tensors on disk until they are used; no code in it is run.

    Raises:
        InputError: when there is none, or another program's, or it is damaged.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["state_dict"], checkpoint["pytorch-lightning_version"]
    except FileNotFoundError as error:
        raise InputError(f"ckpt_path {path}: no such file") from error
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        raise InputError(f"ckpt_path {path}: not a checkpoint of this program, or a damaged one ({reason})") from error
    return checkpoint


def go_on(loop: Any) -> None:  # noqa: ANN401
    """Mend where Lightning (2.6) goes on from an epoch's end: it would skip an epoch, then or at the next resume.

    Args:
        loop: the Trainer's fit loop, restored. It counts an epoch twice, or not at all: "ready" are the epochs begun,
            "processed" those whose batches are done.
    """
    epochs = loop.epoch_progress
    if loop.restarted_mid_epoch and epochs.total.ready == epochs.total.completed:  # saved behind its last batch
        epochs.increment_ready()
        epochs.increment_started()
    elif loop.restarted_on_epoch_end:  # saved by its end's callbacks
        epochs.increment_completed()
        loop.reset_restart_stage()
        loop.epoch_loop.restarting = False


def check_weights(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of trained weights.

    Raises:
        InputError: with the first that differ.
    """
    shapes = [{name: tuple(value.shape) for name, value in weights.items()} for weights in (saved, own)]
    theirs, ours = shapes
    if differing := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        first = (f"{name}: {theirs.get(name, 'none')} saved, {ours.get(name, 'none')} here" for name in differing[:3])
        raise InputError(
            f"the checkpoint belongs to another adapter, {len(differing)} weights differ ({'; '.join(first)}): "
            f"give model.pretrained and model.lora as it was trained with"
        )


def check_hyperparameters(checkpoint: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare what gives the weights their meaning and doesn't show in their shapes.

    Args:
        checkpoint: what is loaded.
        own: this run's, by the same names as in the checkpoint: ``hyper_parameters``, ``datamodule_hyper_parameters``.

    Raises:
        InputError: when the adapter had another scale.
    """
    saved = checkpoint.get("hyper_parameters", {})
    alpha, own_alpha = saved.get("lora", {}).get("alpha"), own["hyper_parameters"]["lora"]["alpha"]
    if alpha not in (None, own_alpha):
        raise InputError(f"the checkpoint was trained with model.lora.alpha {alpha}, this run has {own_alpha}")
    differing = [
        f"{part}.{name} {saved_part[name]!r}, here {own[key][name]!r}"
        for key, (part, names) in TRAINED_WITH.items()
        if (saved_part := checkpoint.get(key)) and key in own
        for name in names
        if name in saved_part and saved_part[name] != own[key].get(name)
    ]
    if differing:
        rank_zero_warn(f"The adapter was trained with {'; '.join(differing)}.")


def base_weights(model: torch.nn.Module) -> Tensor:
    """Return 8 x 8 of the embedding's weights on the CPU, float32: they tell one base model from another."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    return weight[:8, :8].detach().float().cpu().clone()


def check_base(saved: Tensor, own: Tensor, pretrained: str) -> None:
    """Compare `base_weights`, which both precisions of 16 bits round.

    Raises:
        InputError: when they are of another base model.
    """
    if not torch.allclose(saved, own, rtol=2**-6, atol=1e-6):
        raise InputError(
            f"the checkpoint's adapter was trained on another base model than model.pretrained {pretrained!r}, whose "
            f"embeddings differ: give the one it was trained on"
        )


def set_rates(checkpoint: dict[str, Any], lr: float, weight_decay: float) -> None:
    """Put this run's learning rate and weight decay into the states of optimizer and schedule.

    Both remember the rates they were saved with, which would otherwise win over what the user gives.
    """
    for optimizer in checkpoint.get("optimizer_states", []):
        for group in optimizer["param_groups"]:
            group["lr"] *= lr / group["initial_lr"]
            group["initial_lr"] = lr
            group["weight_decay"] = weight_decay if group["weight_decay"] else 0.0
    for scheduler in checkpoint.get("lr_schedulers", []):
        scheduler["base_lrs"] = [lr for _ in scheduler["base_lrs"]]
