"""The vision tower's shortcuts compute what transformers computes, also where the tower is trained."""

import pytest
import torch
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionMLP

from idefics_lit import Idefics2Collator, LoRA, load_processor
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.model.tiny import tiny_config
from idefics_lit.model.vision_mlp import VisionMLP
from idefics_lit.training.module import Idefics2Module


@pytest.mark.parametrize("layer", ["fc1", "fc2", "patch_embedding", "q_proj"])
def test_adapters_of_the_vision_tower_take_part(tiny, layer):
    """With the loss and the gradients of transformers' own forward."""
    batch = Idefics2Collator(load_processor(tiny), train=True)([SyntheticPages("train", 1)[0]])
    lora = LoRA(init=False, dropout=0.0, target_modules=f".*vision_model.*{layer}")
    module = Idefics2Module(tiny, quantization="none", lora=lora)
    module.configure_model()
    parameters = [p for p in module.parameters() if p.requires_grad]
    loss, tokens = module.loss(batch)
    found = torch.autograd.grad(loss / tokens, parameters)
    theirs = module.model(**batch.model_inputs()).loss
    expected = torch.autograd.grad(theirs, parameters)
    assert torch.allclose(loss / tokens, theirs, rtol=1e-5)
    for ours, other in zip(found, expected, strict=True):
        assert other.norm() > 0
        assert (ours - other).norm() <= 1e-3 * other.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_one_kernel_computes_product_and_gelu(dtype):
    config = tiny_config().vision_config
    mlp = Idefics2VisionMLP(config).to("cuda", dtype).requires_grad_(False)
    states = torch.randn(3, 50, config.hidden_size, device="cuda", dtype=dtype)
    fused = VisionMLP(mlp)
    with torch.no_grad():
        expected = mlp(states)
        assert (fused(states) - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert torch.equal(fused(states), expected)  # with gradients it has the same kernels
