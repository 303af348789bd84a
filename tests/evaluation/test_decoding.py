"""The tensors that the decoder reuses don't carry values from one batch to the next."""

import torch

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.evaluation.decoding import GreedyDecoder, PrefillCache
from idefics_lit.training.module import Idefics2Module


def test_nan_in_one_batch_does_not_change_the_next():
    module = Idefics2Module("tiny", quantization="none")
    module.configure_model()
    module.eval()
    pages = SyntheticPages("validation", 1)
    batch = Idefics2Collator(module.processor, train=False)([pages[0], pages[1]])
    batch = module.transfer_batch_to_device(batch, module.model.device, 0)
    answering = GreedyDecoder(module.backbone, module.processor, 6, graphs=True)  # reuses its memory

    @torch.no_grad()
    def answer(factor):
        memory = PrefillCache()
        hidden = module.backbone.prefill(batch, module.encode_pages(batch), memory)
        memory.layers = [(keys * factor, values * factor) for keys, values in memory.layers]
        return answering.answer(batch, hidden, memory)

    first = answer(1.0)
    assert answer(torch.nan) != first
    assert answer(1.0) == first
