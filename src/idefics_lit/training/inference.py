"""Loading Idefics2 with an adapter, and answering questions with it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.errors import InputError
from idefics_lit.evaluation.confidence import confidence
from idefics_lit.model.batch import Batch
from idefics_lit.model.execution import find_device
from idefics_lit.model.lora import ADAPTER, LoRA
from idefics_lit.pretrained import DTYPES, load_processor
from idefics_lit.training.answering import ImageSource, answer_questions
from idefics_lit.training.checkpoint import base_fingerprint, model_fingerprint
from idefics_lit.training.checkpoint_checks import PROMPT_OPTIONS, check_training_options
from idefics_lit.training.options import is_merged, read_training_options
from idefics_lit.training.options_in_effect import options_in_effect
from idefics_lit.training.trained_weights import TrainedWeightsModule
from idefics_lit.utils.distributed import gather_objects

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, ProcessorMixin


class InferenceModule(TrainedWeightsModule):
    """The part of `Idefics2Module` that loads the model and answers questions.

    Args:
        pretrained: the Hub id or folder of the model, which may be a merged one.
        adapter: the folder or Hub id of a saved adapter to start from.
    """

    hparams: Any  # the arguments of Idefics2Module, by name
    temperature: float
    """Temperature of the answers' confidence, see `idefics_lit.evaluation.confidence`: 1, or that of the checkpoint,
    adapter or merged model. Each validation of a fit fits it anew."""

    def __init__(self, pretrained: str, adapter: str | None) -> None:
        super().__init__()
        self.adapter = adapter
        saved = read_training_options(adapter or pretrained)
        self.temperature: float = saved.get("temperature", 1.0)
        self._prompt_options: Mapping[str, Any] = saved.get("datamodule_hyper_parameters", {})  # of its training

    def configure_model(self, model: "PreTrainedModel | PeftModel | None" = None) -> None:
        """Load the processor and the model, onto the Trainer's device or else onto a GPU if there is one.

        The Trainer calls it.

        Args:
            model: an Idefics2 that you loaded, to train instead of the one that ``pretrained`` names: a transformers
                model, which gets a new adapter, or a peft model with a LoRA adapter, which is trained on. The processor
                is that of ``pretrained``.
        """
        if hasattr(self, "model"):
            self._share_cache()
            return
        from idefics_lit.evaluation.evaluator import Evaluator
        from idefics_lit.model.architecture import backbone_class
        from idefics_lit.model.loading import check_vocabulary, load_model
        from idefics_lit.model.open_cache import open_cache

        options = self.hparams
        if (trainer := self.attached_trainer) is not None:
            device, precision = trainer.strategy.root_device, str(trainer.precision)
        elif torch.cuda.is_available():
            device, precision = torch.device("cuda"), "bf16-mixed"
        else:
            device, precision = torch.device("cpu"), "32-true"
        if precision not in DTYPES:
            reason = ", since steps of an adapter in 16 bits are rounded away" if precision.endswith("16-true") else ""
            raise InputError(f"trainer.precision {precision}: choose one of {', '.join(DTYPES)}{reason}")
        self.processor = self.load_processor()
        if model is not None:
            self.base_fingerprint = model_fingerprint(model)
            config: Any = getattr(model, "peft_config", {}).get(ADAPTER)
            if getattr(config, "peft_type", None) == "LORA":  # load_model refuses others
                options.lora = asdict(LoRA.from_peft(config))
        own_trainer = trainer if trainer is not None and trainer.lightning_module is self else None
        data = getattr(own_trainer, "datamodule", None)
        found = find_device(device)
        self.devices = gather_objects(own_trainer, found) if own_trainer else [found]
        if options.quantization != "none" and is_merged(options.pretrained):
            rank_zero_warn(
                f"model.pretrained {options.pretrained!r} is a merged model, whose answers 4 bits change: give "
                f"--model.quantization none."
            )
        with torch.device("cpu"):  # Lightning has made the model's device the default one
            options = self.options = options_in_effect(options, self.devices, precision, own_trainer, data)
        if own_trainer is not None and own_trainer.training and isinstance(data, DocVQADataModule):
            data.start_workers("train")
        self.model = load_model(
            options.pretrained,
            quantization=options.quantization,
            quantize_vision=options.quantize_vision,
            dequantize=options.dequantize,
            lora=LoRA(**options.lora),
            adapter=self.adapter,
            dtype=DTYPES[precision],
            device=device,
            gradient_checkpointing=options.gradient_checkpointing,
            compiled=options.compile,
            prepare_base=self.prepare_base,
            model=model,
        )
        trained_with = read_training_options(self.adapter or options.pretrained)
        if self.adapter is None:
            trained_with.pop("hyper_parameters", None)  # of a merged model, whose new adapter has others
        check_training_options(trained_with, self, trainer)
        base = self.model.get_base_model()
        architecture, cache = backbone_class(base.config), None
        if options.feature_cache != "off":
            cache = open_cache(options, architecture.feature_modules(base), DTYPES[precision])
        self.backbone = architecture(self.model, cache, graphs=options.cuda_graphs and device.type == "cuda")
        self.evaluator = Evaluator(
            self.backbone, self.processor, max_new_tokens=options.max_new_tokens, strip_period=options.strip_period
        )
        check_vocabulary(options.pretrained, self.processor, self.model)
        self._share_cache()

    def _share_cache(self) -> None:
        """Let the data module's workers know which pages are cached."""
        trainer = self.attached_trainer
        data = getattr(trainer, "datamodule", None) if trainer and trainer.lightning_module is self else None
        if isinstance(data, DocVQADataModule) and data.loader_cache and self.backbone.feature_cache:
            data.loader_cache.share(self.backbone.feature_cache.loader_get)

    def load_processor(self, **options: Any) -> "ProcessorMixin":  # noqa: ANN401
        """Return the processor; override it to add tokens.

        Args:
            options: ``image_splitting`` and ``image_size`` of `idefics_lit.load_processor`.
        """
        return load_processor(self.hparams.pretrained, **options)

    def prepare_base(self, model: "PreTrainedModel") -> None:
        """Change the base model before the adapter is added, such as its number of tokens; nothing by default.

        Weights that this adds are in checkpoints only if they are trained: name them in ``LoRA.options``.
        """

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits (R, T, V) of a batch."""
        return self.backbone.logits(self.backbone.prefill(batch, self.encode_pages(batch)))

    def encode_pages(self, batch: Batch) -> list[Tensor]:
        """Return the image features (image tokens, width) of each row of a batch."""
        return self.backbone.encode_pages(batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy summed over a batch's supervised tokens, and their number; both 0-d."""
        return self.backbone.loss(batch, self.backbone.prefill(batch, self.encode_pages(batch)))

    def answer(
        self,
        images: ImageSource | Sequence[ImageSource],
        questions: str | Sequence[str],
        *,
        batch_size: int = 8,
        return_confidence: bool = False,
        **options: Any,  # noqa: ANN401
    ) -> list[Any]:
        """Answer questions about page images greedily, on the device that the module is on.

        Loads the model if necessary. Gradients and dropout are off, whatever mode the module is in.

        Args:
            images: a page or several: PIL images, or paths of image files or PDFs with one page.
            questions: a question or several. One image is combined with every question and one question with every
                image; several images and several questions are paired in order.
            batch_size: questions in a batch; those about the same image share its computation.
            return_confidence: return pairs of an answer and its confidence, from 0 to 1: its probability under the
                model, calibrated with ``temperature`` (see `idefics_lit.evaluation.confidence`).
            options: further arguments of `collator`.

        Returns:
            The answers, in order.

        Raises:
            InputError: there are no images or questions, their numbers differ, or an image can't be read.
        """
        pairs = answer_questions(self, images, questions, batch_size, self.collator(train=False, **options))
        return pairs if return_confidence else [text for text, _ in pairs]

    def collator(self, *, train: bool, **options: Any) -> Idefics2Collator:  # noqa: ANN401
        """Return a collator for this module, to be used as ``collate_fn`` of a DataLoader.

        Args:
            train: see `Idefics2Collator`.
            options: further arguments of `Idefics2Collator`, and ``image_splitting`` and ``image_size`` of
                `load_processor`. The prompt style and the image options default to those that the module was trained
                with, if it was loaded from a checkpoint or an export, or trained with a data module.
        """
        data = getattr(self.attached_trainer, "datamodule", None)
        trained_with = data.hparams if isinstance(data, LightningDataModule) else self._prompt_options
        options = {**{name: trained_with[name] for name in PROMPT_OPTIONS if name in trained_with}, **options}
        image_options = {name: options.pop(name) for name in ("image_splitting", "image_size") if name in options}
        return Idefics2Collator(self.load_processor(**image_options), train=train, **options)

    def generate(self, batch: Batch) -> list[str]:
        """Return the B greedy answers to a batch's prompts, without dropout, whatever mode the module is in."""
        return [text for text, _ in self.generate_with_confidence(batch)]

    def generate_with_confidence(self, batch: Batch) -> list[tuple[str, float]]:
        """Return what `generate` returns, each answer with its confidence, see `answer`."""
        decoded = self.evaluator.decode(batch)
        confidences = (confidence(value, self.temperature) for value in decoded.log_probabilities)
        return list(zip(decoded.texts, confidences, strict=True))

    @cached_property
    def base_fingerprint(self) -> dict[str, Any]:
        """What identifies the base model, see `idefics_lit.training.checkpoint.base_fingerprint`."""
        return base_fingerprint(self.hparams.pretrained)
