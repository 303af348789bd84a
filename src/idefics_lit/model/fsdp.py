"""A 16-bit base in shards over the GPUs, FSDP2, for LoRA without quantization.

What is special here: only what is frozen is sharded. The adapter stays whole, in float32, on every GPU, and is trained
as under DDP, so that loss, clipping, optimizer and checkpoints are those of a run on one GPU. And to answer questions
the base is put together: ranks generate numbers of tokens of their own, and would wait for one another at each.
"""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from idefics_lit.errors import InputError


class FSDP2Strategy(DDPStrategy):
    """FSDP2 for the frozen layers of the text model, DDP for the adapter; any number of devices, each precision.

    Raises:
        InputError: for a 4-bit base, whose packed weights can't be sharded, and for CUDA graphs.
    """

    def setup_environment(self) -> None:
        """Refuse what can't work before the model is loaded."""
        options: Any = self.lightning_module.hparams  # type: ignore[union-attr]
        if options.quantization != "none" and not options.dequantize:
            raise InputError(
                f"trainer.strategy FSDP2Strategy shards a 16-bit base, not {options.quantization}: "
                f"give --model.quantization none"
            )
        if options.cuda_graphs:
            raise InputError("model.cuda_graphs can't capture FSDP2's communication: leave it, or FSDP2Strategy, out")
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the base of a fit."""
        module: Any = self.lightning_module
        if trainer.state.fn == TrainerFn.FITTING and not isinstance(module, FSDPModule):
            shard(module, init_device_mesh(self.root_device.type, (self.world_size,)))
        super().setup(trainer)

    def on_validation_start(self) -> None:
        """Put the base together."""
        self._set_whole(True)

    def on_validation_end(self) -> None:
        """Free what others hold."""
        self._set_whole(False)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def teardown(self) -> None:
        """Leave shards behind, even where a layer's forward was broken off."""
        self._set_whole(False)
        super().teardown()

    def _set_whole(self, whole: bool) -> None:
        for unit in self.lightning_module.modules() if self.lightning_module else ():
            if isinstance(unit, FSDPModule):
                unit.set_reshard_after_forward(not whole, recurse=False)
                unit.unshard() if whole else unit.reshard()


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Shard the frozen weights of the text model's layers, 14 of Idefics2-8b's 16.8 GB, over a mesh of one dimension.

    FSDP2 gathers a unit's weights when it is called, and all ranks have to call the same units in the same order. A
    layer of the text model is called once a batch; vision tower and resampler see as many images as a rank happens to
    have, and `Idefics2Backbone` calls the resampler's parts: they stay whole, as do embeddings, norms and head, and the
    adapter.
    """
    model: Any = module.model
    for layer in model.get_base_model().model.text_model.layers:
        trained = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    # Under a common root, without weights of its own, a layer's are on their way while the one before computes.
    fully_shard(module, mesh=mesh, ignored_params=set(module.parameters()))
