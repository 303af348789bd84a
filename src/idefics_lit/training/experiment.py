"""Which experiment a checkpoint belongs to: what it trains, less what may change when a run is resumed."""

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

from idefics_lit.errors import InputError

Experiment = dict[str, Any]
Read = Callable[[Path], dict[str, Any]]

# Options that don't decide what is trained: how fast, on which machine, how it is evaluated.
MAY_CHANGE = {
    *("model.dequantize", "model.gradient_checkpointing", "model.feature_cache", "model.feature_cache_gb"),
    *("model.cuda_graphs", "model.compile", "model.max_new_tokens", "model.strip_period", "data.pretrained"),
    *("data.num_workers", "data.batch_size", "data.eval_batch_size", "data.on_bad_example", "data.limit_val"),
    *("data.val_in_fit", "data.limit_test", "data.test_split", "data.predict_split"),
}
# Options of the Trainer that do.
TRAINER = ("gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "overfit_batches")
# Callbacks that save, watch or end a run; any other may change what is trained.
BYSTANDERS = (
    *(BasePredictionWriter, Checkpoint, DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, ModelSummary),
    *(ProgressBar, ThroughputMonitor, Timer),
)
PLACES = ("model.pretrained", "data.source")  # folders, or names on the Hub


def describe(options: Mapping[str, Any]) -> Experiment:
    """Return what a config trains, by dotted name.

    Args:
        options: a config as nested dicts, or a part of one: ``model``, ``data``, ``trainer`` and ``seed_everything``.
            Lists in it may hold namespaces.
    """
    trainer, data = (options.get(part) or {} for part in ("trainer", "data"))
    found = flatten({part: options.get(part) or {} for part in ("model", "data")})
    found = {name: value for name, value in found.items() if name not in MAY_CHANGE}
    found |= {f"trainer.{name}": trainer[name] for name in TRAINER if name in trainer}
    if "callbacks" in trainer:
        found["trainer.callbacks"] = _callbacks(trainer["callbacks"])
    if "accumulate_grad_batches" in trainer and "batch_size" in data:  # less memory is no other experiment
        examples = data["batch_size"] * (trainer["accumulate_grad_batches"] or 1)
        found["data.batch_size x trainer.accumulate_grad_batches"] = examples
    if type(seed := options.get("seed_everything")) is int:  # true draws one
        found["seed_everything"] = seed
    for name in PLACES:
        if name in found and os.path.exists(str(found[name])):  # the same folder from anywhere
            found[name] = os.path.realpath(found[name])
    return found


def _callbacks(configured: Any) -> str:  # noqa: ANN401
    """Return the callbacks of a config that may change what is trained, their classes with their arguments."""
    found = []
    for callback in configured if isinstance(configured, list) else [configured] if configured else []:
        kind = pydoc.locate(path := callback["class_path"])
        is_bystander = isinstance(kind, type) and issubclass(kind, BYSTANDERS)
        if not is_bystander and not path.startswith("idefics_lit."):
            found.append(f"{path}({', '.join(f'{k}={v!r}' for k, v in (callback.get('init_args') or {}).items())})")
    return ", ".join(found) or "none"


def differences(saved: Experiment, own: Experiment) -> list[str]:
    """Return what differs of the options that both know, a text each."""
    return [f"{name} {saved[name]}, here {value}" for name, value in own.items() if saved.get(name, value) != value]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested values by their dotted path, ``columns`` excepted, which is one value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and name != "columns"
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def tell(line: str) -> None:
    """Print a line on standard error, on rank 0."""
    rank_zero_only(print)(line, file=sys.stderr)


def resumable(files: Iterable[Path], same: Callable[[Path, Experiment], list[str]], read: Read) -> Path | None:
    """Return the newest checkpoint that the same experiment's fit can go on from; None where there is none.

    Args:
        files: checkpoints, whosever they are. Why one is passed over is printed, once for each run.
        same: the `differences` of a file's experiment and the fit's.
        read: returns a file's checkpoint; what it refuses with an `InputError` is passed over.
    """
    told = set()
    for path, checkpoint in _ours(files, read):
        differing = same(path, _saved(checkpoint))
        if not differing and not checkpoint.get("optimizer_states"):
            differing = ["weights alone"]
        if not differing:
            return path
        why = "; ".join(differing[:3]) + (f"; {len(differing) - 3} more" if len(differing) > 3 else "")
        if (path.parent, why) not in told:
            told.add((path.parent, why))
            tell(f"passed over: {path}: {why}")
    return None


def only_experiment(files: Iterable[Path], given: Experiment, read: Read, *, strict: bool) -> Path | None:
    """Return the newest checkpoint, where all are one experiment's or what is given tells whose it is.

    Args:
        files: checkpoints, whosever they are.
        given: the options that the command gives.
        read: as for `resumable`.
        strict: one experiment is refused too that they contradict.

    Raises:
        InputError: several experiments have checkpoints, and none or several of them agree with what is given.
    """
    experiments: list[tuple[Path, Experiment]] = []
    for path, checkpoint in _ours(files, read):
        saved = _saved(checkpoint)
        if all(differences(known, saved) for _, known in experiments):
            experiments.append((path, saved))
    agreeing = [(path, saved) for path, saved in experiments if not differences(saved, given)]
    if len(agreeing) == 1 or (len(experiments) == 1 and not strict):
        return (agreeing or experiments)[0][0]
    if not experiments:
        return None
    (first, saved), *others = agreeing or experiments
    if not others:
        raise InputError(f"ckpt_path last: {first} is of another experiment: {differences(saved, given)[0]}")
    (second, other), *_ = others
    raise InputError(
        f"ckpt_path last: {first} or {second}? They are of two experiments ({differences(other, saved)[0]}): "
        f"give one of them as --ckpt_path"
    )


def _ours(files: Iterable[Path], read: Read) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield this program's whole checkpoints, the newest first."""
    times = {}
    for path in files:
        try:
            times[path] = path.stat().st_mtime_ns
        except FileNotFoundError:  # a running fit has just replaced it
            continue
    for path in sorted(times, key=lambda path: times[path], reverse=True):
        try:
            checkpoint = read(path)
        except InputError as error:
            rank_zero_warn(f"Passed over: {error}")
            continue
        yield path, checkpoint


def _saved(checkpoint: Mapping[str, Any]) -> Experiment:
    """Return a checkpoint's experiment; an older one holds the options of model and data alone."""
    data = checkpoint.get("datamodule_hyper_parameters")
    return checkpoint.get("experiment") or describe({"model": checkpoint["hyper_parameters"], "data": data})
