"""Idefics2's forward in its parts: pages are looked at once, whatever then reads them.

The parts are transformers' own modules; only their order is here. The vision tower stays out of autograd where it is
frozen. Pages go through it one by one, unpadded: padding costs as much as pages do, and a mask more. Nothing here waits
for the GPU, so that the GPU never waits either.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from idefics_lit.errors import InputError
from idefics_lit.model.cuda_graphs import CudaGraphCache
from idefics_lit.model.feature_cache import FolderCache, MemoryCache
from idefics_lit.model.loading import is_vision_trained

# Patches of the largest image and, for graphs, of all are filled up to multiples: few shapes for all pages.
MULTIPLES = (1024, 256)
SHARE = 16  # where there are many, to such a part of the next power of two
CHUNK = 4096  # patches that are projected at a time
MOST_IMAGES = 16  # that are connected at a time, in evaluation


class Idefics2Backbone:
    """The forward of Idefics2 with an adapter, for batches of `idefics_lit.data.collator.Idefics2Collator`.

    Shapes: R rows of T tokens, I images, H and W pixels, P patches.

    Args:
        model: Idefics2 with an adapter.
        cache: where an image's features are taken from, and kept; only for a vision tower that is frozen.
        graphs: train with CUDA graphs.
    """

    def __init__(
        self, model: PeftModel, cache: MemoryCache | FolderCache | None = None, *, graphs: bool = False
    ) -> None:
        base: Any = model.get_base_model()
        self.model, self.cache = model, cache
        self.config, self.dtype = base.config, base.dtype
        self.tower, self.connector, self.text_model = (
            base.model.vision_model,
            base.model.connector,
            base.model.text_model,
        )
        self.head, self.embeddings = base.lm_head, base.get_input_embeddings()
        self.latents = self.connector.perceiver_resampler.n_latents
        if self.dtype != torch.float32:
            # Autocast casts the adapters' inputs in a quarter of the time that peft's own cast takes.
            _disable_adapter_casts(model)
            # If the model's own forward is called directly, there is no autocast.
            base.register_forward_pre_hook(_enable_adapter_casts)
            base.register_forward_hook(_disable_adapter_casts, always_call=True)
        parts = {"encode_images": self.tower, "connect": self.connector, "prefill": self.text_model}
        self._graphs = (
            {name: CudaGraphCache(getattr(self, f"_{name}"), part) for name, part in parts.items()} if graphs else {}
        )

    @property
    def has_graphs(self) -> bool:
        """Whether it runs as CUDA graphs."""
        return bool(self._graphs)

    def forget_graphs(self) -> None:
        """Give back the graphs' memory; without it weights must stay where they are."""
        for graph in self._graphs.values():
            graph.forget()

    def encode_pages(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return what the text model reads of each of a batch's R rows: (image tokens, width)."""
        counts = [len(row) for row in batch["image_sizes"]]
        images = [image for row, count in zip(batch["pixel_values"], counts, strict=True) for image in row[:count]]
        sizes = [size for row in batch["image_sizes"] for size in row]
        keys = [key for row in batch["image_keys"] for key in row]
        features = self.encode_images(images, sizes, keys)
        # A large batch is one of evaluation, where all its patches at once would be what takes the most memory.
        some = len(features) if torch.is_grad_enabled() else MOST_IMAGES
        states = [self.connect(features[start : start + some]) for start in range(0, len(features), some)]
        return [row.flatten(0, 1) for row in torch.cat(states).split(counts)]

    def encode_images(
        self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], keys: Sequence[str]
    ) -> list[Tensor]:
        """Run the vision tower.

        Args:
            images: I of (C, H, W).
            sizes: height and width of each in pixels; the rest is padding.
            keys: of each image, for the cache.

        Returns:
            For each image (P, width), in the model's dtype.
        """
        known = [
            self.cache.get(key, image.device) if self.cache else None for key, image in zip(keys, images, strict=True)
        ]
        features = {i: kept for i, kept in enumerate(known) if kept is not None}
        # Weights and pixels have one dtype: autocast would only take norms to float32 and back.
        off = torch.autocast(images[0].device.type, enabled=False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_vision_trained(self.model)), off:
            for i in range(len(images)):
                if i in features:
                    continue
                features[i] = self._run("encode_images", self._embed_patches(images[i], *sizes[i]))[0]
                if self.cache:
                    self.cache.put(keys[i], features[i])
        return [features[i] for i in range(len(images))]

    def connect(self, features: Sequence[Tensor]) -> Tensor:
        """Turn each image's patches into what the text model reads in place of image tokens, (I, latents, width)."""
        lengths = [len(patches) for patches in features]
        patches = torch.cat(list(features))
        longest = max(lengths) + -max(lengths) % MULTIPLES[1]
        if self._graphs:
            multiple = max(MULTIPLES[0], 2 ** len(patches).bit_length() // SHARE)
            patches = F.pad(patches, (0, 0, 0, -len(patches) % multiple))
        # Images lie one behind the other, unpadded, until they are attended to: row i takes its patches from there.
        gather_index = torch.arange(longest, device=patches.device).repeat(len(lengths), 1)
        attention_mask = torch.ones(len(lengths), 1, 1, longest + self.latents, dtype=torch.bool, device=patches.device)
        for i, length in enumerate(lengths):
            gather_index[i].remainder_(length).add_(
                sum(lengths[:i])
            )  # what pads a row is its own patches again, unseen
            attention_mask[i, ..., length:longest] = False
        attention_mask = attention_mask.expand(-1, -1, self.latents, -1).contiguous()
        with self.autocast():
            return self._run("connect", patches, gather_index, attention_mask)

    def embed(self, input_ids: Tensor, pages: Sequence[Tensor]) -> Tensor:
        """Embed tokens (R, T), each row's image tokens as what was seen of its page; returns (R, T, width)."""
        embeddings, images = self.embeddings(input_ids), input_ids == self.config.image_token_id
        seen = torch.cat(list(pages)).to(embeddings.dtype)
        # Each token's place among the image tokens; masked_scatter's gradient would wait for the GPU.
        gather_index = images.flatten().cumsum(0).sub(1).clamp(min=0)
        return torch.where(images[..., None], seen.index_select(0, gather_index).view_as(embeddings), embeddings)

    def prefill(self, batch: Mapping[str, Any], pages: Sequence[Tensor], memory: Any = None) -> Tensor:  # noqa: ANN401
        """Read a batch's rows with their pages.

        Args:
            batch: the collator's.
            pages: what `encode_pages` saw of each row's.
            memory: an `idefics_lit.evaluation.decoding.PrefillCache` that is to remember keys and values.

        Returns:
            The text model's last hidden states (R, T, width).

        Raises:
            InputError: when a question is longer than the text model takes.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"]
        positions = batch.get("position_ids")
        if positions is None:
            self.check_length(ids.shape[1])
            positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        elif ids.shape[1] > self.config.text_config.max_position_embeddings:
            self.check_length(int(positions.max()) + 1)  # a shared row may be longer than any of its questions
        # Without a shared row there is only causality, which needs no mask: padding is at the right.
        masks = [mask] if mask.ndim == 4 else []
        if window := self._window(ids.shape[1]):
            causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
            near = positions[:, None, :, None] - positions[:, None, None] < window
            masks = [near & (masks[0] if masks else causal)]
        embeddings = self.embed(ids, pages)
        with self.autocast():
            if memory is not None:
                return self._prefill(embeddings, positions, masks[0] if masks else None, memory)
            return self._run("prefill", embeddings, positions, *masks)

    def decode_step(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor, memory: Any) -> Tensor:  # noqa: ANN401
        """Read one more token of each of B prompts.

        Args:
            tokens: (B).
            positions: (B), where they stand in rows of their own.
            attention_mask: (B, L), which of the remembered tokens there are, the new ones among them.
            memory: where they are, and where the new ones are put.

        Returns:
            The last hidden states (B, width).
        """
        if window := self._window(attention_mask.shape[1]):
            attention_mask = attention_mask & (positions[:, None] - (attention_mask.cumsum(1) - 1) < window)
        with self.autocast():
            return self._prefill(
                self.embeddings(tokens[:, None]), positions[:, None], attention_mask[:, None, None], memory
            )[:, 0]

    def _window(self, tokens: int) -> int | None:
        """The sliding window, where so many tokens are more."""
        window: int | None = self.config.text_config.sliding_window
        return window if window and tokens > window else None

    def loss(self, batch: Mapping[str, Any], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy summed over a batch's labelled tokens, and their number; both 0-d.

        Args:
            batch: the collator's.
            hidden: what `prefill` returned of it.
        """
        # Most tokens have no label: their logits would be the largest tensor of the step.
        supervised_positions = batch["supervised_positions"]
        scores = self.logits(hidden.flatten(0, 1).index_select(0, supervised_positions))
        labels = batch["labels"].flatten()[supervised_positions + 1]
        tokens = torch.full((), len(labels), device=labels.device)
        return F.cross_entropy(scores.float(), labels, reduction="sum"), tokens

    def check_length(self, tokens: int) -> None:
        """Refuse rows that are longer than what the text model was made for."""
        limit = self.config.text_config.max_position_embeddings
        if tokens > limit:
            raise InputError(
                f"a batch of {tokens} tokens, but {self.config.name_or_path} takes {limit}: lower data.max_length, "
                f"which names the question that is too long"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn hidden states (..., width) into the logits of the next token (..., V)."""
        with self.autocast():
            scores: Tensor = self.head(hidden)
        return scores

    def autocast(self) -> torch.autocast:
        """Compute in the model's dtype with the adapter's float32 weights, whoever calls."""
        half = self.dtype != torch.float32
        return torch.autocast(self.head.weight.device.type, self.dtype if half else None, half)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute without dropout and gradients, whoever calls; then each module has its own mode again."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    def _run(self, name: str, *arguments: Tensor) -> Tensor:
        run = self._graphs[name].replay if self._graphs and self.model.training else getattr(self, f"_{name}")
        result: Tensor = run(*arguments)
        return result

    def _embed_patches(self, image: Tensor, height: int, width: int) -> Tensor:
        """Return (1, P, width), the patches of an image (C, H, W) of which so many pixels are no padding."""
        config, embeddings = self.tower.config, self.tower.embeddings
        side = config.patch_size
        rows, columns = height // side, width // side
        pixels = image[None, :, : rows * side, : columns * side].to(self.dtype)
        # The forward of `embeddings` rounds coordinates to 16 bits in transformers before 5.21, and waits for the GPU.
        positions = vision_position_ids(rows, columns, config.image_size // side, pixels.device)
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        # Transposed as they are, all that follows would be slower by a third.
        return (patches + embeddings.position_embedding(positions)).contiguous()

    def _encode_images(self, patches: Tensor) -> Tensor:
        features: Tensor = self.tower.encoder(inputs_embeds=patches, attention_mask=None).last_hidden_state
        return self.tower.post_layernorm(features)

    def _connect(self, patches: Tensor, gather_index: Tensor, attention_mask: Tensor) -> Tensor:
        resampler = self.connector.perceiver_resampler
        # By parts: in between they are twelve times as wide.
        context = torch.cat([self.connector.modality_projection(some) for some in patches.split(CHUNK)])
        latents = resampler.latents.expand(len(gather_index), -1, -1)
        for layer in resampler.layers:
            inputs = (layer, latents, context, gather_index, attention_mask)
            # The adapters' inputs are as long as a page has patches: made again for the backward, which costs little.
            # Graphs can't capture that.
            latents = _resample(*inputs) if self._graphs else checkpoint(_resample, *inputs, use_reentrant=False)
        states: Tensor = resampler.norm(latents)
        return states

    def _prefill(self, embeddings: Tensor, positions: Tensor, mask: Tensor | None = None, memory: Any = None) -> Tensor:  # noqa: ANN401
        hidden, rotary_embedding = embeddings, self.text_model.rotary_emb(embeddings, position_ids=positions)
        for layer in self.text_model.layers:
            # By place: the memory's name depends on transformers' version.
            hidden = layer(hidden, mask, None, memory, position_embeddings=rotary_embedding)
        states: Tensor = self.text_model.norm(hidden)
        return states


def _enable_adapter_casts(model: torch.nn.Module, *_: object) -> None:
    _set_adapter_casts(model, True)


def _disable_adapter_casts(model: torch.nn.Module, *_: object) -> None:
    _set_adapter_casts(model, False)


def _set_adapter_casts(model: torch.nn.Module, enabled: bool) -> None:
    for layer in model.modules():
        if isinstance(layer, lora.Linear):
            layer.cast_input_dtype_enabled = enabled


@lru_cache(maxsize=512)  # shapes, of 39 kB at most
def vision_position_ids(rows: int, columns: int, per_side: int, device: torch.device) -> Tensor:
    """Return the position ids (rows * columns) of an image's patches, as Idefics2VisionEmbeddings of transformers 5.24.

    Coordinates are float32 and the CPU's whatever the model's dtype and device: near a boundary another rounding is
    another position.

    Args:
        rows: of patches.
        columns: of patches.
        per_side: positions that the vision tower has in each direction.
        device: where the ids are.
    """
    exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    boundaries = torch.arange(1 / per_side, 1.0, 1 / per_side, **exact)

    def buckets(count: int) -> Tensor:
        coordinates = torch.arange(count, **exact) * (1.0 / torch.tensor(count, **exact))
        return torch.bucketize(coordinates.clamp(max=1.0 - 1e-6), boundaries, right=True)

    with torch.inference_mode(False):  # they are kept, for training too
        return (buckets(rows)[:, None] * per_side + buckets(columns)).flatten().to(device)


def _resample(layer: Any, latents: Tensor, context: Tensor, gather_index: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: ANN401
    """Run a layer of the resampler; shapes are `_attend`'s."""
    own = layer.input_latents_norm(latents)
    latents = latents + _attend(layer.self_attn, own, layer.input_context_norm(context), gather_index, attention_mask)
    states: Tensor = latents + layer.mlp(layer.post_attention_layernorm(latents))
    return states


def _attend(attention: Any, latents: Tensor, context: Tensor, gather_index: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: ANN401
    """Attend from latents to context and latents, as transformers' Idefics2PerceiverAttention does.

    It projects both in one: with gradients for the context, which is frozen and sixty times as long, and with padding.

    Args:
        attention: the Idefics2PerceiverAttention.
        latents: (I, latents, width).
        context: (patches, width), all images'.
        gather_index: (I, P), each image's rows of the context.
        attention_mask: (I, 1, latents, P + latents), False for padding.
    """

    def split(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def join(project: Any) -> Tensor:  # noqa: ANN401
        chosen = project(context).index_select(0, gather_index.flatten()).unflatten(0, gather_index.shape)
        states = split(torch.cat([chosen, project(latents)], dim=1))
        return states.repeat_interleave(attention.num_key_value_groups, dim=1)

    found = F.scaled_dot_product_attention(
        split(attention.q_proj(latents)),
        join(attention.k_proj),
        join(attention.v_proj),
        attn_mask=attention_mask,
        dropout_p=attention.attention_dropout if attention.training else 0.0,
        scale=attention.scaling,
    )
    result: Tensor = attention.o_proj(found.transpose(1, 2).flatten(2))
    return result
