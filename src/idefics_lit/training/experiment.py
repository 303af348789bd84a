"""Which experiment a checkpoint belongs to, so that ``--ckpt_path last`` resumes the right one.

An experiment is what a run trains: its options without those that may change when it is resumed.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from idefics_lit.errors import InputError
from idefics_lit.training.checkpoint import read_checkpoint

Experiment = dict[str, Any]

# Options that don't change what is trained: speed, memory, hardware, evaluation.
MAY_CHANGE = {
    *("model.dequantize", "model.gradient_checkpointing", "model.feature_cache", "model.feature_cache_gb"),
    *("model.cuda_graphs", "model.compile", "model.max_new_tokens", "model.strip_period", "data.pretrained"),
    *("data.num_workers", "data.batch_size", "data.eval_batch_size", "data.on_bad_example", "data.limit_val"),
    *("data.val_in_fit", "data.limit_test", "data.test_split", "data.predict_split"),
}
# The Trainer's options that change it.
TRAINER_OPTIONS = ("gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "overfit_batches")
PATH_OPTIONS = ("model.pretrained", "data.source")  # folders, or names on the Hub


def describe(options: Mapping[str, Any]) -> Experiment:
    """Return the experiment of a config, by dotted option name.

    Args:
        options: nested dicts with any of the sections ``model``, ``data``, ``trainer`` and ``seed_everything``.
    """
    trainer, data = (options.get(section) or {} for section in ("trainer", "data"))
    experiment = flatten({section: options.get(section) or {} for section in ("model", "data")})
    experiment = {name: value for name, value in experiment.items() if name not in MAY_CHANGE}
    experiment |= {f"trainer.{name}": trainer[name] for name in TRAINER_OPTIONS if name in trainer}
    if "accumulate_grad_batches" in trainer and "batch_size" in data:  # only their product changes what is trained
        examples = data["batch_size"] * (trainer["accumulate_grad_batches"] or 1)
        experiment["data.batch_size x trainer.accumulate_grad_batches"] = examples
    if type(seed := options.get("seed_everything")) is int:  # true stands for a random seed
        experiment["seed_everything"] = seed
    for name in PATH_OPTIONS:
        if name in experiment and os.path.exists(str(experiment[name])):  # so that relative paths compare equal
            experiment[name] = os.path.realpath(experiment[name])
    return experiment


def differences(saved: Experiment, own: Experiment) -> list[str]:
    """Return a line for each option in both experiments whose values differ."""
    return [f"{name} {saved[name]}, here {value}" for name, value in own.items() if saved.get(name, value) != value]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted name; ``columns`` is kept as one value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and name != "columns"
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def print_status(line: str) -> None:
    """Print a line on standard error, on rank 0."""
    rank_zero_only(print)(line, file=sys.stderr)


def latest_resumable(paths: Iterable[Path], compare: Callable[[Path, Experiment], list[str]]) -> Path | None:
    """Return the latest checkpoint that a fit can resume from, or None.

    The reason why a checkpoint is skipped is printed, once for each run.

    Args:
        paths: the candidates, of any experiment or program.
        compare: returns the `differences` of a candidate's experiment and the fit's.
    """
    printed = set()
    for path, checkpoint in _readable_checkpoints(paths):
        reasons = compare(path, _experiment_of(checkpoint))
        if not reasons and "optimizer_states" not in checkpoint:
            reasons = ["weights alone"]
        if not reasons:
            return path
        reason = "; ".join(reasons[:3]) + (f"; {len(reasons) - 3} more" if len(reasons) > 3 else "")
        if (path.parent, reason) not in printed:
            printed.add((path.parent, reason))
            print_status(f"skipped: {path}: {reason}")
    return None


def latest_of_one_experiment(paths: Iterable[Path], options: Experiment, *, strict: bool) -> Path | None:
    """Return the latest checkpoint if all belong to one experiment, or if the options tell which is meant.

    Args:
        paths: the candidates, of any experiment or program.
        options: the options that the command gives.
        strict: raise if there is only one experiment but it contradicts the options.

    Returns:
        The checkpoint, or None if there is none.

    Raises:
        InputError: there are several experiments, and none or several of them agree with the options.
    """
    experiments: list[tuple[Path, Experiment]] = []
    for path, checkpoint in _readable_checkpoints(paths):
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


def _readable_checkpoints(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield this program's intact checkpoints, the latest first."""
    times = {}
    for path in paths:
        try:
            times[path] = path.stat().st_mtime_ns
        except FileNotFoundError:  # a running fit has replaced it
            continue
    for path in sorted(times, key=lambda path: times[path], reverse=True):
        try:
            yield path, read_checkpoint(path)
        except InputError as error:
            rank_zero_warn(f"Skipped: {error}")


def _experiment_of(checkpoint: Mapping[str, Any]) -> Experiment:
    """Return a checkpoint's experiment; earlier versions saved only the options of model and data."""
    data = checkpoint.get("datamodule_hyper_parameters")
    return checkpoint.get("experiment") or describe({"model": checkpoint["hyper_parameters"], "data": data})
