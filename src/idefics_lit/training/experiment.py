"""Which experiment a checkpoint belongs to, so that ``--ckpt_path last`` resumes the right one.

An experiment is what a run trains: its options without those that may change when it is resumed.
"""

import os
import pydoc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from idefics_lit.data.optimizer_step import DEFAULT_GLOBAL_BATCH_SIZE
from idefics_lit.errors import InputError

Experiment = dict[str, Any]
ReadCheckpoint = Callable[[Path], dict[str, Any]]

# Options that don't change what is trained: speed, memory, hardware, evaluation.
MAY_CHANGE = {
    *("model.dequantize", "model.gradient_checkpointing", "model.feature_cache", "model.feature_cache_gb"),
    *("model.cuda_graphs", "model.compile", "model.max_new_tokens", "model.strip_period", "data.pretrained"),
    *("data.num_workers", "data.global_batch_size", "data.batch_size", "data.eval_batch_size"),
    *("data.on_bad_example", "data.limit_val"),
    *("data.val_in_fit", "data.val_every_n_steps", "data.limit_test", "data.test_split", "data.predict_split"),
}
# Worked out from the model, which is compared itself, if they are null.
WORKED_OUT = ("data.image_splitting", "data.max_length")
# The Trainer's options that change it.
TRAINER_OPTIONS = ("gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "overfit_batches")
# Callbacks that save, monitor or stop a run; any other may change what is trained.
NEUTRAL_CALLBACKS = (
    *(BasePredictionWriter, Checkpoint, DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, ModelSummary),
    *(ProgressBar, ThroughputMonitor, Timer),
)
# Folders, or names on the Hub.
PATH_OPTIONS = ("model.pretrained", "model.adapter", "data.source", "data.image_root")


def describe(options: Mapping[str, Any]) -> Experiment:
    """Return the experiment of a config, by dotted option name.

    Args:
        options: nested dicts with any of the sections ``model``, ``data``, ``trainer`` and ``seed_everything``.
    """
    trainer, data = (options.get(section) or {} for section in ("trainer", "data"))
    experiment = flatten({section: options.get(section) or {} for section in ("model", "data")})
    experiment = {name: value for name, value in experiment.items() if name not in MAY_CHANGE}
    for name in WORKED_OUT:
        if name in experiment and experiment[name] is None:
            del experiment[name]
    if experiment.get("model.quantization") == "none":
        experiment.pop("model.quantize_vision", None)  # without effect; earlier versions had another default
    experiment |= {f"trainer.{name}": trainer[name] for name in TRAINER_OPTIONS if name in trainer}
    if "callbacks" in trainer:
        experiment["trainer.callbacks"] = _training_callbacks(trainer["callbacks"])
    if "accumulate_grad_batches" in trainer and "batch_size" in data:  # only their product changes what is trained
        experiment["data.global_batch_size"] = _examples_per_step(trainer, data)
    if type(seed := options.get("seed_everything")) is int:  # true stands for a random seed
        experiment["seed_everything"] = seed
    for name in PATH_OPTIONS:
        if name in experiment and os.path.exists(str(experiment[name])):  # so that relative paths compare equal
            experiment[name] = os.path.realpath(experiment[name])
    return experiment


def _examples_per_step(trainer: Mapping[str, Any], data: Mapping[str, Any]) -> int:
    """Return the examples of an optimizer step over all devices; "auto" counts as one device."""
    if data.get("global_batch_size") or data["batch_size"] is None:
        return int(data.get("global_batch_size") or DEFAULT_GLOBAL_BATCH_SIZE)
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes") or 1
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip(" ,").split(",")
    count = len(devices) if isinstance(devices, list) else int(devices or 1) if str(devices).isdigit() else 1
    return int(data["batch_size"] * (trainer["accumulate_grad_batches"] or 1) * count * nodes)


def _training_callbacks(callbacks: Any) -> str:  # noqa: ANN401
    """Return the classes and arguments of the callbacks of a config that may change what is trained."""
    descriptions = []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []:
        kind = pydoc.locate(path := callback["class_path"])
        is_neutral = isinstance(kind, type) and issubclass(kind, NEUTRAL_CALLBACKS)
        if not is_neutral and not path.startswith("idefics_lit."):
            arguments = (f"{name}={value!r}" for name, value in (callback.get("init_args") or {}).items())
            descriptions.append(f"{path}({', '.join(arguments)})")
    return ", ".join(descriptions) or "none"


def differences(saved: Experiment, own: Experiment) -> list[str]:
    """Return a line for each option in both experiments whose values differ."""
    return [f"{name} {saved[name]}, here {value}" for name, value in own.items() if saved.get(name, value) != value]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted name; ``columns`` and ``model.lora.options`` are kept as one value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and name not in ("columns", "options")
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def print_status(line: str) -> None:
    """Print a line on standard error, on rank 0."""
    rank_zero_only(print)(line, file=sys.stderr)


def latest_resumable(
    paths: Iterable[Path], compare: Callable[[Path, Experiment], list[str]], read: ReadCheckpoint
) -> Path | None:
    """Return the latest checkpoint that a fit can resume from, or None.

    The reason why a checkpoint is skipped is printed, once for each run.

    Args:
        paths: the candidates, of any experiment or program.
        compare: returns the `differences` of a candidate's experiment and the fit's.
        read: reads a checkpoint; those that it refuses with an `InputError` are skipped.
    """
    printed = set()
    for path, checkpoint in _readable_checkpoints(paths, read):
        reasons = compare(path, _experiment_of(checkpoint))
        if not reasons and not checkpoint.get("optimizer_states"):
            reasons = ["weights alone"]
        if not reasons:
            return path
        reason = "; ".join(reasons[:3]) + (f"; {len(reasons) - 3} more" if len(reasons) > 3 else "")
        if (path.parent, reason) not in printed:
            printed.add((path.parent, reason))
            print_status(f"skipped: {path}: {reason}")
    return None


def latest_of_one_experiment(
    paths: Iterable[Path], options: Experiment, read: ReadCheckpoint, *, strict: bool
) -> Path | None:
    """Return the latest checkpoint if all belong to one experiment, or if the options tell which is meant.

    Args:
        paths: the candidates, of any experiment or program.
        options: the options that the command gives.
        read: as for `latest_resumable`.
        strict: raise if there is only one experiment but it contradicts the options.

    Returns:
        The checkpoint, or None if there is none.

    Raises:
        InputError: there are several experiments, and none or several of them agree with the options.
    """
    experiments: list[tuple[Path, Experiment]] = []
    for path, checkpoint in _readable_checkpoints(paths, read):
        experiment = _experiment_of(checkpoint)
        if all(differences(other, experiment) for _, other in experiments):
            experiments.append((path, experiment))
    agreeing = [(path, experiment) for path, experiment in experiments if not differences(experiment, options)]
    if len(agreeing) == 1 or (len(experiments) == 1 and not strict):
        return (agreeing or experiments)[0][0]
    if not experiments:
        return None
    (first, first_experiment), *others = agreeing or experiments
    if not others:
        raise InputError(
            f"ckpt_path last: {first} belongs to another experiment: {differences(first_experiment, options)[0]}"
        )
    second, second_experiment = others[0]
    raise InputError(
        f"ckpt_path last: {first} or {second}? They belong to two experiments "
        f"({differences(second_experiment, first_experiment)[0]}): give one of them as --ckpt_path"
    )


def _readable_checkpoints(paths: Iterable[Path], read: ReadCheckpoint) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield this program's intact checkpoints, the latest first."""
    times = {}
    for path in paths:
        try:
            times[path] = path.stat().st_mtime_ns
        except FileNotFoundError:  # a running fit has replaced it
            continue
    for path in sorted(times, key=lambda path: times[path], reverse=True):
        try:
            checkpoint = read(path)
        except InputError as error:
            rank_zero_warn(f"Skipped: {error}")
            continue
        yield path, checkpoint


def _experiment_of(checkpoint: Mapping[str, Any]) -> Experiment:
    """Return a checkpoint's experiment; earlier versions saved only the options of model and data."""
    data = checkpoint.get("datamodule_hyper_parameters")
    return checkpoint.get("experiment") or describe({"model": checkpoint["hyper_parameters"], "data": data})
