"""The forward of Idefics2 with the parameters of a transformers model, for several tasks per page.

A page is encoded once. Its tasks follow it in one sequence, each with the positions that it would have alone and a mask
that hides the others. The logits are those of transformers' forward (`largest_difference` measures it), at a quarter of
the time per training step. It isn't the package's forward, because the auxiliary losses need hidden states and
attention logits that only training uses.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pages_store import COLUMNS, ROWS, PageStore
from tasks import PREFIX, SLOT, messages
from torch import Tensor, nn
from transformers import Idefics2ForConditionalGeneration

from idefics_lit.data.pages import Page
from idefics_lit.model.tiny import IMAGE, LATENTS, PATCH, tiny_processor


class Outputs(NamedTuple):
    """Logits, and the inputs of the auxiliary losses; B pages, Q tasks of S tokens, N latents."""

    logits: Tensor  # B, Q, S, vocabulary
    patches: Tensor  # B, patches, width: the vision encoder's output
    latents: Tensor  # B, N, width: the resampler's output
    resampler_attention: Tensor  # B / 4, heads, N, patches + N: attention logits of the resampler's first layer
    middle: Tensor  # B, Q * S, width: the normed input of the decoder's middle layer
    latent_attention: Tensor  # B, 2, Q * S, N: attention logits of two of its heads on the latents


class PackedReader(nn.Module):
    """Packed forward with a model's parameters.

    Args:
        model: a model of `idefics_lit.model.tiny`'s architecture.
        slots: the number of tasks per page.
    """

    def __init__(self, model: Idefics2ForConditionalGeneration, slots: int) -> None:
        """See the class."""
        super().__init__()
        self.model = model
        self.register_buffer("prefix", torch.tensor(PREFIX), persistent=False)
        grid = model.config.vision_config.image_size // PATCH
        # Fractional coordinates on the position grid, as in transformers' Idefics2VisionEmbeddings.
        edges = torch.arange(1 / grid, 1.0, 1 / grid)
        row, column = (
            torch.bucketize(torch.arange(n) * (1.0 / torch.tensor(n)), edges, right=True) for n in (ROWS, COLUMNS)
        )
        self.register_buffer("patch_positions", (row[:, None] * grid + column).flatten(), persistent=False)
        index = torch.arange(len(PREFIX) + slots * SLOT)
        slot = torch.where(index < len(PREFIX), -1, (index - len(PREFIX)) // SLOT)
        position = torch.where(slot < 0, index, len(PREFIX) + (index - len(PREFIX)) % SLOT)
        visible = (slot[None] < 0) | (slot[:, None] == slot[None])
        self.register_buffer("mask", visible & (index[:, None] >= index[None]), persistent=False)
        cos, sin = model.model.text_model.rotary_emb(torch.zeros(1), position[None])
        self.register_buffer("cos", cos[0], persistent=False)
        self.register_buffer("sin", sin[0], persistent=False)

    def forward(self, image: Tensor, ids: Tensor) -> Outputs:
        """Return the outputs for grey pages (B, height, width) in [-1, 1] and tasks (B, Q, S)."""
        patches = self.encode_pages(image)
        latents, resampler_attention = self.connect(patches)
        logits, middle, latent_attention = self.decode(latents, ids)
        return Outputs(logits, patches, latents, resampler_attention, middle, latent_attention)

    def encode_pages(self, image: Tensor) -> Tensor:
        """Apply the vision encoder: pages to patches."""
        tower = self.model.model.vision_model
        count, width = len(image), tower.embeddings.embed_dim
        image = image.view(count, ROWS, PATCH, COLUMNS, PATCH).transpose(2, 3).reshape(count, ROWS * COLUMNS, PATCH**2)
        embed = tower.embeddings.patch_embedding
        # A grey page has three equal channels: one product with the sum of their weights.
        hidden = F.linear(image, embed.weight.sum(1).view(width, PATCH**2), embed.bias)
        hidden = hidden + tower.embeddings.position_embedding(self.patch_positions)
        for layer in tower.encoder.layers:
            attention = layer.self_attn
            normed = layer.layer_norm1(hidden)
            parts = [attention.q_proj, attention.k_proj, attention.v_proj]
            weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
            joint = F.linear(normed, weight, bias).view(count, -1, 3, attention.num_heads, attention.head_dim)
            query, key, value = joint.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(count, -1, width)
            hidden = hidden + attention.out_proj(mixed)
            hidden = hidden + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.layer_norm2(hidden)), approximate="tanh"))
        return tower.post_layernorm(hidden)

    def connect(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the connector: patches to latents."""
        connector, count = self.model.model.connector, len(patches)
        resampler = connector.perceiver_resampler
        context = _gated(connector.modality_projection, patches)
        latents, attention_logits = resampler.latents.expand(count, -1, -1), None
        for layer in resampler.layers:
            attention = layer.self_attn
            queries = _rms(latents, layer.input_latents_norm)
            keys = torch.cat([_rms(context, layer.input_context_norm), queries], dim=1)
            projected = attention.q_proj(queries), attention.k_proj(keys), attention.v_proj(keys)
            query, key, value = (_heads(part, attention.head_dim) for part in projected)
            if attention_logits is None:
                pages = max(count // 4, 1)  # enough to guide the heads
                attention_logits = query[:pages].float() @ key[:pages].float().mT * attention.head_dim**-0.5
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            latents = latents + attention.o_proj(mixed)
            latents = latents + _gated(layer.mlp, _rms(latents, layer.post_attention_layernorm))
        return _rms(latents, resampler.norm), attention_logits

    def decode(self, latents: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the decoder: latents and tasks to logits."""
        decoder, count, prefix = self.model.model.text_model, len(ids), len(PREFIX)
        tokens = torch.cat([self.prefix.expand(count, -1), ids.flatten(1)], dim=1)
        first = PREFIX.index(IMAGE)
        hidden = decoder.embed_tokens(tokens)
        hidden = torch.cat([hidden[:, :first], latents.to(hidden.dtype), hidden[:, first + LATENTS :]], dim=1)
        middle = latent_attention = hidden
        for index, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            size, groups = attention.head_dim, attention.num_key_value_groups
            normed = _rms(hidden, layer.input_layernorm)
            parts = [attention.q_proj, attention.k_proj, attention.v_proj]
            joint = F.linear(normed, torch.cat([part.weight for part in parts]))
            query, key, value = (_heads(part, size) for part in joint.split([part.out_features for part in parts], -1))
            query, key = self._rotate(query), self._rotate(key)
            if index == len(decoder.layers) // 2:
                middle = normed[:, prefix:]
                latent_keys = key[:, :2, first : first + LATENTS]
                latent_attention = query[:, : 2 * groups : groups, prefix:] @ latent_keys.mT * size**-0.5
            query, key = query.to(value.dtype), key.to(value.dtype)
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + _gated(layer.mlp, _rms(hidden, layer.post_attention_layernorm))
        logits = self.model.lm_head(_rms(hidden[:, prefix:], decoder.norm))
        return logits.view(*ids.shape, -1), middle, latent_attention

    def _rotate(self, heads: Tensor) -> Tensor:
        """Rotary positions, in float32."""
        heads = heads.float()
        left, right = heads.chunk(2, dim=-1)
        return heads * self.cos + torch.cat([-right, left], dim=-1) * self.sin


def _heads(hidden: Tensor, size: int) -> Tensor:
    return hidden.unflatten(-1, (-1, size)).transpose(1, 2)


def _rms(hidden: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(hidden.float(), hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def _gated(mlp: nn.Module, hidden: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))


@torch.no_grad()
def largest_difference(reader: PackedReader, pages: list[Page], device: torch.device) -> float:
    """Return the largest difference between packed logits and those of transformers' forward, in float32.

    Raises:
        AssertionError: when the processor tokenizes a prompt differently from `tasks`.
    """
    store, processor = PageStore.of(pages, device), tiny_processor()
    slots = (len(reader.mask) - len(PREFIX)) // SLOT
    tasks = torch.arange(slots, device=device) % store.on_device["questions"].long()[:, None]
    batch = store.batch(torch.arange(len(pages), device=device), tasks)
    logits = reader(batch.image, batch.ids).logits
    largest = 0.0
    for index, page in enumerate(pages):
        for slot in {0, slots - 1}:
            length = int(store.on_device["length"][index, tasks[index, slot]])
            ids = [*PREFIX, *batch.ids[index, slot, :length].tolist()]
            question, answer = processor.decode(ids[len(PREFIX) : -1]).split("<end_of_utterance>\nAssistant: ")
            prompt = processor.apply_chat_template(messages(question.strip(), answer)).strip()
            inputs = processor(text=prompt, images=[page.image], return_tensors="pt").to(device)
            assert inputs["input_ids"][0].tolist() == ids, f"the processor tokenizes {prompt!r} differently"
            expected = reader.model(**inputs).logits[0, len(PREFIX) :]
            largest = max(largest, (expected - logits[index, slot, :length]).abs().max().item())
    return largest
