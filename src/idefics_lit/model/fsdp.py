"""FSDP2 for the frozen 16-bit base of LoRA without quantization.

Only frozen weights are sharded. The adapter is replicated in float32 and trained as under DDP, so loss, clipping,
optimizer and checkpoints are those of a run on one GPU. The base is unsharded for evaluation: ranks generate different
numbers of tokens, and sharded they would have to wait for each other at every token.
"""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from idefics_lit.errors import InputError


class FSDP2Strategy(DDPStrategy):
    """FSDP2 for the frozen layers of the text model, DDP for the adapter; any number of devices and any precision.

    Raises:
        InputError: the base is quantized to 4 bits, whose packed weights can't be sharded, or CUDA graphs are on.
    """

    def setup_environment(self) -> None:
        """Check the options before the model is loaded."""
        options: Any = self.lightning_module.hparams  # type: ignore[union-attr]
        if options.quantization != "none" and not options.dequantize:
            raise InputError(
                f"trainer.strategy FSDP2Strategy shards a 16-bit base, not {options.quantization}: "
                f"give --model.quantization none"
            )
        if options.cuda_graphs:
            raise InputError("model.cuda_graphs can't capture FSDP2's communication: remove one of them")
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the base when fitting."""
        module: Any = self.lightning_module
        if trainer.state.fn == TrainerFn.FITTING and not isinstance(module, FSDPModule):
            shard(module, init_device_mesh(self.root_device.type, (self.world_size,)))
        super().setup(trainer)

    def on_validation_start(self) -> None:
        """Unshard the base."""
        self._set_unsharded(True)

    def on_validation_end(self) -> None:
        """Reshard the base."""
        self._set_unsharded(False)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def teardown(self) -> None:
        """Reshard the base, also after an exception in a layer's forward."""
        self._set_unsharded(False)
        super().teardown()

    def _set_unsharded(self, unsharded: bool) -> None:
        for unit in self.lightning_module.modules() if self.lightning_module else ():
            if isinstance(unit, FSDPModule):
                unit.set_reshard_after_forward(not unsharded, recurse=False)
                unit.unshard() if unsharded else unit.reshard()


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Shard the frozen weights of the text model's layers, 14 of Idefics2-8b's 16.8 GB, over a one-dimensional mesh.

    FSDP2 gathers a unit's weights when the unit is called, and all ranks must call the same units in the same order. A
    layer of the text model is called once a batch. The vision tower and the resampler are called as often as a rank has
    images, so they are replicated, as are embeddings, norms, head and adapter.
    """
    model: Any = module.model
    for layer in model.get_base_model().model.text_model.layers:
        adapter = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapter)
    # A common root without weights lets FSDP2 prefetch a layer's weights while the layer before it computes.
    fully_shard(module, mesh=mesh, ignored_params=set(module.parameters()))
