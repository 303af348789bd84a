"""The forward in stages that all architectures share: embed, prefill, decode step, loss.

How images become the embeddings of image tokens is in `idefics_lit.model.idefics2` and `idefics_lit.model.idefics3`.
The stages call transformers' own modules. The vision tower is outside autograd while it is frozen. No stage
synchronizes with the GPU.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from idefics_lit.errors import InputError
from idefics_lit.model.adapter import is_trained, set_input_casts
from idefics_lit.model.batch import Batch, TokenRows
from idefics_lit.model.cuda_graphs import CALLS_BEFORE_CAPTURE, CudaGraphCache
from idefics_lit.model.feature_cache import FolderCache, MemoryCache
from idefics_lit.model.memory import Peaks
from idefics_lit.model.packed_attention import use_packed_attention, without_page
from idefics_lit.model.patches import embed_patches
from idefics_lit.model.quiet_imports import peft


class KeyValueCache(Protocol):
    """What transformers' decoder layers call on ``past_key_values``."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Add a layer's keys and values; return those to attend to."""
        ...


class Backbone(ABC):
    """The forward of a model with an adapter. A subclass for each architecture encodes the images.

    Shapes: as in `idefics_lit.model.batch`; besides I images and P patches.

    Args:
        model: the model with an adapter.
        feature_cache: stores the features of images, while the modules that compute them are frozen.
        graphs: train with CUDA graphs.
    """

    calls_before_capture = CALLS_BEFORE_CAPTURE
    """Calls of a stage with a shape that run without a graph."""

    def __init__(
        self, model: peft.PeftModel, feature_cache: MemoryCache | FolderCache | None = None, *, graphs: bool = False
    ) -> None:
        base: Any = model.get_base_model()
        self.model, self.feature_cache = model, feature_cache
        self.config, self.dtype = base.config, base.dtype
        self.vision_tower, self.connector = base.model.vision_model, base.model.connector
        self.text_model = base.model.text_model
        self.lm_head, self.embeddings = base.lm_head, base.get_input_embeddings()
        self.cached_modules = self.feature_modules(base)
        self._can_mask_questions_alone = use_packed_attention(self.text_model)
        if self.dtype != torch.float32:
            # Autocast casts the adapters' inputs in a quarter of the time that peft's own cast takes.
            set_input_casts(False, model)
            # If the model's own forward is called directly, there is no autocast.
            base.register_forward_pre_hook(partial(set_input_casts, True))
            base.register_forward_hook(partial(set_input_casts, False), always_call=True)
        self._graphs = (
            {name: CudaGraphCache(getattr(self, f"_{name}"), module) for name, module in self.graph_stages().items()}
            if graphs
            else {}
        )

    # What differs between architectures

    peaks: ClassVar[Peaks]
    """Its memory in training."""

    @abstractmethod
    def encode_pages(self, batch: Batch) -> list[Tensor]:
        """Return for each row the embeddings of its image tokens (image tokens, width), in their order."""

    @abstractmethod
    def graph_stages(self) -> Mapping[str, nn.Module]:
        """Return the stages that run as CUDA graphs, by the name of their method, with the module of each."""

    @staticmethod
    @abstractmethod
    def feature_modules(base: Any) -> Mapping[str, nn.Module]:  # noqa: ANN401
        """Return the frozen modules of a base model that the feature cache stores the output of, by name."""

    @staticmethod
    @abstractmethod
    def compiled_modules(base: Any) -> Sequence[nn.Module]:  # noqa: ANN401
        """Return the modules of a base model that are compiled."""

    # What they share

    @property
    def has_graphs(self) -> bool:
        """Whether the stages run as CUDA graphs in training."""
        return bool(self._graphs)

    @property
    def eos_token_ids(self) -> set[int]:
        """The end-of-sequence tokens of the model's ``generation_config``."""
        base: Any = self.model.get_base_model()
        ids = base.generation_config.eos_token_id if base.can_generate() else None
        return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)

    def forget_graphs(self) -> None:
        """Free the memory of the CUDA graphs. Call it before the weights move."""
        for graph in self._graphs.values():
            graph.forget()

    def embed(self, input_ids: Tensor, pages: Sequence[Tensor]) -> Tensor:
        """Embed tokens.

        Args:
            input_ids: (R, T).
            pages: for each row the embeddings of its image tokens, from `encode_pages`.

        Returns:
            (R, T, width).
        """
        embeddings, is_image = self.embeddings(input_ids), input_ids == self.config.image_token_id
        features = torch.cat(list(pages)).to(embeddings.dtype)
        # The index of each token among the image tokens. The gradient of masked_scatter would synchronize with the GPU.
        gather_index = is_image.flatten().cumsum(0).sub(1).clamp(min=0)
        return torch.where(is_image[..., None], features.index_select(0, gather_index).view_as(embeddings), embeddings)

    def prefill(self, tokens: TokenRows, pages: Sequence[Tensor], cache: KeyValueCache | None = None) -> Tensor:
        """Run the text model over rows of tokens.

        Args:
            tokens: the rows.
            pages: for each row the embeddings of its image tokens, from `encode_pages`.
            cache: stores keys and values for `decode_step`.

        Returns:
            The last hidden states (R, T, width).

        Raises:
            InputError: a question is longer than the text model's maximum.
        """
        ids, positions = tokens.input_ids, tokens.position_ids
        if positions is None:
            self.check_length(ids.shape[1])
            positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        elif ids.shape[1] > self.config.text_config.max_position_embeddings:
            self.check_length(int(positions.max()) + 1)  # a packed row may be longer than any of its questions
        # Without packed rows attention is causal and needs no mask, since padding is on the right.
        mask = tokens.packed_attention_mask
        if window := self._sliding_window(ids.shape[1]):
            causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
            near = positions[:, None, :, None] - positions[:, None, None] < window
            mask = near & (causal if mask is None else mask)
        elif mask is not None and self._can_mask_questions_alone:
            mask = without_page(mask, tokens.page_tokens)
        embeddings = self.embed(ids, pages)
        with self.autocast():
            if cache is not None:
                return self._prefill(embeddings, positions, mask, cache)
            return self._run("prefill", embeddings, positions, *([] if mask is None else [mask]))

    def decode_step(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor, cache: KeyValueCache) -> Tensor:
        """Run the text model over one more token of each of B prompts.

        Args:
            tokens: (B).
            positions: (B), their position ids.
            attention_mask: (B, L), True for the cache's tokens to attend to, the new ones included.
            cache: keys and values of L tokens; the new ones are added.

        Returns:
            The last hidden states (B, width).
        """
        if window := self._sliding_window(attention_mask.shape[1]):
            attention_mask = attention_mask & (positions[:, None] - (attention_mask.cumsum(1) - 1) < window)
        with self.autocast():
            embeddings = self.embeddings(tokens[:, None])
            return self._prefill(embeddings, positions[:, None], attention_mask[:, None, None], cache)[:, 0]

    def loss(self, tokens: TokenRows, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy summed over the supervised tokens, and their number; both 0-d.

        Args:
            tokens: the rows.
            hidden: their last hidden states, from `prefill`.
        """
        # Logits of supervised positions only: those of all tokens would be the step's largest tensor.
        logits = self.logits(hidden.flatten(0, 1).index_select(0, tokens.supervised_positions))
        labels = tokens.labels.flatten()[tokens.supervised_positions + 1]
        count = torch.full((), len(labels), device=labels.device)
        return F.cross_entropy(logits.float(), labels, reduction="sum"), count

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the next token (..., V) for hidden states (..., width)."""
        with self.autocast():
            logits: Tensor = self.lm_head(hidden)
        return logits

    def check_length(self, tokens: int) -> None:
        """Raise InputError if a sequence of ``tokens`` tokens is longer than the text model's maximum."""
        limit = self.config.text_config.max_position_embeddings
        if tokens > limit:
            raise InputError(
                f"a batch of {tokens} tokens, but {self.config.name_or_path} takes {limit}: lower data.max_length; "
                f"the error then names the question that is too long"
            )

    def autocast(self) -> torch.autocast:
        """Return autocast to the model's dtype, for the adapter's float32 weights; disabled for float32 models."""
        is_half = self.dtype != torch.float32
        return torch.autocast(self.lm_head.weight.device.type, self.dtype if is_half else None, is_half)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Disable dropout and gradients; each module's mode is restored afterwards."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    def _run(self, stage: str, *arguments: Tensor) -> Tensor:
        use_graph = self._graphs and self.model.training
        if use_graph:
            return self._graphs[stage].replay(*arguments, calls_before_capture=self.calls_before_capture)
        result: Tensor = getattr(self, f"_{stage}")(*arguments)
        return result

    def _cached(
        self,
        keys: Sequence[str],
        device: torch.device,
        encode: Callable[[list[int]], Sequence[Tensor]],
        loaded: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """Return the features of each key from the cache; compute and store those that it lacks.

        Args:
            keys: the cache keys.
            device: of the features.
            encode: returns the features of the keys with the given indices, of at least one.
            loaded: `Batch.loaded_features`.
        """
        trained = next((name for name, module in self.cached_modules.items() if is_trained(module)), None)
        if trained and self.feature_cache:  # by layers that were unfrozen after the model was loaded
            rank_zero_warn(f"model.feature_cache: the {trained} is trained, so that no features are kept")
            self.feature_cache = None
        cache = self.feature_cache
        loaded = {key: features for key, features in loaded.items() if features.numel()} if cache else {}
        cached = [loaded[key] if key in loaded else cache.get(key, device) if cache else None for key in keys]
        missing = [i for i, features in enumerate(cached) if features is None]
        encoded = dict(zip(missing, encode(missing) if missing else (), strict=True))
        if cache:
            for i, features in encoded.items():
                cache.put(keys[i], features)
        return [encoded[i] if features is None else features for i, features in enumerate(cached)]

    def _encode(self, images: Tensor, height: int, width: int) -> Tensor:
        """Return the vision tower's features (I, P, width) of images (I, C, H, W) of one size, without padding."""
        is_vision_trained = is_trained(self.vision_tower)
        if not height:
            raise InputError(
                "model.feature_cache: the loader left out pages since their features were cached, but the cache is off "
                "now, as when a callback unfreezes the vision tower: leave the option out"
            )
        # Weights and pixels have one dtype: autocast would only cast the norms to float32 and back.
        no_autocast = torch.autocast(images.device.type, enabled=False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_vision_trained), no_autocast:
            patches = embed_patches(self.vision_tower, images.to(self.dtype), height, width)
            # A graph holds the activations of one call, and the backward passes of all calls follow later.
            return self._encode_images(patches) if is_vision_trained else self._run("encode_images", patches)

    def _encode_images(self, patches: Tensor) -> Tensor:
        """Run the vision tower over patch embeddings (I, P, width)."""
        features: Tensor = self.vision_tower.encoder(inputs_embeds=patches, attention_mask=None).last_hidden_state
        return self.vision_tower.post_layernorm(features)

    def _prefill(
        self, embeddings: Tensor, positions: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        hidden, rotary_embedding = embeddings, self.text_model.rotary_emb(embeddings, position_ids=positions)
        for layer in self.text_model.layers:
            # Positional arguments: the name of the cache's parameter differs between versions of transformers.
            hidden = layer(hidden, mask, None, cache, position_embeddings=rotary_embedding)
        states: Tensor = self.text_model.norm(hidden)
        return states

    def _sliding_window(self, tokens: int) -> int | None:
        """Return the text model's sliding window if a sequence of ``tokens`` tokens is longer."""
        window: int | None = getattr(self.config.text_config, "sliding_window", None)  # Llama's has none
        return window if window and tokens > window else None
