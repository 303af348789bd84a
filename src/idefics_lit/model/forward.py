"""The forward of Idefics2 in stages: encode images, connect, prefill, decode step.

The stages call transformers' own modules. The vision tower is outside autograd while it is frozen. It processes images
one by one, since padding costs as much as pixels and needs a mask. No stage synchronizes with the GPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from idefics_lit.errors import InputError
from idefics_lit.model.batch import Batch, TokenRows
from idefics_lit.model.cuda_graphs import CALLS_BEFORE_CAPTURE, CudaGraphCache
from idefics_lit.model.feature_cache import FolderCache, MemoryCache
from idefics_lit.model.loading import is_vision_trained
from idefics_lit.model.quiet_imports import peft
from idefics_lit.model.vision import embed_patches, resampler_index, resampler_layer

LONGEST_MULTIPLE = 256  # the longest image's patches are padded to a multiple, for few shapes
# With CUDA graphs to a multiple of 1024, and all patches to one of 1024, or of 1/16 of the next power of two if that is
# more.
PATCHES_MULTIPLE, PATCHES_SHARE = 1024, 16
MAX_PROJECTED_PATCHES = 4096  # at a time: the modality projection's hidden states are twelve times as wide
MAX_CONNECTED_IMAGES = 16  # at a time, in evaluation


class KeyValueCache(Protocol):
    """What transformers' decoder layers call on ``past_key_values``."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Add a layer's keys and values; return those to attend to."""
        ...


class Idefics2Backbone:
    """The forward of Idefics2 with an adapter.

    Shapes: as in `idefics_lit.model.batch`; besides I images and P patches.

    Args:
        model: Idefics2 with an adapter.
        feature_cache: stores the features of images, while the vision tower is frozen.
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
        self.latents = self.connector.perceiver_resampler.n_latents
        if self.dtype != torch.float32:
            # Autocast casts the adapters' inputs in a quarter of the time that peft's own cast takes.
            _disable_adapter_casts(model)
            # If the model's own forward is called directly, there is no autocast.
            base.register_forward_pre_hook(_enable_adapter_casts)
            base.register_forward_hook(_disable_adapter_casts, always_call=True)
        modules = {"encode_images": self.vision_tower, "connect": self.connector, "prefill": self.text_model}
        self._graphs = (
            {stage: CudaGraphCache(getattr(self, f"_{stage}"), module) for stage, module in modules.items()}
            if graphs
            else {}
        )

    @property
    def has_graphs(self) -> bool:
        """Whether the stages run as CUDA graphs in training."""
        return bool(self._graphs)

    def forget_graphs(self) -> None:
        """Free the memory of the CUDA graphs. Call it before the weights move."""
        for graph in self._graphs.values():
            graph.forget()

    def encode_pages(self, batch: Batch) -> list[Tensor]:
        """Return for each row the features of its pages (image tokens, width), the embeddings of its image tokens."""
        counts = [len(row) for row in batch.image_sizes]
        images = [image for row, count in zip(batch.pixel_values, counts, strict=True) for image in row[:count]]
        sizes = [size for row in batch.image_sizes for size in row]
        keys = [key for row in batch.image_keys for key in row]
        features = self.encode_images(images, sizes, keys)
        # In evaluation, with its large batches, connecting all images at once would be the peak of memory.
        chunk = len(features) if torch.is_grad_enabled() else MAX_CONNECTED_IMAGES
        states = [self.connect(features[start : start + chunk]) for start in range(0, len(features), chunk)]
        return [row.flatten(0, 1) for row in torch.cat(states).split(counts)]

    def encode_images(
        self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], keys: Sequence[str]
    ) -> list[Tensor]:
        """Run the vision tower.

        Args:
            images: I of (C, H, W).
            sizes: height and width of each in pixels, without padding.
            keys: a cache key for each.

        Returns:
            For each image its features (P, width) in the model's dtype.
        """
        is_trained = is_vision_trained(self.model)
        if is_trained and self.feature_cache:  # by layers that were unfrozen after the model was loaded
            rank_zero_warn("model.feature_cache: the vision tower is trained, so that no features are kept")
            self.feature_cache = None
        cached = [
            self.feature_cache.get(key, image.device) if self.feature_cache else None
            for key, image in zip(keys, images, strict=True)
        ]
        # Weights and pixels have one dtype: autocast would only cast the norms to float32 and back.
        no_autocast = torch.autocast(images[0].device.type, enabled=False)
        features = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained), no_autocast:
            for image, size, key, encoded in zip(images, sizes, keys, cached, strict=True):
                if encoded is None:
                    patches = embed_patches(self.vision_tower, image.to(self.dtype), *size)
                    # A graph holds the activations of one image, and the backward passes of all follow later.
                    encoded = (self._encode_images(patches) if is_trained else self._run("encode_images", patches))[0]
                    if self.feature_cache:
                        self.feature_cache.put(key, encoded)
                features.append(encoded)
        return features

    def connect(self, features: Sequence[Tensor]) -> Tensor:
        """Project and resample each image's features (P, width) to embeddings of image tokens (I, latents, width)."""
        lengths = [len(patches) for patches in features]
        patches = torch.cat(list(features))
        longest = max(lengths) + -max(lengths) % (PATCHES_MULTIPLE if self._graphs else LONGEST_MULTIPLE)
        if self._graphs:
            multiple = max(PATCHES_MULTIPLE, 2 ** len(patches).bit_length() // PATCHES_SHARE)
            patches = F.pad(patches, (0, 0, 0, -len(patches) % multiple))
        gather_index, attention_mask = resampler_index(lengths, longest, self.latents, patches.device)
        with self.autocast():
            return self._run("connect", patches, gather_index, attention_mask)

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

    def _encode_images(self, patches: Tensor) -> Tensor:
        features: Tensor = self.vision_tower.encoder(inputs_embeds=patches, attention_mask=None).last_hidden_state
        return self.vision_tower.post_layernorm(features)

    def _connect(self, patches: Tensor, gather_index: Tensor, attention_mask: Tensor) -> Tensor:
        resampler = self.connector.perceiver_resampler
        chunks = patches.split(MAX_PROJECTED_PATCHES)
        context = torch.cat([self.connector.modality_projection(chunk) for chunk in chunks])
        latents = resampler.latents.expand(len(gather_index), -1, -1)
        for layer in resampler.layers:
            inputs = (layer, latents, context, gather_index, attention_mask)
            # The inputs of the layers' adapters have a row for each patch. Recomputing them is cheap and saves memory;
            # CUDA graphs can't capture it.
            latents = (
                resampler_layer(*inputs) if self._graphs else checkpoint(resampler_layer, *inputs, use_reentrant=False)
            )
        states: Tensor = resampler.norm(latents)
        return states

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
        window: int | None = self.config.text_config.sliding_window
        return window if window and tokens > window else None


def _enable_adapter_casts(model: torch.nn.Module, *_: object) -> None:
    _set_adapter_casts(model, True)


def _disable_adapter_casts(model: torch.nn.Module, *_: object) -> None:
    _set_adapter_casts(model, False)


def _set_adapter_casts(model: torch.nn.Module, enabled: bool) -> None:
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.cast_input_dtype_enabled = enabled
