"""The forward of Idefics2 over the parameters of a transformers model, for many questions on a page at a time.

transformers runs the vision tower once per question. Here a page is seen once and its questions follow it in one
sequence, each with the positions it would have alone and a mask that hides the others: the logits are the same
(`difference` measures by how much they are not), a training step costs a quarter.
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
    """Logits, and what the helper losses look at; B pages, Q tasks of S tokens, N latents."""

    logits: Tensor  # B, Q, S, vocabulary
    patches: Tensor  # B, patches, width: the vision tower's output
    latents: Tensor  # B, N, width: the resampler's output
    looks: Tensor  # B, heads, N, patches + N: attention logits of the resampler's first layer, for a quarter of B
    middle: Tensor  # B, Q * S, width: the normed input of the decoder's middle layer
    points: Tensor  # B, 2, Q * S, N: attention logits of two of its heads on the latents


class PackedReader(nn.Module):
    """Packed forward over ``model``'s parameters.

    Args:
        model: a model of `idefics_lit.model.tiny`'s architecture.
        slots: tasks on a page.
    """

    def __init__(self, model: Idefics2ForConditionalGeneration, slots: int) -> None:
        """See the class."""
        super().__init__()
        self.model = model
        self.register_buffer("prefix", torch.tensor(PREFIX), persistent=False)
        grid = model.config.vision_config.image_size // PATCH
        # As transformers counts: rows and columns as shares of the page, on a grid for square images.
        edges = torch.arange(1 / grid, 1.0, 1 / grid)
        row, column = (
            torch.bucketize(torch.arange(n) * (1.0 / torch.tensor(n)), edges, right=True) for n in (ROWS, COLUMNS)
        )
        self.register_buffer("patch_positions", (row[:, None] * grid + column).flatten(), persistent=False)
        place = torch.arange(len(PREFIX) + slots * SLOT)
        slot = torch.where(place < len(PREFIX), -1, (place - len(PREFIX)) // SLOT)
        position = torch.where(slot < 0, place, len(PREFIX) + (place - len(PREFIX)) % SLOT)
        visible = (slot[None] < 0) | (slot[:, None] == slot[None])
        self.register_buffer("mask", visible & (place[:, None] >= place[None]), persistent=False)
        cos, sin = model.model.text_model.rotary_emb(torch.zeros(1), position[None])
        self.register_buffer("cos", cos[0], persistent=False)
        self.register_buffer("sin", sin[0], persistent=False)

    def forward(self, image: Tensor, ids: Tensor) -> Outputs:
        """Grey pages B, height, width in [-1, 1] and tasks B, Q, S."""
        patches = self.see(image)
        latents, looks = self.resample(patches)
        logits, middle, points = self.read(latents, ids)
        return Outputs(logits, patches, latents, looks, middle, points)

    def see(self, image: Tensor) -> Tensor:
        """The vision tower: pages to patches."""
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

    def resample(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """The connector: patches to latents."""
        connector, count = self.model.model.connector, len(patches)
        resampler = connector.perceiver_resampler
        context = _gated(connector.modality_projection, patches)
        latents, looks = resampler.latents.expand(count, -1, -1), None
        for layer in resampler.layers:
            attention = layer.self_attn
            own = _rms(latents, layer.input_latents_norm)
            seen = torch.cat([_rms(context, layer.input_context_norm), own], dim=1)
            projected = attention.q_proj(own), attention.k_proj(seen), attention.v_proj(seen)
            query, key, value = (_heads(part, attention.head_dim) for part in projected)
            if looks is None:
                some = max(count // 4, 1)  # enough to guide the heads
                looks = query[:some].float() @ key[:some].float().mT * attention.head_dim**-0.5
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            latents = latents + attention.o_proj(mixed)
            latents = latents + _gated(layer.mlp, _rms(latents, layer.post_attention_layernorm))
        return _rms(latents, resampler.norm), looks

    def read(self, latents: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The decoder: latents and tasks to logits."""
        decoder, count, prefix = self.model.model.text_model, len(ids), len(PREFIX)
        tokens = torch.cat([self.prefix.expand(count, -1), ids.flatten(1)], dim=1)
        first = PREFIX.index(IMAGE)
        hidden = decoder.embed_tokens(tokens)
        hidden = torch.cat([hidden[:, :first], latents.to(hidden.dtype), hidden[:, first + LATENTS :]], dim=1)
        middle = points = hidden
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
                points = query[:, : 2 * groups : groups, prefix:] @ key[:, :2, first : first + LATENTS].mT * size**-0.5
            query, key = query.to(value.dtype), key.to(value.dtype)
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + _gated(layer.mlp, _rms(hidden, layer.post_attention_layernorm))
        logits = self.model.lm_head(_rms(hidden[:, prefix:], decoder.norm))
        return logits.view(*ids.shape, -1), middle, points

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
def difference(reader: PackedReader, pages: list[Page], device: torch.device) -> float:
    """Largest difference between packed logits and those of transformers' own forward, in float32.

    Raises:
        AssertionError: the processor makes other ids of the prompt than `tasks` does.
    """
    store, processor = PageStore.of(pages, device), tiny_processor()
    slots = (len(reader.mask) - len(PREFIX)) // SLOT
    tasks = torch.arange(slots, device=device) % store.on_device["questions"].long()[:, None]
    batch = store.batch(torch.arange(len(pages), device=device), tasks)
    logits = reader(batch.image, batch.ids).logits
    worst = 0.0
    for index, page in enumerate(pages):
        for slot in {0, slots - 1}:
            length = int(store.on_device["length"][index, tasks[index, slot]])
            ids = [*PREFIX, *batch.ids[index, slot, :length].tolist()]
            question, answer = processor.decode(ids[len(PREFIX) : -1]).split("<end_of_utterance>\nAssistant: ")
            prompt = processor.apply_chat_template(messages(question.strip(), answer)).strip()
            inputs = processor(text=prompt, images=[page.image], return_tensors="pt").to(device)
            assert inputs["input_ids"][0].tolist() == ids, f"the processor makes other ids of {prompt!r}"
            expected = reader.model(**inputs).logits[0, len(PREFIX) :]
            worst = max(worst, (expected - logits[index, slot, :length]).abs().max().item())
    return worst
