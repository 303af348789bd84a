"""The initial weights of the reader and its auxiliary losses, which aren't part of the trained model.

The answers alone are a weak signal for a model trained from scratch. Auxiliary heads therefore predict the characters
of each patch and latent and, from the decoder's middle layer, the position of the next character. Another loss guides
each head of the resampler to one patch of its latent's region. All of them fade out during training.
"""

import torch
import torch.nn.functional as F
from forward import Outputs, PackedReader
from pages_store import CELLS, COLUMNS, ROWS, SIDE, Batch
from tasks import CHARACTERS
from torch import Tensor, nn
from transformers import Idefics2ForConditionalGeneration

from idefics_lit.model.tiny import PATCH, tiny_model

NO_CHARACTER_WEIGHT = 0.05  # most cells are empty
CELL_ROWS, CELL_COLUMNS = ROWS // SIDE, COLUMNS // SIDE  # patches under a latent


class TrainingLoss(nn.Module):
    """The reader with its auxiliary heads."""

    def __init__(self, reader: PackedReader) -> None:
        """See the class."""
        super().__init__()
        self.reader = reader
        vision, text = reader.model.config.vision_config.hidden_size, reader.model.config.text_config.hidden_size
        self.patch_head = nn.Linear(vision, CELLS * CHARACTERS)
        self.latent_head = nn.Linear(text, CELL_ROWS * CELL_COLUMNS * CELLS * CHARACTERS)
        self.row_head = nn.Linear(text, ROWS)
        self.column_head = nn.Linear(text, COLUMNS * CELLS)
        self.register_buffer("guide", _guide(), persistent=False)

    def forward(self, batch: Batch, character: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, and its terms without gradient.

        Args:
            batch: pages and tasks.
            character: the weight of the character and position losses; tensors don't trigger a recompilation.
            attention: the weight of the attention loss.

        Returns:
            A scalar, and [answer, patch, latent, position, attention].
        """
        outputs = self.reader(batch.image, batch.ids)
        parts = torch.stack(
            [
                _mean_loss(outputs.logits, batch.target),
                self._patch_loss(outputs, batch),
                self._latent_loss(outputs, batch),
                self._position_loss(outputs, batch),
                self._attention_loss(outputs),
            ]
        )
        weights = torch.stack([torch.ones_like(character), character, character, 0.5 * character, attention])
        return (weights * parts).sum(), parts.detach()

    def _patch_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return _character_loss(self.patch_head(outputs.patches), batch.cells)

    def _latent_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        cells = batch.cells.view(-1, SIDE, CELL_ROWS, SIDE, CELL_COLUMNS * CELLS).transpose(2, 3)
        return _character_loss(self.latent_head(outputs.latents), cells)

    def _position_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        row, column = self.row_head(outputs.middle), self.column_head(outputs.middle)
        target_latents = batch.latent.flatten(1)[:, None].expand(-1, outputs.latent_attention.shape[1], -1)
        return (
            _mean_loss(row, batch.row.flatten(1))
            + _mean_loss(column, batch.column.flatten(1))
            + _mean_loss(outputs.latent_attention, target_latents)
        )

    def _attention_loss(self, outputs: Outputs) -> Tensor:
        log_probs = outputs.resampler_attention.log_softmax(-1)[..., : ROWS * COLUMNS]
        return -(self.guide * log_probs).sum(-1).mean()


def _mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy over positions with a target."""
    total = F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), ignore_index=-100, reduction="sum")
    return total / (target >= 0).sum().clamp_min(1)


def _character_loss(logits: Tensor, cells: Tensor) -> Tensor:
    cells = cells.flatten()
    loss = F.cross_entropy(logits.float().view(-1, CHARACTERS), cells, reduction="none")
    weight = torch.where(cells == 0, NO_CHARACTER_WEIGHT, 1.0)
    return (loss * weight).sum() / weight.sum()


def _guide() -> Tensor:
    """Return the target attention (heads, latents, patches): a Gaussian around each head's patch of a latent."""

    def gaussian(patches: int, per_latent: int) -> Tensor:
        center = torch.arange(SIDE)[:, None] * per_latent + torch.arange(per_latent)  # SIDE, per_latent
        return torch.exp(-((torch.arange(patches) - center[..., None]) ** 2) / (2 * 0.35**2))

    guide = torch.einsum("iay,jbx->abijyx", gaussian(ROWS, CELL_ROWS), gaussian(COLUMNS, CELL_COLUMNS))
    guide = guide.reshape(CELL_ROWS * CELL_COLUMNS, SIDE * SIDE, ROWS * COLUMNS)
    return guide / guide.sum(-1, keepdim=True)


@torch.no_grad()
def new_reader() -> Idefics2ForConditionalGeneration:
    """Return a model with initial weights scaled by layer width, and sinusoidal position embeddings."""
    model = tiny_model()
    config = model.config
    resampler = config.perceiver_config
    assert resampler.resampler_n_heads == CELL_ROWS * CELL_COLUMNS, "the guide needs a head for each patch of a latent"
    for name, weight in model.named_parameters():
        if weight.ndim != 2 or any(part in name for part in ("embed", "lm_head", "latents")):
            continue
        std = weight.shape[1] ** -0.5
        if name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "mlp.down_proj.weight")):
            # Residual branches are scaled down by depth, as in GPT-2.
            part = config.vision_config if "vision" in name else config.text_config
            depth = resampler.resampler_depth if "resampler" in name else part.num_hidden_layers
            std *= (2 * depth) ** -0.5
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    nn.init.normal_(model.model.text_model.embed_tokens.weight, std=0.5)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    embeddings = model.model.vision_model.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=(3 * PATCH**2) ** -0.5)
    embeddings.position_embedding.weight.copy_(
        0.5 * _sinusoids(config.vision_config.image_size // PATCH, embeddings.embed_dim)
    )
    return model


def _sinusoids(side: int, width: int) -> Tensor:
    """Return sines and cosines of row and column, (side * side, width)."""
    quarter = width // 4
    angles = torch.arange(side)[:, None] * 60.0 ** -(torch.arange(quarter) / (quarter - 1))
    wave = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
