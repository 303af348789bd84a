"""Fine-tune Idefics2 with QLoRA to answer questions about document pages, under PyTorch Lightning.

The names below are the public API. Each is imported on first access (PEP 562), so that ``import idefics_lit`` loads
neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idefics_lit.data.collator import Idefics2Collator
    from idefics_lit.data.datamodule import DocVQADataModule
    from idefics_lit.data.example import Example
    from idefics_lit.errors import InputError
    from idefics_lit.metrics import ANLS, anls
    from idefics_lit.model.lora import LoRA
    from idefics_lit.pretrained import load_processor
    from idefics_lit.training.module import Idefics2Module

__all__ = [
    "ANLS",
    "DocVQADataModule",
    "Example",
    "Idefics2Collator",
    "Idefics2Module",
    "InputError",
    "LoRA",
    "anls",
    "load_processor",
]

_MODULES = {
    "ANLS": "metrics",
    "DocVQADataModule": "data.datamodule",
    "Example": "data.example",
    "Idefics2Collator": "data.collator",
    "Idefics2Module": "training.module",
    "InputError": "errors",
    "LoRA": "model.lora",
    "anls": "metrics",
    "load_processor": "pretrained",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
