"""The model card of an export, with the code that loads it and answers a question."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
import yaml
from transformers import GenerationConfig, ProcessorMixin

from idefics_lit.data.image_tokens import tokens_per_image
from idefics_lit.model.lora import unquantized_modules
from idefics_lit.model.quiet_imports import peft
from idefics_lit.pretrained import has_tiles

# transformers before 5.21 rounds the coordinates of image patches to the dtype of the pixels; version 4 can't load the
# processor.
MIN_TRANSFORMERS = "5.21"
CODE = """\
import numpy as np
import torch
from PIL import Image, ImageOps
{imports}
from transformers.utils.versions import require_version

require_version("transformers>={transformers}", "{reason}")
{load}
    raise RuntimeError(f"weights are missing or have other names: {{wrong}}")
processor = AutoProcessor.from_pretrained({name})


def open_page(path):  # an image; render a PDF's pages to images first, with 2200 pixels on the longest edge
    image = Image.open(open(path, "rb"))  # given a path, Pillow misplaces the pixels of a turned TIFF
    page = ImageOps.exif_transpose(image)  # upright
    if page.mode[0] in "IF":  # grey of more than 8 bits; white is the largest value of 8, 10, ... bits, or 1
        values = np.asarray(page, dtype=np.float32)
        scales = (1, *(2**bits - 1 for bits in (8, 10, 12, 14, 16)), 2**31)
        white = next(scale for scale in scales if values.max() <= scale)
        page = Image.fromarray((values.clip(0) * (255 / white) + 0.5).astype(np.uint8))
        if getattr(image, "tag_v2", {{}}).get(262) == 0:  # a TIFF in which 0 is white
            page = ImageOps.invert(page)
    if page.has_transparency_data:  # white paper: the processor would make it black
        page = Image.alpha_composite(Image.new("RGBA", page.size, "white"), page.convert("RGBA"))
    return page.convert("RGB")


pages = [open_page("page.png")]  # one or several pages of a document
content = {content}
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True).strip()
adds_bos = not prompt.startswith(processor.tokenizer.bos_token)  # or the template has it
inputs = processor(text=prompt, images=[pages], add_special_tokens=adds_bos, return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)
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
REASON = (
    f"transformers 4 can't read this processor, and before {MIN_TRANSFORMERS} image patches are misplaced in 16 bits"
)
# Imports, and the code that loads the model. It raises where peft and transformers only warn of missing weights.
ADAPTER = (
    "from peft import PeftModel\nfrom transformers import AutoModelForImageTextToText, AutoProcessor{config}",
    """\
{nf4}base, loaded = AutoModelForImageTextToText.from_pretrained(
    {base}, dtype="auto", device_map="auto",{options} output_loading_info=True
)
model = PeftModel.from_pretrained(base, {name}).eval()
adapter = model.load_adapter({name}, "default")
if wrong := [*loaded["missing_keys"], *adapter.missing_keys, *adapter.unexpected_keys]:""",
)
# The 4-bit base model of the training, see `idefics_lit.model.loading`.
NF4 = """\
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    llm_int8_skip_modules={skipped},
)
"""
MERGED = (
    "from transformers import AutoModelForImageTextToText, AutoProcessor",
    """\
model, loaded = AutoModelForImageTextToText.from_pretrained(
    {name}, dtype="auto", device_map="auto", output_loading_info=True
)
model = model.eval()
if wrong := [*loaded["missing_keys"], *loaded["unexpected_keys"]]:""",
)
# The message of a question, by prompt style.
CONTENT = {
    "recipe": '[\n    {"type": "text", "text": "Answer briefly."},\n    *[{"type": "image"} for _ in pages],\n'
    '    {"type": "text", "text": "What is the date?"},\n]',
    "idefics": '[\n    *[{"type": "image"} for _ in pages],\n'
    '    {"type": "text", "text": "What is the date?\\nGive a very brief answer."},\n]',
}


def splitting_off(processor: ProcessorMixin) -> str:
    """Return what a server must know of an adapter that was trained with image splitting off."""
    text = (
        f"the adapter was trained with image splitting off, {tokens_per_image(processor)} image tokens a page, and the "
        f"saved processor has it off; "
    )
    if has_tiles(processor.image_processor):
        return f"{text}vLLM can't serve it: it counts no image for a page without tiles (vllm-project/vllm#48667)"
    return f"{text}whoever loads the Hub's processor instead splits images, 320 tokens"


def servers(processor: ProcessorMixin) -> str:
    """Return which servers take a merged model."""
    serve = "`transformers serve` serves the merged model through an OpenAI-style API"
    if has_tiles(processor.image_processor):
        return f"{serve}; vLLM takes its architecture too, with image splitting on and a whole number of tiles an edge"
    return f"{serve}; vLLM, SGLang and TGI don't take Idefics2"


def model_card(
    facts: Mapping[str, Any],
    name: str,
    generation: GenerationConfig,
    processor: ProcessorMixin,
    *,
    base: str,
    local_base: bool,
    merged: str | None,
) -> str:
    """Return the model card (README.md) of an export.

    Args:
        facts: the content of ``idefics_lit.json``.
        name: the Hub id or folder of the export.
        generation: ends answers as in validation.
        processor: the processor of the training.
        base: the Hub id or folder of the base model that the code loads.
        local_base: whether the base model is a local folder.
        merged: None for an adapter; else which weights it was merged into, or nothing.
    """
    options = facts["model"]
    imports, load = ADAPTER if merged is None else MERGED
    nf4 = merged is None and options["quantization"] == "nf4"
    skipped = unquantized_modules(quantize_vision=options["quantize_vision"])
    code = CODE.format(
        imports=imports.format(config=", BitsAndBytesConfig" if nf4 else ""),
        load=load.format(
            base=json.dumps(base),
            name=json.dumps(name),
            nf4=NF4.format(skipped=json.dumps(list(skipped))) if nf4 else "",
            options=" quantization_config=nf4," if nf4 else "",
        ),
        name=json.dumps(name),
        transformers=MIN_TRANSFORMERS,
        reason=REASON,
        content=CONTENT[facts["prompt_style"]],
        max_new_tokens=generation.max_new_tokens,
        eos_token_id=generation.eos_token_id,
        bad_words_ids=generation.bad_words_ids,
    )
    metadata: dict[str, Any] = {
        "library_name": "peft" if merged is None else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": [facts["model_type"], "docvqa", "lora"],
    }
    if not local_base:  # the Hub only accepts ids of models
        metadata["base_model"] = base
    val_in_fit = facts["data"].get("val_in_fit")
    subset = "" if val_in_fit is None else f", on {val_in_fit} of the validation questions"
    scores = "".join(
        f"- best `{metric}` of its run by then{subset}: {score:.4f}\n" for metric, score in facts["scores"].items()
    )
    hint = ", a local folder: others must put its path or Hub id in the code" if local_base and merged is None else ""
    steps = f"- {facts['steps']} optimizer steps\n" if facts["steps"] else ""
    splitting = "" if facts["image_splitting"] else f"- {splitting_off(processor)}\n"
    package = "- needs `pip install num2words`\n" if "SmolVLM" in type(processor).__name__ else ""
    bits = "4 bits (NF4, double quantization)" if options["quantization"] == "nf4" else "16 or 32 bits"
    config = yaml.safe_dump({"model": options, "data": facts["data"]}, sort_keys=False, allow_unicode=True)
    kind = (
        "An adapter (LoRA, peft)" if merged is None else "A model with a LoRA adapter merged into its bfloat16 weights,"
    )
    details = "".join(f"- {line}\n" for line in ([] if merged is None else [merged, servers(processor)]) if line)
    link = f"`{facts['base']}`" if local_base else f"[{base}](https://huggingface.co/{base})"
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False)}---

# {Path(name).name}

{kind} for questions about document pages.

- base model: {link}{hint}; the adapter was trained on it in {bits}
- needs transformers {MIN_TRANSFORMERS} or later: {REASON}
{package}{details}{steps}{scores}{splitting}
```python
{code}```

Made with idefics_lit, peft {peft.__version__} and transformers {transformers.__version__}, from this config
(`idefics_lit.json` has it too):

```yaml
{config}```
"""
