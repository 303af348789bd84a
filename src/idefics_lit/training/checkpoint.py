"""Checkpoints: how they are written and read, and the checks that one belongs to the run that loads it."""

import io
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import safe_open
from torch import Tensor

from idefics_lit.errors import InputError, first_line
from idefics_lit.pretrained import weight_files
from idefics_lit.utils.files import replacing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FINGERPRINT_VALUES = 8  # of each weight


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
        if not checkpoint["loops"]["fit_loop"]:
            raise TypeError("its loops are empty")
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


class LastCheckpoint(ModelCheckpoint):
    """Save ``last.ckpt`` every few optimizer steps, after each epoch's last batch, and after the last step of a fit.

    Args:
        every_n_train_steps: the number of optimizer steps.
    """

    def __init__(self, every_n_train_steps: int = 25) -> None:
        super().__init__(filename="last", every_n_train_steps=every_n_train_steps, enable_version_counter=False)
        self.every_n_train_steps = every_n_train_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Save after the last batch too: Lightning's callback would leave a file that is some steps older."""
        super().on_train_batch_end(trainer, pl_module, *args)
        is_last = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        if is_last and trainer.global_step % self.every_n_train_steps and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(f"{self.dirpath}/last.ckpt")


class EpochProgressRepair(Callback):
    """Correct what Lightning (2.6) loses when a fit resumes within an epoch or at its end; each fit needs it.

    - From a checkpoint that was saved at the end of an epoch it would skip an epoch, in this resume or the next one.
    - From a checkpoint that was saved after an epoch's last batch it neither ends that epoch nor begins the next one,
      so that callbacks that average weights would leave the epoch out.
    - Within an epoch it doesn't begin it again, so that ``GradientAccumulationScheduler`` would accumulate nothing.
    - From a checkpoint that was saved at the end of a fit that ended within an epoch it would begin the next epoch, at
      the position of the last one.

    `Idefics2Module` adds this callback to its Trainer.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Don't count an epoch as ended if it has further batches."""
        progress = checkpoint["loops"]["fit_loop"]
        batches, epochs = progress["epoch_loop.batch_progress"], progress["epoch_progress"]
        if batches["current"]["ready"] and not batches["is_last_batch"]:
            for counts in (epochs["total"], epochs["current"]):
                counts["processed"] = counts["completed"] = counts["started"] - 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Correct the restored progress; "ready" counts the epochs that were begun, "completed" those that ended."""
        loop = trainer.fit_loop
        progress = loop.epoch_progress
        if loop.restarted_mid_epoch and progress.total.ready == progress.total.completed:  # saved after the last batch
            progress.current.completed -= 1  # which is trainer.current_epoch
            for callback in _callbacks(trainer, WeightAveraging):
                callback.on_train_epoch_end(trainer, pl_module)
            progress.current.completed += 1
            loop.reset_restart_stage()  # the loop begins an epoch
        elif loop.restarted_mid_epoch:
            for callback in _callbacks(trainer, GradientAccumulationScheduler, StochasticWeightAveraging):
                callback.on_train_epoch_start(trainer, pl_module)
        elif loop.restarted_on_epoch_end:  # saved by a callback at the end of the epoch
            progress.increment_completed()
            loop.reset_restart_stage()
            loop.epoch_loop.restarting = False


def _callbacks(trainer: Trainer, *kinds: type[Callback]) -> list[Callback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]  # type: ignore[attr-defined]


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
    base: Any = getattr(model, "get_base_model", lambda: model)()  # a peft model has a base
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
