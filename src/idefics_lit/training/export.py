"""Export an adapter, alone or merged into its base model, for peft and transformers without this package."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from PIL import Image
from transformers import AutoProcessor, GenerationConfig, ProcessorMixin

from idefics_lit.data.image_layout import count_images, page_edge
from idefics_lit.data.image_tokens import tokens_per_image
from idefics_lit.errors import InputError, first_line
from idefics_lit.evaluation.decoding import suppressed_token_ids
from idefics_lit.model.quiet_imports import peft
from idefics_lit.pretrained import resolve
from idefics_lit.training.checkpoint import base_fingerprint
from idefics_lit.training.checkpoint_checks import check_base, check_weights
from idefics_lit.training.merging import MergeBase, copy_to_merge
from idefics_lit.training.model_card import model_card
from idefics_lit.training.module import Idefics2Module
from idefics_lit.utils.files import new_folder

# In the names of the weights that peft saves with an adapter.
ADAPTER_WEIGHT = re.compile(r"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.")


@rank_zero_only
def export_adapter(
    module: Idefics2Module,
    folder: str | Path,
    *,
    merge: bool = False,
    merge_into: MergeBase = "dequantized",
    **options: Any,  # noqa: ANN401
) -> None:
    """Write a module's adapter or the merged model, the processor, ``idefics_lit.json`` and a model card to a folder.

    Plain peft loads the adapter: ``PeftModel.from_pretrained(base, folder)``. On several ranks, rank 0 writes. The
    module isn't changed.

    Args:
        module: the module.
        folder: must be new or empty.
        merge: add the adapter to the base model's weights in bfloat16 and write all weights instead of the adapter
            alone. The base model is loaded again, on the CPU.
        merge_into: of a base model in 4 bits, the "dequantized" weights, with which validation scored the adapter, or
            the "original" 16-bit ones, which it never saw. The difference of both is logged.
        options: ``prompt_style``, ``image_splitting`` and ``image_size``. They default to those of the data module or
            the checkpoint; give those of your own collator.

    Raises:
        InputError: the folder isn't empty or can't be written; the written processor gives other inputs; or others
            couldn't load what the module trained: it has trained weights outside of the adapter, or a base model other
            than ``pretrained``.
    """
    module.configure_model()
    pretrained = module.hparams.pretrained  # a loaded model that was handed over may be another one
    check_base(module.base_fingerprint, base_fingerprint(pretrained), pretrained)
    adapter = {name.removeprefix("model."): value for name, value in module.state_dict().items()}
    if other := next((name for name in adapter if not ADAPTER_WEIGHT.search(name)), None):
        raise InputError(f"{other} is trained but isn't part of the adapter, which alone can be exported")
    with new_folder(folder) as temporary:
        collator = module.collator(train=False, **options)
        model, merged = copy_to_merge(module, merge_into) if merge else (module.model, None)
        check_weights(adapter, {name: p for name, p in model.named_parameters() if p.requires_grad})
        if merged:
            rank_zero_info(merged)
        image_size = collator.processor.image_processor.size["longest_edge"]
        write_export(
            temporary,
            model,
            collator.processor,
            options=module.hparams,
            data={"prompt_style": collator.prompt_style, "image_size": image_size},
            merged=merged,
            steps=module.global_step,
            temperature=module.temperature,
            name=str(folder),
        )


def write_export(
    folder: Path,
    model: peft.PeftModel,
    processor: ProcessorMixin,
    *,
    options: Mapping[str, Any],
    data: Mapping[str, Any],
    merged: str | None,
    steps: int,
    temperature: float,
    name: str,
    scores: Mapping[str, float] | None = None,
    publish: bool = False,
) -> None:
    """Write the files of an export.

    Args:
        folder: an empty folder.
        model: has the adapter; if it is merged, the model can't be used afterwards.
        processor: the processor of the training.
        options: the module's.
        data: the data module's options, at least ``prompt_style``.
        merged: write the merged model instead of the adapter; what `copy_to_merge` says, for the model card.
        steps: optimizer steps of the training, 0 if unknown.
        temperature: the module's.
        name: the Hub id or folder that the model card's code loads.
        scores: values of metrics, for the model card.
        publish: write no paths of this machine.

    Raises:
        InputError: the written processor can't be loaded or gives other inputs.
    """
    _save_processor(processor, folder)
    base_model: Any = model.get_base_model()
    generation = _generation_config(processor, base_model.generation_config, options["max_new_tokens"])
    base = base_name = resolve(options["pretrained"])
    local_base = Path(base).is_dir()
    if local_base:
        base_name = Path(options["pretrained"]).resolve().name
        base = base_name if merged is not None or publish else str(Path(base).resolve())
    if merged is not None:
        whole = model.merge_and_unload()
        whole.generation_config = generation  # without it, some base models would not stop after the answer
        whole.save_pretrained(folder)
    else:
        model.peft_config["default"].base_model_name_or_path = base
        # The default "auto" saves all of lm_head if target_modules names it.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    images: Any = processor.image_processor
    edge = page_edge(images)
    facts = {
        "base": base_name,
        "model_type": base_model.config.model_type,
        "merged": merged is not None,
        "prompt_style": data["prompt_style"],
        "image_splitting": images.do_image_splitting,
        "image_tokens": count_images(images, (edge, edge)) * tokens_per_image(processor),
        "scores": scores or {},
        "steps": steps,
        "temperature": temperature,
        "model": _without_folders(dict(options)),
        "data": _without_folders({**data, "image_splitting": images.do_image_splitting}),
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    (folder / "idefics_lit.json").write_text(text, encoding="utf-8")
    card = model_card(facts, name, generation, processor, base=base, local_base=local_base, merged=merged)
    (folder / "README.md").write_text(card, encoding="utf-8")
    # safetensors creates files that only the owner can read; give all files the permissions of the umask.
    mode = (folder / "README.md").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)


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


def _generation_config(processor: ProcessorMixin, base: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
    """Return the end and suppressed tokens of generation in validation; the base model's own ends are among them."""
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    own_ends = base.eos_token_id if isinstance(base.eos_token_id, list) else [base.eos_token_id]
    own_ends = [token for token in own_ends if token is not None]
    return GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys([tokenizer.eos_token_id, end, *own_ends])),
        bad_words_ids=[[token_id] for token_id in suppressed_token_ids(tokenizer)],
        max_new_tokens=max_new_tokens,
    )


def _without_folders(value: Any) -> Any:  # noqa: ANN401
    """Return options with the last part of each absolute path, which names a folder of this machine."""
    if isinstance(value, Mapping):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
