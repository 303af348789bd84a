"""A checkpoint's adapter as plain peft reads it, or merged into its base; nothing of this package is needed there."""

import json
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from huggingface_hub import HfApi
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoProcessor, GenerationConfig, ProcessorMixin

from idefics_lit.errors import InputError, first_line
from idefics_lit.model.loading import LoRA, load_model
from idefics_lit.pretrained import load_processor, resolve
from idefics_lit.training.checkpoint import check_hyperparameters, read_checkpoint
from idefics_lit.training.module import Idefics2Module

# Before 5.21 the coordinates of image patches are rounded to the pixels' dtype; 4 can't load the processor.
TRANSFORMERS = "5.21"
LOAD = """\
import torch
from PIL import Image, ImageOps
{imports}
from transformers.utils.versions import require_version

require_version("transformers>={transformers}", "{why}")
{load}
    raise RuntimeError(f"weights are missing or have other names: {{wrong}}")
processor = AutoProcessor.from_pretrained({name})

page = ImageOps.exif_transpose(Image.open("page.png"))  # upright
if page.mode[0] in "IF":
    raise ValueError("more than 8 bits of grey: scale the page to 8, white is 255")
if page.has_transparency_data:  # white paper: the processor would make it black
    page = Image.alpha_composite(Image.new("RGBA", page.size, "white"), page.convert("RGBA"))
content = {content}
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True).strip()
inputs = processor(text=prompt, images=[page], return_tensors="pt").to(model.device, model.dtype)
with torch.no_grad():
    ids = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens={max_new_tokens},
        eos_token_id={eos_token_id},
        bad_words_ids={bad_words_ids},
    )
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
"""
WHY = f"transformers 4 can't read this processor, and before {TRANSFORMERS} image patches are misplaced in 16 bits"
# What peft and transformers only warn of ends the code.
ADAPTER = (
    "from peft import PeftModel\nfrom transformers import AutoModelForImageTextToText, AutoProcessor",
    """\
base, loaded = AutoModelForImageTextToText.from_pretrained(
    {base}, dtype="auto", device_map="auto", output_loading_info=True
)
model = PeftModel.from_pretrained(base, {name}).eval()
adapter = model.load_adapter({name}, "default")
if wrong := [*loaded["missing_keys"], *adapter.missing_keys, *adapter.unexpected_keys]:""",
)
MERGED = (
    "from transformers import AutoModelForImageTextToText, AutoProcessor",
    """\
model, loaded = AutoModelForImageTextToText.from_pretrained(
    {name}, dtype="auto", device_map="auto", output_loading_info=True
)
model = model.eval()
if wrong := [*loaded["missing_keys"], *loaded["unexpected_keys"]]:""",
)
CONTENT = {
    "recipe": '[\n    {"type": "text", "text": "Answer briefly."},\n    {"type": "image"},\n'
    '    {"type": "text", "text": "What is the date?"},\n]',
    "idefics": '[\n    {"type": "image"},\n'
    '    {"type": "text", "text": "What is the date?\\nGive a very brief answer."},\n]',
}
# Weights and configurations, of which a repository may hold another export's: loaders would take both.
EXPORTED = ["adapter_*", "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"]
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
        InputError: there is no checkpoint or it doesn't fit, the processor reads otherwise once it is written, the
            folder isn't empty or can't be written, or the Hub refuses it.
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
            quantization="none" if merge else options.quantization,  # 4 bits would round away what the adapter adds
            lora=LoRA(**options.lora),
            dtype=torch.bfloat16,
            device=torch.device("cpu") if merge else device,
        )
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        base = resolve(options.pretrained)
        local = Path(base).is_dir()
        if local:  # of this machine's folders nothing but a name is for others
            base = str(Path(base).resolve()) if not (merge or push_to_hub) else Path(options.pretrained).resolve().name
        if merge:
            merged = module.model.merge_and_unload()
            merged.generation_config = generation  # a base may come without, and would go on past the answer
            merged.save_pretrained(folder)
        else:
            module.model.peft_config["default"].base_model_name_or_path = base
            # "auto" takes any regular expression that names lm_head for one that trains it, and saves it whole.
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
        card = _card(facts, push_to_hub or output, generation, local=local)
        (folder / "README.md").write_text(card, encoding="utf-8")
        mode = (folder / "README.md").stat().st_mode  # the umask's, where safetensors lets nobody else read
        for file in folder.iterdir():
            file.chmod(mode)
    print(f"{'merged model' if merge else 'adapter'} in {output}")
    if not data["image_splitting"]:
        print(f"warning: {SPLITTING_OFF}", file=sys.stderr)
    if push_to_hub:
        if local and not merge:
            print(
                f"warning: the base model is the local folder {options.pretrained}: put its Hub id in place of "
                f"{base} into README.md and adapter_config.json, or others can't load the adapter",
                file=sys.stderr,
            )
        print(f"uploaded to {_push(output, push_to_hub)}")


def _save_processor(processor: ProcessorMixin, folder: Path) -> None:
    """Write the processor, and check that it reads a prompt and a page as before when it is loaded from there.

    Raises:
        InputError: it doesn't, or can't be loaded.
    """
    tokenizer = processor.tokenizer
    if hasattr(tokenizer, "legacy"):
        # transformers 5 loses it on saving: the text behind an image or a turn would get other ids.
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    for name in ("is_local", "local_files_only"):  # of this machine
        tokenizer.init_kwargs.pop(name, None)
    processor.save_pretrained(folder)
    meant = _read_probe(processor)
    try:
        written = _read_probe(AutoProcessor.from_pretrained(folder, trust_remote_code=False))
        names = sorted(written.keys() | meant.keys())
        differing = [n for n in names if not (n in written and n in meant and torch.equal(written[n], meant[n]))]
        problem = f"reads a prompt otherwise than in training: {', '.join(differing)} differ" if differing else ""
    except Exception as error:
        problem = f"can't be loaded again: {first_line(error)}"
    if problem:
        raise InputError(
            f"output: the processor that transformers {transformers.__version__} has written {problem}; nothing is "
            f"left of it: export with another version of transformers"
        )


def _read_probe(processor: ProcessorMixin) -> Mapping[str, torch.Tensor]:
    """Everything that a processor makes of two prompts, with a page that is scaled down."""
    turns: list[Any] = [
        {"role": "user", "content": [_text("Answer briefly."), {"type": "image"}, _text("What is 12.80 €?")]},
        {"role": "assistant", "content": [_text("007 ½ naïve 日本")]},
        {"role": "user", "content": [_text("  Two\nlines,\ttabs  and {braces}"), {"type": "image"}, _text(" 7 ")]},
    ]
    texts = [str(processor.apply_chat_template(some, add_generation_prompt=True)) for some in (turns, turns[:1])]
    page = Image.linear_gradient("L").resize((1300, 1700))
    read: Mapping[str, torch.Tensor] = processor(
        text=texts, images=[[page, page], [page]], padding=True, return_tensors="pt"
    )
    return read


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _generation_config(processor: ProcessorMixin, max_new_tokens: int) -> GenerationConfig:
    """How answers end, and what they never hold, in training's validations."""
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
    """Options, with a path's last name in place of an absolute path of this machine."""
    if isinstance(value, Mapping):
        return {name: _without_folders(some) for name, some in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(some) for some in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _push(folder: str, name: str) -> str:
    """Upload a folder to a model repository, private where it is new; return its address."""
    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, delete_patterns=EXPORTED)
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


def _card(facts: Mapping[str, Any], name: str, generation: GenerationConfig, *, local: bool) -> str:
    """The model card; ``local`` says that the base is a folder and not on the Hub."""
    merged, base, options = facts["merged"], facts["base"], facts["model"]
    imports, load = MERGED if merged else ADAPTER
    code = LOAD.format(
        imports=imports,
        load=load.format(base=json.dumps(base), name=json.dumps(name)),
        name=json.dumps(name),
        transformers=TRANSFORMERS,
        why=WHY,
        content=CONTENT[facts["prompt_style"]],
        max_new_tokens=generation.max_new_tokens,
        eos_token_id=generation.eos_token_id,
        bad_words_ids=generation.bad_words_ids,
    )
    head: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["idefics2", "docvqa", "lora"],
    }
    if not local:  # the Hub takes ids alone
        head["base_model"] = base
    some = facts["data"]["val_in_fit"]
    on = "" if some is None else f", on {some} of the validation questions"
    scores = "".join(f"- best `{n}` of its run by then{on}: {score:.4f}\n" for n, score in facts["scores"].items())
    where = ", a local folder: others must put its path or Hub id in the code" if local and not merged else ""
    splitting = "" if facts["image_splitting"] else f"- {SPLITTING_OFF}\n"
    bits = "4 bits (NF4, double quantization)" if options["quantization"] == "nf4" else "16 or 32 bits"
    config = yaml.safe_dump({"model": options, "data": facts["data"]}, sort_keys=False, allow_unicode=True)
    what = "with a LoRA adapter merged into bfloat16 weights" if merged else "adapter (LoRA, peft)"
    return f"""---
{yaml.safe_dump(head, sort_keys=False)}---

# {Path(name).name}

[Idefics2](https://huggingface.co/HuggingFaceM4/idefics2-8b) {what} for questions about document pages.

- base model: `{base}`{where}; the adapter was trained on it in {bits}
- needs transformers {TRANSFORMERS} or later: {WHY}
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
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")  # a process id is 1 in every container
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
