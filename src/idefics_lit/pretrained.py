"""Find pretrained models and load their processors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers.utils.peft_utils import find_adapter_config_file

from idefics_lit.errors import InputError, first_line
from idefics_lit.utils.hub import prepare_hub

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin

# The model's dtype for each precision of the Trainer.
DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "32-true": torch.float32}

MAX_TILES = 6  # of an edge: the model was trained with tags for so many


def resolve(pretrained: str) -> str:
    """Return the argument for ``from_pretrained``; without a network, the Hub's files are read from the cache.

    Args:
        pretrained: a Hub id; a folder in the Hub's form; or "tiny", the small Idefics2 that comes with the package and
            is trained on the pages that the package draws.
    """
    if pretrained == "tiny":
        return str(Path(__file__).parent / "model" / "reader")
    prepare_hub(pretrained)
    return pretrained


def refuse_adapter(pretrained: str) -> None:
    """Raise if ``pretrained`` is an adapter, of which transformers would load only the base.

    Raises:
        InputError: it is an adapter, or holds an adapter and a model; the message names the adapter's base.
    """
    try:
        file = find_adapter_config_file(resolve(pretrained))
    except Exception:  # neither a folder nor a Hub id: loading raises an error that says so
        return
    if file is None:
        return
    try:
        base = json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        base = None
    if Path(file).with_name("config.json").is_file():
        raise InputError(
            f"model.pretrained {pretrained!r} holds a model and an adapter (adapter_config.json, on {base}): "
            f"move the files of one of them away"
        )
    raise InputError(
        f"model.pretrained {pretrained!r} is an adapter (adapter_config.json) on the model {base}: give "
        f"--model.pretrained {base} --model.adapter {pretrained}"
    )


def weight_files(pretrained: str, revision: str | None = None) -> list[Path]:
    """Return the files that a model's weights were loaded from, in a folder or in the Hub's cache.

    Args:
        pretrained: see `resolve`.
        revision: the commit that was loaded from the Hub.
    """

    def find(name: str) -> Path | None:
        folder = Path(resolve(pretrained))
        cached = folder / name if folder.is_dir() else try_to_load_from_cache(pretrained, name, revision=revision)
        return Path(cached) if isinstance(cached, str | Path) and Path(cached).exists() else None

    names = ["model.safetensors"]  # which takes precedence over the index
    if find(names[0]) is None and (index := find("model.safetensors.index.json")):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [file for name in names if (file := find(name))]


def load_config(pretrained: str) -> "PretrainedConfig":
    """Load a model's configuration.

    Args:
        pretrained: see `resolve`.

    Raises:
        InputError: there is none.
    """
    try:
        return transformers.AutoConfig.from_pretrained(resolve(pretrained), trust_remote_code=False)
    except Exception as error:
        raise cannot_load("configuration", pretrained, error) from error


def load_processor(
    pretrained: str, *, image_splitting: bool | None = None, image_size: int | None = None
) -> "ProcessorMixin":
    """Load the processor of Idefics2, Idefics3 or SmolVLM.

    Args:
        pretrained: see `resolve`.
        image_splitting: pass each page as several images. Idefics2: its four quadrants and the page, 320 image tokens
            instead of 64; off by default, though the Hub's configuration turns it on. Idefics3 and SmolVLM: tiles and
            the page; on by default, since without it a page is squeezed into one small square.
        image_size: scale the longest edge to this number of pixels; the processor's own size by default. A multiple of
            the tile for Idefics3 and SmolVLM.

    Raises:
        InputError: there is no processor, ``pretrained`` is an adapter, a package is missing that the processor needs,
            or the processor doesn't take the size.
    """
    refuse_adapter(pretrained)
    try:
        with quiet_transformers():  # it warns about the form of the Hub's files
            processor = transformers.AutoProcessor.from_pretrained(resolve(pretrained), trust_remote_code=False)
            if isinstance(processor.tokenizer, transformers.GPT2Tokenizer):
                # SmolVLM's files name this class, which drops the split into digits that tokenizer.json has.
                processor.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(resolve(pretrained))
    except ImportError as error:
        if "num2words" in str(error):
            raise InputError(f"model.pretrained {pretrained!r}: its processor needs `pip install num2words`") from error
        raise cannot_load("processor", pretrained, error) from error
    except Exception as error:
        raise cannot_load("processor", pretrained, error) from error
    processor.tokenizer.clean_up_tokenization_spaces = False  # Idefics3-8B's would strip spaces before punctuation
    images = processor.image_processor
    images.do_image_splitting = has_tiles(images) if image_splitting is None else image_splitting
    if image_size is not None:
        _set_image_size(images, pretrained, image_size)
    return processor


def _set_image_size(images: Any, pretrained: str, image_size: int) -> None:  # noqa: ANN401
    size = images.size
    if has_tiles(images):
        tile = images.max_image_size["longest_edge"]
        if image_size % tile or not tile <= image_size <= MAX_TILES * tile:
            sizes = ", ".join(str(count * tile) for count in range(1, MAX_TILES + 1))
            raise InputError(f"data.image_size {image_size}: choose from {sizes}, the sizes that {pretrained} takes")
        images.size = type(size)(longest_edge=image_size)
        return
    longest, shortest = size["longest_edge"], size["shortest_edge"]
    patch = load_config(pretrained).vision_config.patch_size
    if not patch <= image_size <= longest:
        raise InputError(
            f"data.image_size {image_size}: choose from {patch} to {longest}, the sizes that {pretrained} takes"
        )
    images.size = type(size)(longest_edge=image_size, shortest_edge=min(shortest, image_size))


def has_tiles(image_processor: Any) -> bool:  # noqa: ANN401
    """Whether pages are cut into tiles of one size, as by Idefics3's and SmolVLM's processors, but not Idefics2's."""
    return hasattr(image_processor, "max_image_size")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def cannot_load(what: str, pretrained: str, error: Exception) -> InputError:
    """Return an InputError for an exception of ``from_pretrained``, in one line with the cure."""
    return InputError(
        f"model.pretrained {pretrained!r}: no {what} can be loaded ({first_line(error)}): give a Hub id or a folder in "
        f"the Hub's form, and check the network"
    )
