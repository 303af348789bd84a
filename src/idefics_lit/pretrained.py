"""What ``pretrained`` names, the processor that is loaded from there, and the dtypes that models are loaded in."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoProcessor, ProcessorMixin

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


def load_processor(pretrained: str, *, image_splitting: bool = False, image_size: int | None = None) -> ProcessorMixin:
    """Load Idefics2's processor.

    Args:
        pretrained: see `resolve`.
        image_splitting: four quadrants and the page, 320 image tokens in place of 64. The Hub's file turns it on.
        image_size: scale the longest edge to so many pixels; the processor's own size unless given.

    Raises:
        InputError: when there is no processor, or the size is more than the model was trained for or less than one of
            its patches.
    """
    try:
        processor = AutoProcessor.from_pretrained(resolve(pretrained), trust_remote_code=False)
    except Exception as error:
        raise cannot_load("processor", pretrained, error) from error
    images = processor.image_processor
    images.do_image_splitting = image_splitting
    if image_size is not None:
        longest, shortest = images.size["longest_edge"], images.size["shortest_edge"]
        try:
            patch = AutoConfig.from_pretrained(resolve(pretrained)).vision_config.patch_size
        except Exception as error:
            raise cannot_load("configuration", pretrained, error) from error
        if not patch <= image_size <= longest:
            raise InputError(f"data.image_size {image_size}: choose from {patch} to {longest}, what {pretrained} takes")
        images.size = type(images.size)(longest_edge=image_size, shortest_edge=min(shortest, image_size))
    return processor


def cannot_load(what: str, pretrained: str, error: Exception) -> InputError:
    """Turn what ``from_pretrained`` raises into one line with the cure."""
    return InputError(
        f"model.pretrained {pretrained!r}: no {what} can be loaded ({first_line(error)}): give a Hub id or a folder in "
        f"the Hub's form, and check the network"
    )
