"""The options that a run leaves open: they are worked out for its device, and tried before the first step."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.parsing import AttributeDict

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.workload import count_pages, largest_batch, workload
from idefics_lit.errors import InputError
from idefics_lit.model.cuda_graphs import CALLS_BEFORE_CAPTURE
from idefics_lit.model.execution import EXECUTION_OPTIONS, Device, Execution, Workload, choose_execution, known_options
from idefics_lit.model.fsdp import FSDP2Strategy
from idefics_lit.model.memory import GIB, WeightCount, count_weights
from idefics_lit.pretrained import DTYPES, load_config
from idefics_lit.training.trained_weights import trained_parameters
from idefics_lit.utils.distributed import gather_objects

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Of an evaluation, and of a fit with a DataLoader of one's own, whose batches aren't known.
UNKNOWN_WORKLOAD = Workload([8])
RAM_SHARE = 0.5  # of the free memory, that cached features may take


def options_in_effect(
    options: Mapping[str, Any],
    devices: Sequence[Device],
    precision: str,
    trainer: Trainer | None = None,
    datamodule: LightningDataModule | None = None,
    weights: WeightCount | None = None,
) -> Any:  # noqa: ANN401
    """Return the options of `Idefics2Module` with a value for each that is None; set the batch size of a fit.

    Args:
        options: the module's hyperparameters.
        devices: those of all ranks, of which the one with the least memory decides.
        precision: the Trainer's precision.
        trainer: the Trainer that calls the module; without one CUDA graphs and compiled layers are left out, because
            they restrict the order of its calls.
        datamodule: the Trainer's data module.
        weights: the model's weights; by default they are counted, unless nothing depends on their number.

    Raises:
        InputError: the model's configuration can't be loaded, or ``lora.target_modules`` match no layer.
    """
    given = dict(options)
    if trainer is None:
        given |= {"cuda_graphs": bool(options["cuda_graphs"]), "compile": bool(options["compile"])}
    smallest = min(devices, key=lambda device: device.gib)
    is_sharded = trainer is not None and isinstance(trainer.strategy, FSDP2Strategy)
    fit = datamodule if isinstance(datamodule, DocVQADataModule) and datamodule.step else None
    load = workload(fit) if fit else UNKNOWN_WORKLOAD
    if trainer:
        load = load._replace(steps=_steps(trainer, fit))
    known: dict[str, Any] = known_options(smallest, given, precision, is_sharded=is_sharded)
    if not fit and smallest.type == "cpu":  # whose memory is enough for an evaluation
        known.setdefault("gradient_checkpointing", False)
    has_choice = fit and (len(load.batch_sizes) > 1 or given["feature_cache"] is None)
    if not has_choice and len(known) == len(EXECUTION_OPTIONS):
        execution = Execution(load.batch_sizes[0], **known)
    else:
        config = load_config(options["pretrained"])
        weights = weights or count_weights(config, options)
        execution = choose_execution(smallest, config, weights, given, precision, load, is_sharded=is_sharded)
        if trainer and fit and given["feature_cache"] is None and not weights.is_vision_trained:
            gigabytes = count_pages(fit) * _page_bytes(config, load, precision) / 1e9
            ram = min(device.ram_gib for device in devices) * GIB / 1e9 / trainer.num_devices
            if _pages_recur(trainer, fit, load) and gigabytes <= min(RAM_SHARE * ram, given["feature_cache_gb"]):
                given["feature_cache"] = "memory"
    if fit and fit.step:
        fit.step.set_batch_size(execution.batch_size)
    given["feature_cache"] = given["feature_cache"] or "off"
    return AttributeDict({**given, **execution.model_options})


def describe(
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    devices: Sequence[Device],
    trainer: Trainer,
    datamodule: LightningDataModule | None,
) -> str:
    """Return a line with the options of a fit that were worked out, by their names on the command line.

    Args:
        given: the module's hyperparameters.
        options: its `options_in_effect`.
        devices: those of all ranks.
        trainer: the fit's Trainer.
        datamodule: the Trainer's data module.
    """
    smallest, values = min(devices, key=lambda device: device.gib), {"trainer.precision": str(trainer.precision)}
    if isinstance(datamodule, DocVQADataModule) and datamodule.step:
        values["data.batch_size"] = str(datamodule.step.batch_size)
        values["trainer.accumulate_grad_batches"] = str(trainer.accumulate_grad_batches)
    open_options = [name for name in (*EXECUTION_OPTIONS, "feature_cache") if given[name] is None]
    values |= {f"model.{name}": str(options[name]).lower() for name in open_options}
    texts = (f"{name} {value}" for name, value in values.items())
    return f"{smallest.name}, {smallest.gib:.0f} GiB free: {', '.join(texts)}; each can be given as a flag"


def find_batch_size(module: Any, trainer: Trainer) -> None:  # noqa: ANN401
    """Try forward and backward of the largest batch that a fit can have; while it doesn't fit, take smaller batches.

    The optimizer step stays: smaller batches are accumulated. Nothing is tried with sharded weights, or if the batches
    aren't those of `DocVQADataModule`.

    Args:
        module: the `Idefics2Module`, on its device.
        trainer: its Trainer, before the training loader is built.

    Raises:
        InputError: a batch of one question doesn't fit.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if isinstance(trainer.strategy, FSDP2Strategy) or not isinstance(datamodule, DocVQADataModule):
        return
    assert datamodule.step is not None
    step = datamodule.step
    # The graphs of a batch that fits are kept: they are the largest, and the fit's others share their memory.
    while not all(gather_objects(trainer, _fits(module, trainer, datamodule))):
        module.backbone.forget_graphs()
        smaller = [size for size in step.batch_sizes if size < step.batch_size]
        text = f"a batch of data.batch_size {step.batch_size} may not fit into the GPU's memory"
        if step.is_batch_size_given:
            rank_zero_warn(f"{text}: leave it and trainer.accumulate_grad_batches out, and they are worked out")
            return
        if not smaller:
            raise InputError(
                "the GPU's memory doesn't suffice for a batch of one question: give --model.gradient_checkpointing "
                "true, --model.quantize_vision true, a smaller --data.image_size, or a smaller --model.pretrained"
            )
        step.set_batch_size(smaller[0])
        rank_zero_info(
            f"{text}: data.batch_size {step.batch_size}, trainer.accumulate_grad_batches "
            f"{trainer.accumulate_grad_batches} from now on, the same optimizer step"
        )


def _fits(module: Any, trainer: Trainer, datamodule: DocVQADataModule) -> bool:  # noqa: ANN401
    """Whether forward and backward of the largest batch fit into memory; no gradient is accumulated."""
    parameters = [*trained_parameters(module).values()]
    backbone = module.backbone
    cache, backbone.feature_cache = backbone.feature_cache, None
    backbone.calls_before_capture = 1
    fits = True
    with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
        try:
            batch = module.transfer_batch_to_device(largest_batch(datamodule), module.device, 0)
            for _ in range(2 if backbone.has_graphs else 1):  # the second call is captured
                with trainer.precision_plugin.forward_context():
                    loss, _ = module.loss(batch)
                # Unlike backward it doesn't call DDP's hooks.
                torch.autograd.grad(loss, parameters, allow_unused=True)
        except torch.OutOfMemoryError:
            fits = False
    batch = loss = None
    backbone.feature_cache, backbone.calls_before_capture = cache, CALLS_BEFORE_CAPTURE
    torch.cuda.empty_cache()
    return fits


def _steps(trainer: Trainer, datamodule: DocVQADataModule | None) -> float:
    """Return the optimizer steps of a fit; infinite if something else ends it."""
    if datamodule is None or datamodule.step is None:
        return trainer.max_steps if trainer.max_steps >= 0 else inf
    return _training_questions(trainer, datamodule) / _questions_per_step(trainer, datamodule)


def _training_questions(trainer: Trainer, datamodule: DocVQADataModule) -> float:
    """Return the questions that a fit trains on, in all epochs; infinite if something else ends it."""
    limits = [trainer.max_steps * _questions_per_step(trainer, datamodule)] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and "train" in datamodule.examples:
        limits.append(trainer.max_epochs * len(datamodule.examples["train"]))
    return min(limits, default=inf)


def _questions_per_step(trainer: Trainer, datamodule: DocVQADataModule) -> int:
    assert datamodule.step is not None
    return datamodule.step.examples_per_device * trainer.world_size


def _pages_recur(trainer: Trainer, datamodule: DocVQADataModule, load: Workload) -> bool:
    """Whether a fit encodes pages more than once: in further epochs, or for further questions about them."""
    if "train" not in datamodule.examples:  # a stream
        return False
    examples = datamodule.examples["train"]
    visits = len(examples) / load.questions_per_row
    return _training_questions(trainer, datamodule) > len(examples) or visits > len(set(examples.page_ids))


def _page_bytes(config: "PretrainedConfig", load: Workload, precision: str) -> int:
    """Return the size of a square page's features; behind a frozen connector they are smaller."""
    vision = config.vision_config
    patches = load.images_per_page * (load.longest_edge // vision.patch_size) ** 2
    return int(patches * vision.hidden_size * DTYPES.get(precision, torch.float32).itemsize)
