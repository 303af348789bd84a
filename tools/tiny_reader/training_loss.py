"""How the reader starts, and losses that show it the way; none of it is in the finished model.

The answers alone are a faint signal for a model that has never seen a letter. So the patches and the latents are asked
which characters they hold, each head of the resampler is shown a patch of its latent's part of the page to look at,
and the decoder's middle layer is asked where the next character stands. All of it fades out during training.
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
    """The reader with its helpers: everything that has parameters during training."""

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

    def forward(self, batch: Batch, character: Tensor, look: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and its parts without gradient.

        Args:
            batch: pages and tasks.
            character: weight of the helpers that know the characters (a tensor, so that it may change uncompiled).
            look: weight of the one that knows where to look.

        Returns:
            A scalar, and [answer, patch, latent, place, look].
        """
        outputs = self.reader(batch.image, batch.ids)
        parts = torch.stack(
            [
                _mean_loss(outputs.logits, batch.target),
                self._patch_loss(outputs, batch),
                self._latent_loss(outputs, batch),
                self._place_loss(outputs, batch),
                self._look_loss(outputs),
            ]
        )
        weights = torch.stack([torch.ones_like(character), character, character, 0.5 * character, look])
        return (weights * parts).sum(), parts.detach()

    def _patch_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return _character_loss(self.patch_head(outputs.patches), batch.cells)

    def _latent_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        cells = batch.cells.view(-1, SIDE, CELL_ROWS, SIDE, CELL_COLUMNS * CELLS).transpose(2, 3)
        return _character_loss(self.latent_head(outputs.latents), cells)

    def _place_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        row, column = self.row_head(outputs.middle), self.column_head(outputs.middle)
        pointing = batch.latent.flatten(1)[:, None].expand(-1, outputs.points.shape[1], -1)
        return (
            _mean_loss(row, batch.row.flatten(1))
            + _mean_loss(column, batch.column.flatten(1))
            + _mean_loss(outputs.points, pointing)
        )

    def _look_loss(self, outputs: Outputs) -> Tensor:
        looks = outputs.looks.log_softmax(-1)[..., : ROWS * COLUMNS]
        return -(self.guide * looks).sum(-1).mean()


def _mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the places that have a target."""
    total = F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), ignore_index=-100, reduction="sum")
    return total / (target >= 0).sum().clamp_min(1)


def _character_loss(logits: Tensor, cells: Tensor) -> Tensor:
    cells = cells.flatten()
    loss = F.cross_entropy(logits.float().view(-1, CHARACTERS), cells, reduction="none")
    weight = torch.where(cells == 0, NO_CHARACTER_WEIGHT, 1.0)
    return (loss * weight).sum() / weight.sum()


def _guide() -> Tensor:
    """Heads, latents, patches: a bump on the patch that a head of a latent begins with."""

    def bump(patches: int, under: int) -> Tensor:
        centre = torch.arange(SIDE)[:, None] * under + torch.arange(under)  # SIDE, under
        return torch.exp(-((torch.arange(patches) - centre[..., None]) ** 2) / (2 * 0.35**2))

    guide = torch.einsum("iay,jbx->abijyx", bump(ROWS, CELL_ROWS), bump(COLUMNS, CELL_COLUMNS))
    guide = guide.reshape(CELL_ROWS * CELL_COLUMNS, SIDE * SIDE, ROWS * COLUMNS)
    return guide / guide.sum(-1, keepdim=True)


@torch.no_grad()
def new_reader() -> Idefics2ForConditionalGeneration:
    """A model with weights to start from: scaled to each layer's width, and positions that are near where pages are."""
    model = tiny_model()
    config = model.config
    resampler = config.perceiver_config
    assert resampler.resampler_n_heads == CELL_ROWS * CELL_COLUMNS, "the guide gives each patch under a latent a head"
    for name, weight in model.named_parameters():
        if weight.ndim != 2 or any(part in name for part in ("embed", "lm_head", "latents")):
            continue
        std = weight.shape[1] ** -0.5
        if name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "mlp.down_proj.weight")):
            # These add to the residual: the deeper the stack, the less each.
            part = config.vision_config if "vision" in name else config.text_config
            depth = resampler.resampler_depth if "resampler" in name else part.num_hidden_layers
            std *= (2 * depth) ** -0.5
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    nn.init.normal_(model.model.text_model.embed_tokens.weight, std=0.5)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    embeddings = model.model.vision_model.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=(3 * PATCH**2) ** -0.5)
    embeddings.position_embedding.weight.copy_(
        0.5 * _waves(config.vision_config.image_size // PATCH, embeddings.embed_dim)
    )
    return model


def _waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, (side * side, width)."""
    quarter = width // 4
    angles = torch.arange(side)[:, None] * 60.0 ** -(torch.arange(quarter) / (quarter - 1))
    wave = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
