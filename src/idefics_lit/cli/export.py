"""The command ``export``: write a checkpoint's adapter for peft, or merged into its base model.

The folder can be used without this package.
"""

import json
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoProcessor, GenerationConfig, ProcessorMixin

from idefics_lit.cli.model_card import SPLITTING_OFF, model_card
from idefics_lit.errors import InputError, first_line
from idefics_lit.model.loading import load_model
from idefics_lit.model.lora import LoRA
from idefics_lit.pretrained import load_processor, resolve
from idefics_lit.training.checkpoint import check_hyperparameters, read_checkpoint
from idefics_lit.training.module import Idefics2Module

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
    merge: bool = False,
    push_to_hub: str | None = None,
) -> None:
    """Write the adapter or the merged model, the processor, ``idefics_lit.json`` and a model card to a folder.

    Args:
        module: the module with the checkpoint's options; its model isn't loaded yet.
        data: the data module's options, on which prompt and processor depend.
        ckpt_path: the checkpoint.
        output: the folder, which must be new or empty.
        device: where the base model is loaded, as in training, to check that the checkpoint fits it.
        merge: add the adapter to the base model's bfloat16 weights and write all weights instead of the adapter alone.
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
    with _new_folder(output) as folder:
        checkpoint = read_checkpoint(ckpt_path)
        check_hyperparameters(checkpoint, {"hyper_parameters": options, "datamodule_hyper_parameters": data})
        processor = load_processor(
            options.pretrained, image_splitting=data["image_splitting"], image_size=data["image_size"]
        )
        _save_processor(processor, folder)
        generation = _generation_config(processor, options.max_new_tokens)
        module.model = load_model(
            options.pretrained,
            quantization="none" if merge else options.quantization,  # merged 4-bit weights would lose the adapter
            lora=LoRA(**options.lora),
            dtype=torch.bfloat16,
            device=torch.device("cpu") if merge else device,
        )
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        base = resolve(options.pretrained)
        local_base = Path(base).is_dir()
        if local_base:  # what is published names no folders of this machine
            base = str(Path(base).resolve()) if not (merge or push_to_hub) else Path(options.pretrained).resolve().name
        if merge:
            merged = module.model.merge_and_unload()
            merged.generation_config = generation  # without it, some base models would not stop after the answer
            merged.save_pretrained(folder)
        else:
            module.model.peft_config["default"].base_model_name_or_path = base
            # The default "auto" saves all of lm_head if target_modules names it.
            module.model.save_pretrained(str(folder), save_embedding_layers=False)
        facts = {
            "base": base,
            "merged": merge,
            "prompt_style": data["prompt_style"],
            "image_splitting": data["image_splitting"],
            "image_tokens": 320 if data["image_splitting"] else 64,
            "scores": _scores(checkpoint),
            "steps": checkpoint["global_step"],
            "model": _without_folders(dict(options)),
            "data": _without_folders(dict(data)),
        }
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        (folder / "idefics_lit.json").write_text(text, encoding="utf-8")
        card = model_card(facts, push_to_hub or output, generation, local_base=local_base)
        (folder / "README.md").write_text(card, encoding="utf-8")
        # safetensors creates files that only the owner can read; give all files the permissions of the umask.
        mode = (folder / "README.md").stat().st_mode
        for file in folder.iterdir():
            file.chmod(mode)
    print(f"{'merged model' if merge else 'adapter'} in {output}")
    if not data["image_splitting"]:
        print(f"warning: {SPLITTING_OFF}", file=sys.stderr)
    if push_to_hub:
        if local_base and not merge:
            print(
                f"warning: the base model is the local folder {options.pretrained}: put its Hub id in place of "
                f"{base} into README.md and adapter_config.json, or others can't load the adapter",
                file=sys.stderr,
            )
        print(f"uploaded to {_push(output, push_to_hub)}")


def _save_processor(processor: ProcessorMixin, folder: Path) -> None:
    """Write the processor, and check that the written one returns the same inputs.

    Raises:
        InputError: it doesn't, or it can't be loaded.
    """
    tokenizer = processor.tokenizer
    if hasattr(tokenizer, "legacy"):
        # transformers 5 doesn't save it otherwise, and the text after an image or a message would get other token ids.
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    for name in ("is_local", "local_files_only"):  # settings of this machine
        tokenizer.init_kwargs.pop(name, None)
    processor.save_pretrained(folder)
    expected = _probe_inputs(processor)
    try:
        actual = _probe_inputs(AutoProcessor.from_pretrained(folder, trust_remote_code=False))
        names = sorted(actual.keys() | expected.keys())
        differing = [n for n in names if not (n in actual and n in expected and torch.equal(actual[n], expected[n]))]
        problem = f"gives other inputs than in training: {', '.join(differing)} differ" if differing else ""
    except Exception as error:
        problem = f"can't be loaded again: {first_line(error)}"
    if problem:
        raise InputError(
            f"output: the processor that transformers {transformers.__version__} has written {problem}; the output was "
            f"deleted: export with another version of transformers"
        )


def _probe_inputs(processor: ProcessorMixin) -> Mapping[str, torch.Tensor]:
    """Return a processor's inputs for two prompts with unusual characters and a page that is scaled down."""
    messages: list[Any] = [
        {"role": "user", "content": [_text("Answer briefly."), {"type": "image"}, _text("What is 12.80 €?")]},
        {"role": "assistant", "content": [_text("007 ½ naïve 日本")]},
        {"role": "user", "content": [_text("  Two\nlines,\ttabs  and {braces}"), {"type": "image"}, _text(" 7 ")]},
    ]
    texts = [str(processor.apply_chat_template(chat, add_generation_prompt=True)) for chat in (messages, messages[:1])]
    page = Image.linear_gradient("L").resize((1300, 1700))
    inputs: Mapping[str, torch.Tensor] = processor(
        text=texts, images=[[page, page], [page]], padding=True, return_tensors="pt"
    )
    return inputs


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _generation_config(processor: ProcessorMixin, max_new_tokens: int) -> GenerationConfig:
    """Return the end and suppressed tokens of generation in validation."""
    tokenizer = processor.tokenizer
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    fake, image, end = tokenizer.convert_tokens_to_ids(names)
    return GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end],
        bad_words_ids=[[fake], [image]],
        max_new_tokens=max_new_tokens,
    )


def _without_folders(value: Any) -> Any:  # noqa: ANN401
    """Return options with the last part of each absolute path, which names a folder of this machine."""
    if isinstance(value, Mapping):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


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


@contextmanager
def _new_folder(path: str) -> Iterator[Path]:
    """Write to a temporary folder, and rename it when it is complete.

    Raises:
        InputError: the path exists and isn't an empty folder, or it can't be written; the temporary folder is deleted.
    """
    final = Path(path).absolute()
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")  # process ids aren't unique across containers
    try:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise InputError(f"output {path} exists already: name a new folder, or empty it")
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if final.exists():
                final.rmdir()
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"output {path} can't be written: {reason}; the output was deleted: make room on the disk"
        ) from error
