"""Checks that a checkpoint belongs to the model and the run that load it."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from idefics_lit.data.prompts import PromptStyle
from idefics_lit.errors import InputError
from idefics_lit.training.options import plain_lora_options

# If these differ from the training's, the answers get worse without an error, so that a difference is reported.
PROMPT_OPTIONS = ("prompt_style", "image_splitting", "image_size")
REPORTED_OPTIONS = {
    "hyper_parameters": ("model", ("quantization",)),
    "datamodule_hyper_parameters": ("data", PROMPT_OPTIONS),
}
# Callbacks that search for an option at the start of a fit, and where a checkpoint holds what they found.
SEARCHES: dict[type[Callback], tuple[str, str]] = {
    LearningRateFinder: ("hyper_parameters", "lr"),
    BatchSizeFinder: ("datamodule_hyper_parameters", "batch_size"),
}
SEARCH_FILES = (".lr_find_", ".scale_batch_size_")  # the checkpoints that they save and restore themselves


def check_checkpoint(checkpoint: Mapping[str, Any], module: Any, trainer: Trainer | None) -> None:  # noqa: ANN401
    """Check that an `Idefics2Module` can continue from a checkpoint; warn if its adapter fits other prompts or data.

    Args:
        checkpoint: the checkpoint.
        module: the module, with its model.
        trainer: the module's, if there is one.

    Raises:
        InputError: it holds weights alone and is loaded in a fit, its adapter has another scale, or its base model is
            another one.
    """
    if trainer is not None:
        check_resumable(checkpoint, trainer)
    check_training_options(checkpoint, module, trainer)
    base = checkpoint.get("base")
    if isinstance(base, Tensor):
        check_embedding(base, module.model, module.hparams.pretrained)
    elif base is not None:
        check_base(base, module.base_fingerprint, module.hparams.pretrained)


def check_training_options(saved: Mapping[str, Any], module: Any, trainer: Trainer | None) -> None:  # noqa: ANN401
    """Check the options that an adapter was trained with, as `check_hyperparameters` does.

    Args:
        saved: ``hyper_parameters`` and ``datamodule_hyper_parameters`` of the training, as in a checkpoint.
        module: the module that goes on with the adapter.
        trainer: the module's, if there is one.
    """
    own, data = {"hyper_parameters": module.hparams}, getattr(trainer, "datamodule", None)
    if isinstance(data, LightningDataModule):
        own["datamodule_hyper_parameters"] = data.hparams
    check_hyperparameters(saved, own, getattr(data, "held_out_by", {}))


def check_resumable(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    """Check that a fit can resume from a checkpoint.

    A callback that searches at the start of a fit restores a checkpoint of its own afterwards. Lightning then forgets
    the one to resume from, and the fit would begin at step 0 without the optimizer's state.

    Raises:
        InputError: the checkpoint holds weights alone, or a callback searches for a learning rate or batch size.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    is_resumed = not Path(str(trainer.ckpt_path)).name.startswith(SEARCH_FILES)
    for kind, (section, option) in SEARCHES.items() if is_resumed else ():
        if any(type(callback).on_fit_start is kind.on_fit_start for callback in trainer.callbacks):  # type: ignore[attr-defined]
            found = f"{REPORTED_OPTIONS[section][0]}.{option} {checkpoint.get(section, {}).get(option)}"
            raise InputError(
                f"trainer.callbacks {kind.__name__} can't search in a fit that resumes: leave it out and give {found}, "
                f"which it found"
            )
    if not checkpoint.get("optimizer_states"):
        raise InputError(
            f"ckpt_path {trainer.ckpt_path} holds weights alone (save_weights_only), from which a fit can't resume"
            f": give a checkpoint with the optimizer's state"
        )


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
    scales, own_scales = (_scales(options.get("lora", {})) for options in (saved, own["hyper_parameters"]))
    for name, value in scales.items():
        if value != own_scales[name]:
            here = own_scales[name]
            raise InputError(f"the checkpoint was trained with model.lora.{name} {value}, this run has {here}")
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


def _scales(lora: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the options of an adapter that change the scale of its update; empty without options."""
    if not lora:
        return {}
    lora = plain_lora_options(lora, None)  # an argument of load_from_checkpoint replaces the checkpoint's
    others, names = lora.get("options", {}), ("use_rslora", "alpha_pattern")
    return {"alpha": lora.get("alpha"), **{f"options.{name}": others.get(name) or None for name in names}}


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
