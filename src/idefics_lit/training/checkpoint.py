"""Checkpoints: how they are written and read, and what they must agree in with the run that loads them."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import safe_open
from torch import Tensor

from idefics_lit.data.collator import PromptStyle
from idefics_lit.errors import InputError, first_line
from idefics_lit.pretrained import weight_files
from idefics_lit.utils.files import replacing

SLICE = 8  # numbers of each weight in `base_fingerprint`

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
        options = checkpoint["hyper_parameters"]
        checkpoint["pytorch-lightning_version"], options["pretrained"], options["lora"]["alpha"]
        if not all(isinstance(value, Tensor) for value in checkpoint["state_dict"].values()):
            raise TypeError("its state_dict holds more than weights")
        if not isinstance(checkpoint.get("datamodule_hyper_parameters", {}), Mapping):
            raise TypeError("its datamodule_hyper_parameters are none")
        if not isinstance(checkpoint.get("experiment") or {}, Mapping):
            raise TypeError("its experiment is none")
        base = checkpoint.get("base")  # an earlier version's is `check_embedding`'s tensor
        if not isinstance(base, Tensor | None):
            names, values, *_ = (base[name] for name in ("names", "values", "dtype", "revision"))
            if values.shape != (len(names), SLICE):
                raise TypeError("its base is no fingerprint")
    except FileNotFoundError as error:
        raise InputError(f"ckpt_path {path}: no such file") from error
    except (OSError, RuntimeError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        raise InputError(f"ckpt_path {path}: not a checkpoint of this program, or a damaged one ({reason})") from error
    return checkpoint


def repair_epoch_progress(loop: Any) -> None:  # noqa: ANN401
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
    """Compare the names and shapes of trained weights, and see that they are numbers.

    Raises:
        InputError: with the first that differ, or the first that isn't finite.
    """
    shapes = [{name: tuple(value.shape) for name, value in weights.items()} for weights in (saved, own)]
    theirs, ours = shapes
    if differing := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        first = (f"{name}: {theirs.get(name, 'none')} saved, {ours.get(name, 'none')} here" for name in differing[:3])
        raise InputError(
            f"the checkpoint belongs to another adapter, {len(differing)} weights differ ({'; '.join(first)}): "
            f"give model.pretrained and model.lora as it was trained with"
        )
    if broken := next((name for name, value in saved.items() if not value.isfinite().all()), None):
        raise InputError(f"the checkpoint's {broken} holds numbers that aren't finite: take an earlier checkpoint")


def check_hyperparameters(
    checkpoint: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]],
    held_out_by: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Compare what gives the weights their meaning and doesn't show in their shapes.

    Args:
        checkpoint: what is loaded.
        own: this run's, by the same names as in the checkpoint: ``hyper_parameters``, ``datamodule_hyper_parameters``.
        held_out_by: this run's options that decide which of the training split's pages are scored; none where none are.

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
    data = checkpoint.get("datamodule_hyper_parameters") or {}
    if data.get("prompt_style") not in (None, *get_args(PromptStyle)):
        raise InputError(
            f"the checkpoint was trained with data.prompt_style {data['prompt_style']!r}, which this version doesn't "
            f"know: use the version that wrote it"
        )
    moved = [
        f"data.{name} {data[name]}, here {value}"
        for name, value in held_out_by.items()
        if data.get(name, value) != value and not (name == "limit_val" and value < (data[name] or 0))  # fewer of them
    ]
    if moved:
        rank_zero_warn(
            f"What is scored is held out of the training split otherwise than when the adapter was trained "
            f"({'; '.join(moved)}): it has seen some of these pages, and the score is too high. Give the same, or name "
            f"a split."
        )


def base_fingerprint(pretrained: str, revision: str | None = None) -> dict[str, Any]:
    """Return what tells a base model from others, its siblings too: a few numbers of every weight as it is stored.

    They are the files', and so the same in any precision and quantization.

    Args:
        pretrained: where the base was loaded from.
        revision: the Hub's commit.

    Returns:
        ``names`` and ``values`` (weights, `SLICE`) float32 of the weights, their ``dtype``, and the ``revision``.
    """
    values: dict[str, Tensor] = {}
    dtypes = set()
    for path in weight_files(pretrained, revision):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                shape = part.get_shape()
                if shape and part.get_dtype() in ("F16", "BF16", "F32"):
                    index = [slice(0, SLICE) for _ in shape]
                    if len(shape) > 1:  # the middle row: the first are often of tokens that nothing is trained on
                        index[0] = slice(shape[0] // 2, shape[0] // 2 + 1)
                    found = part[tuple(index)].flatten()[:SLICE].float()
                    values[name] = torch.nn.functional.pad(found, (0, SLICE - len(found)))
                    dtypes.add(part.get_dtype())
    names = sorted(values)
    stacked = torch.stack([values[name] for name in names]) if names else torch.empty(0, SLICE)
    return {"names": names, "values": stacked, "dtype": " ".join(sorted(dtypes)), "revision": revision}


def check_base(saved: Mapping[str, Any], own: Mapping[str, Any], pretrained: str) -> None:
    """Compare two `base_fingerprint`. A copy that is stored in another precision is the same base.

    Raises:
        InputError: when they are of different base models.
    """
    theirs, ours = (dict(zip(base["names"], base["values"], strict=True)) for base in (saved, own))
    # bfloat16 rounds to 2**-9, float16's smallest step is 2**-24.
    rtol, atol = (0.0, 0.0) if saved["dtype"] == own["dtype"] else (2**-8, 2**-24)
    both = theirs.keys() & ours.keys()
    differing = sorted(name for name in both if not torch.allclose(theirs[name], ours[name], rtol, atol))
    if differing or (theirs and ours and not both):
        weights = f"{len(differing)} of {len(both)} weights differ, such as {differing[0]}" if both else "other weights"
        there, here = saved["revision"], own["revision"]
        revisions = f"; revision {there}, here {here}" if there != here else ""
        raise InputError(
            f"the checkpoint's adapter was trained on another base model than model.pretrained {pretrained!r} "
            f"({weights}{revisions}): give the one it was trained on"
        )


def check_embedding(saved: Tensor, model: torch.nn.Module, pretrained: str) -> None:
    """Compare 8 x 8 of the embedding's weights, all that a checkpoint of an earlier version knows of its base.

    Raises:
        InputError: when they are of another base model.
    """
    own = model.get_input_embeddings().weight[:8, :8].detach().float().cpu()  # type: ignore[operator]
    # Both precisions of 16 bits round it.
    if saved.shape != own.shape or not torch.allclose(saved, own, rtol=2**-6, atol=1e-6):
        raise InputError(
            f"the checkpoint's adapter was trained on another base model than model.pretrained {pretrained!r}, whose "
            f"embeddings differ: give the one it was trained on"
        )
