"""Checkpoints: how they are written and read, and the checks that one belongs to the run that loads it."""

import io
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import safe_open
from torch import Tensor

from idefics_lit.data.collator import PromptStyle
from idefics_lit.errors import InputError, first_line
from idefics_lit.pretrained import weight_files
from idefics_lit.utils.files import replacing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FINGERPRINT_VALUES = 8  # of each weight

# If these differ from the training's, the answers get worse without an error, so that a difference is reported.
PROMPT_OPTIONS = ("prompt_style", "image_splitting", "image_size")
REPORTED_OPTIONS = {
    "hyper_parameters": ("model", ("quantization",)),
    "datamodule_hyper_parameters": ("data", PROMPT_OPTIONS),
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin, but if writing is interrupted or the disk is full, the last file stays intact."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ANN401
        """Write a checkpoint.

        Raises:
            InputError: it can't be written.
        """
        if "://" in str(path):  # object stores write atomically
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # torch's own writer raises no OSError on a full disk
        torch.save(checkpoint, content)
        try:
            with replacing(Path(path)) as file:
                file.write(content.getbuffer())
        except InputError as error:
            raise InputError(f"{error}, then resume with --ckpt_path last") from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint with memory-mapped tensors, without running any code in it.

    Raises:
        InputError: the file doesn't exist, is damaged, or is another program's.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        options = checkpoint["hyper_parameters"]
        checkpoint["pytorch-lightning_version"], options["pretrained"], options["lora"]["alpha"]
        if not all(isinstance(value, Tensor) for value in checkpoint["state_dict"].values()):
            raise TypeError("its state_dict holds more than weights")
        if not isinstance(checkpoint.get("datamodule_hyper_parameters", {}), Mapping):
            raise TypeError("its datamodule_hyper_parameters aren't a mapping")
        if not isinstance(checkpoint.get("experiment") or {}, Mapping):
            raise TypeError("its experiment isn't a mapping")
        base = checkpoint.get("base")  # earlier versions saved the tensor of `check_embedding`
        if not isinstance(base, Tensor | None):
            names, values, *_ = (base[name] for name in ("names", "values", "dtype", "revision"))
            if values.shape != (len(names), FINGERPRINT_VALUES):
                raise TypeError("its base isn't a fingerprint")
    except FileNotFoundError as error:
        raise InputError(f"ckpt_path {path}: no such file") from error
    except (OSError, RuntimeError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        raise InputError(f"ckpt_path {path}: not a checkpoint of this program, or a damaged one ({reason})") from error
    return checkpoint


class EpochProgressRepair(Callback):
    """Correct the epoch that Lightning (2.6) resumes in from a checkpoint that was saved at the end of an epoch.

    Lightning would skip an epoch, in this resume or the next one.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Correct the restored progress; "ready" counts the epochs that were begun, "completed" those that ended."""
        loop = trainer.fit_loop
        progress = loop.epoch_progress
        if loop.restarted_mid_epoch and progress.total.ready == progress.total.completed:  # saved after the last batch
            progress.increment_ready()
            progress.increment_started()
        elif loop.restarted_on_epoch_end:  # saved by a callback at the end of the epoch
            progress.increment_completed()
            loop.reset_restart_stage()
            loop.epoch_loop.restarting = False


def check_weights(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that saved weights have the names and shapes of the module's own, and are finite.

    Raises:
        InputError: with the first names that differ, or the first that isn't finite.
    """
    shapes = [{name: tuple(value.shape) for name, value in weights.items()} for weights in (saved, own)]
    theirs, ours = shapes
    if differing := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        first = (f"{name}: {theirs.get(name, 'none')} saved, {ours.get(name, 'none')} here" for name in differing[:3])
        raise InputError(
            f"the checkpoint belongs to another adapter, {len(differing)} weights differ ({'; '.join(first)}): "
            f"give the model.pretrained and model.lora that it was trained with"
        )
    if broken := next((name for name, value in saved.items() if not value.isfinite().all()), None):
        raise InputError(f"the checkpoint's {broken} holds numbers that aren't finite: take an earlier checkpoint")


def check_hyperparameters(
    checkpoint: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]],
    held_out_by: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Compare the hyperparameters that change the adapter's effect but not its shapes; warn of those of the prompt.

    Args:
        checkpoint: the checkpoint to load.
        own: this run's ``hyper_parameters`` and ``datamodule_hyper_parameters``, by these names.
        held_out_by: this run's options that choose the pages of the training split to score; empty if there are none.

    Raises:
        InputError: the adapter was trained with another scale.
    """
    saved = checkpoint.get("hyper_parameters", {})
    alpha, own_alpha = saved.get("lora", {}).get("alpha"), own["hyper_parameters"]["lora"]["alpha"]
    if alpha not in (None, own_alpha):
        raise InputError(f"the checkpoint was trained with model.lora.alpha {alpha}, this run has {own_alpha}")
    differing = [
        f"{part}.{name} {saved_part[name]!r}, here {own[key][name]!r}"
        for key, (part, names) in REPORTED_OPTIONS.items()
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
    changed = [
        f"data.{name} {data[name]}, here {value}"
        for name, value in held_out_by.items()
        # With a smaller limit, fewer of the same pages are scored.
        if data.get(name, value) != value and not (name == "limit_val" and value < (data[name] or 0))
    ]
    if changed:
        rank_zero_warn(
            f"The scored pages are held out of the training split differently than when the adapter was trained "
            f"({'; '.join(changed)}): it was trained on some of them, and the score is too high. Give the same "
            f"options, or a split."
        )


def base_fingerprint(pretrained: str, revision: str | None = None) -> dict[str, Any]:
    """Return a few values of each weight of a base model, which identify it among models of the same architecture.

    They are read from the weight files, so that they are the same in any precision and quantization.

    Args:
        pretrained: the Hub id or folder that the base model was loaded from.
        revision: the Hub's commit, by default the one that was downloaded last.

    Returns:
        ``names`` of the weights, ``values`` (weights, `FINGERPRINT_VALUES`) in float32, their ``dtype`` in the files,
        and the ``revision``.
    """
    values: dict[str, Tensor] = {}
    dtypes = set()
    paths = weight_files(pretrained, revision)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_slice(name)
                shape = weight.get_shape()
                if shape and weight.get_dtype() in ("F16", "BF16", "F32"):
                    values[name] = _first_values(weight, shape)
                    dtypes.add(weight.get_dtype())
    if paths and paths[0].parent.parent.name == "snapshots":  # the Hub's cache names the folder by the commit
        revision = paths[0].parent.name
    return _fingerprint(values, dtypes, revision)


def model_fingerprint(model: "PreTrainedModel | PeftModel") -> dict[str, Any]:
    """Return what `base_fingerprint` returns for a base model that is loaded already, without its quantized weights."""
    base: Any = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    kinds = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    weights = {
        re.sub(r"\.(base_layer|original_module)(?=\.)", "", name): weight.detach()
        for name, weight in base.named_parameters()
        if weight.dtype in kinds and weight.ndim and not re.search(r"\.(lora_\w+|modules_to_save)\.", name)
    }
    values = {name: _first_values(weight, weight.shape).cpu() for name, weight in weights.items()}
    return _fingerprint(values, {kinds[weight.dtype] for weight in weights.values()}, None)


def _first_values(weight: Any, shape: Sequence[int]) -> Tensor:  # noqa: ANN401
    index = [slice(0, FINGERPRINT_VALUES) for _ in shape]
    if len(shape) > 1:  # the middle row: the first rows of an embedding are often untrained
        index[0] = slice(shape[0] // 2, shape[0] // 2 + 1)
    first = weight[tuple(index)].flatten()[:FINGERPRINT_VALUES].float()
    return torch.nn.functional.pad(first, (0, FINGERPRINT_VALUES - len(first)))


def _fingerprint(values: Mapping[str, Tensor], dtypes: Iterable[str], revision: str | None) -> dict[str, Any]:
    names = sorted(values)
    stacked = torch.stack([values[name] for name in names]) if names else torch.empty(0, FINGERPRINT_VALUES)
    return {"names": names, "values": stacked, "dtype": " ".join(sorted(dtypes)), "revision": revision}


def check_base(saved: Mapping[str, Any], own: Mapping[str, Any], pretrained: str) -> None:
    """Check that two fingerprints are of the same base model, which may be stored in different precisions.

    Raises:
        InputError: they aren't.
    """
    theirs, ours = (dict(zip(base["names"], base["values"], strict=True)) for base in (saved, own))
    # The relative rounding error of bfloat16 is 2**-9, the smallest positive float16 is 2**-24.
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
    """Check the base model by 8 x 8 weights of its embedding, which is what earlier versions saved.

    Raises:
        InputError: it is another one.
    """
    own = model.get_input_embeddings().weight[:8, :8].detach().float().cpu()  # type: ignore[operator]
    # The embedding may be rounded to 16 bits.
    if saved.shape != own.shape or not torch.allclose(saved, own, rtol=2**-6, atol=1e-6):
        raise InputError(
            f"the checkpoint's adapter was trained on another base model than model.pretrained {pretrained!r}, whose "
            f"embeddings differ: give the one it was trained on"
        )
