"""Position ids of patches, in every dtype and as in every supported version of transformers."""

import pytest
import torch
from torch import nn
from transformers import Idefics2ForConditionalGeneration, Idefics3Config
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from idefics_lit.model.idefics2 import Idefics2Backbone
from idefics_lit.model.loading import LoRA, add_lora
from idefics_lit.model.patches import embed_patches, vision_position_ids
from idefics_lit.model.tiny import tiny_config

PATCH, PER_SIDE = 14, 70  # Idefics2-8b's
SHAPES = [(70, 54), (54, 70), (1, 3), (2, 77), (26, 27), (25, 50), (35, 69), (49, 1), (55, 13), (70, 70), (70, 38)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(rows, columns, per_side, coordinates=torch.float32):
    """The formula of Idefics2VisionEmbeddings; in transformers 5.17 to 5.20 coordinates had the pixels' dtype."""
    boundaries = torch.arange(1 / per_side, 1.0, 1 / per_side)

    def buckets(patches):
        fractions = torch.arange(patches, dtype=torch.float32) * (1.0 / torch.tensor(patches))
        fractions = fractions.clamp(max=1.0 - 1e-6).to(coordinates)
        return torch.bucketize(fractions, boundaries, right=True)

    return (buckets(rows)[:, None] * per_side + buckets(columns)).flatten()


def rounding(self, pixel_values, patch_attention_mask):
    """The forward of transformers 5.17 to 5.20."""
    ids = reference(*patch_attention_mask.shape[1:], self.num_patches_per_side, pixel_values.dtype)
    return self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.position_embedding(ids)


@pytest.fixture(scope="module")
def base():
    """An Idefics2 whose vision features are the row and the column of the position that each patch was given."""
    config = tiny_config()
    config.vision_config.image_size, config.vision_config.patch_size = PATCH * PER_SIDE, PATCH
    config.vision_config.num_hidden_layers, config.vision_config.hidden_size = 0, 6
    with torch.random.fork_rng():
        model = Idefics2ForConditionalGeneration(config)
    tower = model.model.vision_model
    tower.post_layernorm = nn.Identity()
    with torch.no_grad():
        tower.embeddings.patch_embedding.weight.zero_()
        tower.embeddings.patch_embedding.bias.zero_()
        tower.embeddings.position_embedding.weight.zero_()
        every = torch.arange(PER_SIDE**2)
        tower.embeddings.position_embedding.weight[:, :2] = torch.stack([every // PER_SIDE, every % PER_SIDE], 1)
    return add_lora(model, LoRA())


@pytest.mark.parametrize("embeddings", ["installed", "rounding"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_are_those_of_float32(base, dtype, embeddings, monkeypatch):
    if embeddings == "rounding":
        monkeypatch.setattr(Idefics2VisionEmbeddings, "forward", rounding)
    backbone = Idefics2Backbone(base.to(dtype))
    wrong = []
    for rows, columns in SHAPES:
        # What is more than whole patches is cut off; what is more than the image is padding.
        size = rows * PATCH + 5, columns * PATCH + 3
        (found,) = backbone.encode_images([torch.ones(3, size[0] + 9, size[1])], [size], ["page"])
        assert found.dtype == dtype and found.is_contiguous()
        row, column = found[:, :2].long().unbind(1)
        if not torch.equal(row * PER_SIDE + column, reference(rows, columns, PER_SIDE)):
            wrong.append((rows, columns))
    assert wrong == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [364, 384])
def test_the_positions_of_a_tile_are_the_identity(size, dtype):
    """transformers 5.17 gave 420 of 676 patches another position in bfloat16, 555 in float16."""
    config = Idefics3Config().vision_config
    config.image_size, config.patch_size, config.hidden_size, config.num_hidden_layers = size, PATCH, 8, 0
    config.num_attention_heads = 1
    tower = Idefics3VisionTransformer(config).to(dtype)
    tiles = torch.ones(2, 3, size, size, dtype=dtype)
    with torch.no_grad():
        tower.embeddings.patch_embedding.weight.zero_()
        tower.embeddings.patch_embedding.bias.zero_()
        found = embed_patches(tower, tiles, size, size)
    assert torch.equal(found, tower.embeddings.position_embedding.weight.expand(2, -1, -1))


def test_rounded_coordinates_are_other_positions():
    """What the other tests compare with: as many of a page of 980 x 756 pixels as was seen in transformers 5.17."""
    right = reference(70, 54, 70)
    assert [int((reference(70, 54, 70, dtype) != right).sum()) for dtype in DTYPES] == [0, 1836, 2322]


@pytest.mark.parametrize("per_side", [2, 8, 14, 16, 32, 70])
def test_positions_do_not_depend_on_the_first_caller(per_side):
    vision_position_ids.cache_clear()
    with torch.inference_mode():
        ids = vision_position_ids(50, 27, per_side, torch.device("cpu"))
    assert not ids.is_inference()  # such tensors can't be used in training
    torch.set_default_dtype(torch.bfloat16)
    try:
        vision_position_ids.cache_clear()
        again = vision_position_ids(50, 27, per_side, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(ids, reference(50, 27, per_side)) and torch.equal(ids, again)
