"""A checkpoint's adapter as plain peft reads it, or merged into its base; nothing of this package is needed there."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from huggingface_hub import HfApi
from safetensors import SafetensorError

from idefics_lit.checkpoint import read_checkpoint
from idefics_lit.errors import InputError, first_line
from idefics_lit.model import LoRA, load_model
from idefics_lit.module import Idefics2Module
from idefics_lit.pretrained import load_processor, resolve

LOAD = """\
import torch
from PIL import Image
{imports}

{load}
processor = AutoProcessor.from_pretrained({name})

content = {content}
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True).strip()
inputs = processor(text=prompt, images=[Image.open("page.png")], return_tensors="pt").to(model.device, model.dtype)
with torch.no_grad():
    ids = model.generate(**inputs, do_sample=False, max_new_tokens={max_new_tokens})
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
"""
ADAPTER = (
    "from peft import PeftModel\nfrom transformers import AutoModelForImageTextToText, AutoProcessor",
    'base = AutoModelForImageTextToText.from_pretrained({base}, dtype="auto", device_map="auto")\n'
    "model = PeftModel.from_pretrained(base, {name}).eval()",
)
MERGED = (
    "from transformers import AutoModelForImageTextToText, AutoProcessor",
    'model = AutoModelForImageTextToText.from_pretrained({name}, dtype="auto", device_map="auto").eval()',
)
CONTENT = {
    "recipe": '[\n    {"type": "text", "text": "Answer briefly."},\n    {"type": "image"},\n'
    '    {"type": "text", "text": "What is the date?"},\n]',
    "idefics": '[\n    {"type": "image"},\n'
    '    {"type": "text", "text": "What is the date?\\nGive a very brief answer."},\n]',
}
SPLITTING_OFF = (
    "the adapter was trained with image splitting off, 64 image tokens a page, and the processor is saved so; servers "
    "such as vLLM and TGI may count on the Hub's processor, which splits, 320 tokens"
)


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
    """Write a folder: adapter or merged model, processor, ``idefics_lit.json`` and a model card.

    Args:
        module: of the checkpoint's options; its model isn't loaded yet.
        data: the data module's options; prompt and processor depend on them.
        ckpt_path: the checkpoint.
        output: the folder; it may be there if it is empty.
        device: where the base is loaded, as it was trained on, to check that the checkpoint fits it.
        merge: add the adapter to the base's bfloat16 weights and write them all, instead of the adapter alone.
        push_to_hub: upload the folder to this model repository too, ``owner/name``, which is private if it is new.

    Raises:
        InputError: there is no checkpoint or it doesn't fit, the folder isn't empty or can't be written, or the Hub
            refuses it.
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
        processor = load_processor(
            options.pretrained, image_splitting=data["image_splitting"], image_size=data["image_size"]
        )
        module.model = load_model(
            options.pretrained,
            quantization="none" if merge else options.quantization,  # 4 bits would round away what the adapter adds
            lora=LoRA(**options.lora),
            dtype=torch.bfloat16,
            device=torch.device("cpu") if merge else device,
        )
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        base = resolve(options.pretrained)
        if Path(base).is_dir():
            base = str(Path(base).resolve())
        if merge:
            module.model.merge_and_unload().save_pretrained(folder)
        else:
            module.model.peft_config["default"].base_model_name_or_path = base
            # "auto" takes any regular expression that names lm_head for one that trains it, and saves it whole.
            module.model.save_pretrained(str(folder), save_embedding_layers=False)
        processor.save_pretrained(folder)
        facts = {
            "base": base,
            "merged": merge,
            "prompt_style": data["prompt_style"],
            "image_splitting": data["image_splitting"],
            "image_tokens": 320 if data["image_splitting"] else 64,
            "scores": _scores(checkpoint),
            "steps": checkpoint["global_step"],
            "model": dict(options),
            "data": dict(data),
        }
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        (folder / "idefics_lit.json").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(_card(facts, push_to_hub or output), encoding="utf-8")
    print(f"{'merged model' if merge else 'adapter'} in {output}")
    if not data["image_splitting"]:
        print(f"warning: {SPLITTING_OFF}", file=sys.stderr)
    if push_to_hub:
        print(f"uploaded to {_push(output, push_to_hub)}")


def _push(folder: str, name: str) -> str:
    """Upload a folder to a model repository, private where it is new; return its address."""
    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder)
    except Exception as error:
        raise InputError(
            f"push_to_hub {name}: {first_line(error)}: {folder} is written; log in with `hf auth login`, then "
            f"`hf upload {name} {folder}`"
        ) from error
    return str(repository)


def _scores(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """The best of what the run's checkpoints were chosen by, up to this one."""
    states = checkpoint.get("callbacks", {}).values()
    return {
        state["monitor"]: round(float(state["best_model_score"]), 6)
        for state in states
        if isinstance(state, Mapping) and state.get("monitor") and state.get("best_model_score") is not None
    }


def _card(facts: Mapping[str, Any], name: str) -> str:
    """The model card."""
    merged, base, options = facts["merged"], facts["base"], facts["model"]
    imports, load = MERGED if merged else ADAPTER
    code = LOAD.format(
        imports=imports,
        load=load.format(base=json.dumps(base), name=json.dumps(name)),
        name=json.dumps(name),
        content=CONTENT[facts["prompt_style"]],
        max_new_tokens=options["max_new_tokens"],
    )
    head: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["idefics2", "docvqa", "lora"],
    }
    if not Path(base).is_dir():  # the Hub takes ids alone
        head["base_model"] = base
    scores = "".join(f"- best `{name}` of its run by then: {score:.4f}\n" for name, score in facts["scores"].items())
    splitting = "" if facts["image_splitting"] else f"- {SPLITTING_OFF}\n"
    bits = "4 bits (NF4, double quantization)" if options["quantization"] == "nf4" else "16 or 32 bits"
    config = yaml.safe_dump({"model": options, "data": facts["data"]}, sort_keys=False, allow_unicode=True)
    what = "with a LoRA adapter merged into bfloat16 weights" if merged else "adapter (LoRA, peft)"
    return f"""---
{yaml.safe_dump(head, sort_keys=False)}---

# {Path(name).name}

[Idefics2](https://huggingface.co/HuggingFaceM4/idefics2-8b) {what} for questions about document pages.

- base model: `{base}`; the adapter was trained on it in {bits}
- {facts["steps"]} optimizer steps
{scores}{splitting}
```python
{code}```

Made with idefics_lit, peft {peft.__version__} and transformers {transformers.__version__}, from this config
(`idefics_lit.json` has it too):

```yaml
{config}```
"""


@contextmanager
def _new_folder(path: str) -> Iterator[Path]:
    """Make a folder that appears under its name when all is in it.

    Raises:
        InputError: something is there already, or it can't be written; nothing is left of it then.
    """
    final = Path(path).absolute()
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise InputError(f"output {path} is there already: name a new folder, or empty it")
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if final.exists():
                final.rmdir()
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"output {path} can't be written: {reason}; nothing is left of it: make room") from error
