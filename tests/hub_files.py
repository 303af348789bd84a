"""Folders with the small files of Idefics3-8B, SmolVLM and SmolVLM2 on the Hub and their tokenizers, see the assets."""

import gzip
import json
import shutil
from pathlib import Path

FILES = Path(__file__).parent / "assets" / "idefics3-files"
FAMILY = (  # the 500M models have the files of the 256M ones but for the sizes of the weights
    "Idefics3-8B-Llama3",
    "SmolVLM-Instruct",
    "SmolVLM-256M-Instruct",
    "SmolVLM2-2.2B-Instruct",
    "SmolVLM2-256M-Video-Instruct",
)
IMAGE_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
LLAMA_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def hub_folder(name, folder):
    """Copy a model's small files to a new folder and write its tokenizer; return the folder."""
    shutil.copytree(FILES / name, folder)
    tokenizer = json.loads(gzip.decompress((FILES / "smollm2-tokenizer.json.gz").read_bytes()))
    if name == "SmolVLM-Instruct":
        _keep_special_tokens(tokenizer, IMAGE_TOKENS)
    if name == "Idefics3-8B-Llama3":
        _keep_special_tokens(tokenizer, LLAMA_TOKENS + IMAGE_TOKENS)
        bos = next(token for token in tokenizer["added_tokens"] if token["content"] == LLAMA_TOKENS[0])
        special = {"SpecialToken": {"id": bos["content"], "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                special,
                {"Sequence": {"id": "A", "type_id": 0}},
                special,
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos["content"]: {"id": bos["content"], "ids": [bos["id"]], "tokens": [bos["content"]]}},
        }
        split = {"type": "Split", "pattern": {"Regex": LLAMA_PATTERN}, "behavior": "Isolated", "invert": False}
        bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": IMAGE_TOKENS,
            **dict(zip(("bos_token", "eos_token", "pad_token"), LLAMA_TOKENS, strict=True)),
            "clean_up_tokenization_spaces": True,
            "model_max_length": 131072,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def _keep_special_tokens(tokenizer, names):
    """Keep SmolLM2's own special tokens, the first 17 ids, and add others after the vocabulary."""
    kept = [token for token in tokenizer["added_tokens"] if token["id"] < 17]
    first = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"] = kept + [{**kept[0], "id": first + i, "content": name} for i, name in enumerate(names)]
