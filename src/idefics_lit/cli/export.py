"""The command ``export``: write a checkpoint's adapter to a folder, and upload it to the Hub."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from idefics_lit.errors import InputError, first_line
from idefics_lit.model.loading import load_model
from idefics_lit.model.lora import LoRA
from idefics_lit.pretrained import load_processor, resolve
from idefics_lit.training.checkpoint import read_checkpoint
from idefics_lit.training.checkpoint_checks import check_hyperparameters
from idefics_lit.training.export import write_export
from idefics_lit.training.merging import MergeBase, copy_to_merge
from idefics_lit.training.model_card import splitting_off
from idefics_lit.training.module import Idefics2Module
from idefics_lit.utils.files import new_folder

# Files that an earlier export may have left in a repository; loaders would use both.
STALE_FILES = [
    "adapter_*",
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
]


def export(
    module: Idefics2Module,
    data: Mapping[str, Any],
    ckpt_path: str | None,
    output: str | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    merge: bool = False,
    merge_into: MergeBase = "dequantized",
    push_to_hub: str | None = None,
) -> None:
    """Export a checkpoint's adapter, see `idefics_lit.training.export.export_adapter`.

    Args:
        module: the module with the checkpoint's options; its model isn't loaded yet.
        data: the data module's options, on which prompt and processor depend.
        ckpt_path: the checkpoint.
        output: the folder, which must be new or empty.
        device: where the base model is loaded, as in training, to check that the checkpoint fits it.
        dtype: the model's, by the Trainer's precision.
        merge: write the merged model instead of the adapter.
        merge_into: the weights to add the adapter to, see `export_adapter`.
        push_to_hub: also upload the folder to this model repository, ``owner/name``; a new repository is private.

    Raises:
        InputError: there is no checkpoint or it doesn't fit the model; the written processor gives other inputs; the
            folder isn't empty or can't be written; or the Hub refuses the upload.
    """
    if not ckpt_path:
        raise InputError("ckpt_path is missing: give --ckpt_path CHECKPOINT, whose adapter is written")
    if not output:
        raise InputError("output is missing: give --output FOLDER")
    if push_to_hub and "/" not in push_to_hub:
        raise InputError(f"push_to_hub {push_to_hub}: whose? Give OWNER/{push_to_hub}")
    options = module.hparams
    with new_folder(output) as folder:
        checkpoint = read_checkpoint(ckpt_path)
        processor = load_processor(
            options.pretrained, image_splitting=data["image_splitting"], image_size=data["image_size"]
        )
        splitting = processor.image_processor.do_image_splitting
        data = {**data, "image_splitting": splitting}
        check_hyperparameters(checkpoint, {"hyper_parameters": options, "datamodule_hyper_parameters": data})
        module.model = load_model(
            options.pretrained,
            quantization=options.quantization,
            quantize_vision=options.quantize_vision,
            lora=LoRA(**options.lora),
            dtype=torch.bfloat16 if options.quantization == "none" else dtype,  # 4-bit weights depend on it a little
            device=device,
            prepare_base=module.prepare_base,
        )
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        model, merged = module.model, None
        if merge:  # without quantization, no second copy is needed
            model, merged = (model, "") if options.quantization == "none" else copy_to_merge(module, merge_into)
        write_export(
            folder,
            model,
            processor,
            options=options,
            data=data,
            merged=merged,
            steps=checkpoint["global_step"],
            temperature=module.temperature,
            name=push_to_hub or output,
            scores=_scores(checkpoint),
            publish=bool(push_to_hub),
        )
    print(f"{'merged model' if merge else 'adapter'} in {output}")
    if merged:
        print(merged)
    if not splitting:
        print(f"warning: {splitting_off(processor)}", file=sys.stderr)
    if push_to_hub:
        if Path(resolve(options.pretrained)).is_dir() and not merge:
            print(
                f"warning: the base model is the local folder {options.pretrained}: put its Hub id in place of its "
                f"name into README.md and adapter_config.json, or others can't load the adapter",
                file=sys.stderr,
            )
        print(f"uploaded to {_push(output, push_to_hub)}")


def _push(folder: str, name: str) -> str:
    """Upload a folder to a model repository, which is private if it is new; return its URL."""
    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, delete_patterns=STALE_FILES)
    except Exception as error:
        raise InputError(
            f"push_to_hub {name}: {first_line(error)}: {folder} is written; log in with `hf auth login`, then "
            f"`hf upload {name} {folder}`"
        ) from error
    return str(repository)


def _scores(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """Return the best values, up to this checkpoint, of the metrics that ModelCheckpoint monitors."""
    states = checkpoint.get("callbacks", {}).values()
    return {
        state["monitor"]: round(float(state["best_model_score"]), 6)
        for state in states
        if isinstance(state, Mapping) and state.get("monitor") and state.get("best_model_score") is not None
    }
