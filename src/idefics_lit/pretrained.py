"""What ``pretrained`` names, the processor that is loaded from there, and the dtypes that models are loaded in."""

import json
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoProcessor, ProcessorMixin

from idefics_lit.errors import InputError, first_line

# By the Trainer's precision.
DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "32-true": torch.float32}


def resolve(pretrained: str) -> str:
    """Return what ``from_pretrained`` takes.

    Args:
        pretrained: a Hub id; a folder in the Hub's form; or ``tiny``, the small Idefics2 that comes with the package
            and reads the pages that the package draws.
    """
    return str(Path(__file__).parent / "reader") if pretrained == "tiny" else pretrained


def fingerprint(pretrained: str) -> str:
    """Tell a local folder's weights from those that were there before: names, sizes and times of its files."""
    files = sorted(Path(resolve(pretrained)).glob("*.safetensors"))
    return " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def weight_files(pretrained: str, revision: str | None = None) -> list[Path]:
    """Return the files that a model's weights were loaded from: a folder's, or the Hub's cached ones.

    Args:
        pretrained: see `resolve`.
        revision: the Hub's commit that was loaded.
    """

    def find(name: str) -> Path | None:
        folder = Path(resolve(pretrained))
        cached = folder / name if folder.is_dir() else try_to_load_from_cache(pretrained, name, revision=revision)
        return Path(cached) if isinstance(cached, str | Path) and Path(cached).exists() else None

    names = ["model.safetensors"]  # where there are both, it comes before the index
    if find(names[0]) is None and (index := find("model.safetensors.index.json")):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [file for name in names if (file := find(name))]


def load_processor(pretrained: str, *, image_splitting: bool = False, image_size: int | None = None) -> ProcessorMixin:
    """Load Idefics2's processor.

    Args:
        pretrained: see `resolve`.
        image_splitting: four quadrants and the page, 320 image tokens in place of 64. The Hub's file turns it on.
        image_size: scale the longest edge to so many pixels; the processor's own size unless given.

    Raises:
        InputError: when there is no processor, or the size is more than the model was trained for.
    """
    try:
        processor = AutoProcessor.from_pretrained(resolve(pretrained), trust_remote_code=False)
    except Exception as error:
        raise cannot_load("processor", pretrained, error) from error
    images = processor.image_processor
    images.do_image_splitting = image_splitting
    if image_size is not None:
        longest, shortest = images.size["longest_edge"], images.size["shortest_edge"]
        if not 0 < image_size <= longest:
            raise InputError(f"data.image_size {image_size}: choose from 1 to {longest}, what {pretrained} takes")
        images.size = type(images.size)(longest_edge=image_size, shortest_edge=min(shortest, image_size))
    return processor


def cannot_load(what: str, pretrained: str, error: Exception) -> InputError:
    """Turn what ``from_pretrained`` raises into one line with the cure."""
    return InputError(
        f"model.pretrained {pretrained!r}: no {what} can be loaded ({first_line(error)}): give a Hub id or a folder in "
        f"the Hub's form, and check the network"
    )
