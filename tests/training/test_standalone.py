"""The module outside of the command line: copies, pickles, nesting, direct calls, Trainers without callbacks."""

import copy
import pickle

import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.errors import InputError
from idefics_lit.model.loading import LoRA
from idefics_lit.training.module import Idefics2Module

CPU = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}


@pytest.fixture(scope="module")
def examples():
    pages = SyntheticPages("train", 4)
    return [pages[i] for i in range(4)]


def make_module(tiny, quantization="none"):
    return Idefics2Module(tiny, quantization=quantization, lora=LoRA(dropout=0.0), max_new_tokens=2)


def fill_adapter(module, value):
    with torch.no_grad():
        for parameter in trained(module).values():
            parameter.fill_(value)


def trained(module):
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_copy_computes_the_same_and_shares_no_weights(tiny, examples, make_copy, quantization):
    module = make_module(tiny, quantization)
    unloaded = make_copy(module)
    assert not hasattr(unloaded, "model") and unloaded.hparams == module.hparams
    module.configure_model()
    fill_adapter(module, 0.01)
    other = make_copy(module)
    batch = module.collator(train=True, image_size=112)(examples[:2])
    assert torch.equal(other.loss(batch)[0], module.loss(batch)[0])
    fill_adapter(other, 0.02)
    assert not torch.equal(other.loss(batch)[0], module.loss(batch)[0])


def test_a_copy_after_a_fit_can_be_fitted(tiny, examples):
    module = make_module(tiny)
    loader = DataLoader(examples, batch_size=2, collate_fn=module.collator(train=True, image_size=112))
    Trainer(**CPU, max_steps=1).fit(module, loader)
    for make_copy in (copy.deepcopy, pickled):
        other = make_copy(module)
        Trainer(**CPU, max_steps=1).fit(other, loader)
        assert other.step_loss is not None and other.step_loss.isfinite()


class Parent(LightningModule):
    """A module of a user's own, with an Idefics2Module and a layer."""

    def __init__(self, child):
        super().__init__()
        self.child = child
        self.layer = torch.nn.Linear(2, 2)

    def configure_model(self):
        self.child.configure_model()

    def training_step(self, batch, batch_idx):
        loss, tokens = self.child.loss(batch)
        return loss / tokens

    def configure_optimizers(self):
        return torch.optim.SGD(trained(self.child).values(), lr=0.1)


def test_a_parents_state_dict_holds_the_adapter_alone_and_loads_back(tiny):
    parent, other = Parent(make_module(tiny)), Parent(make_module(tiny))
    parent.configure_model()
    fill_adapter(parent.child, 0.5)
    state = parent.state_dict()
    assert state.keys() == {"layer.weight", "layer.bias", *(f"child.{name}" for name in trained(parent.child))}
    other.load_state_dict(state)  # strict, and the other's model isn't loaded yet
    assert all((parameter == 0.5).all() for parameter in trained(other.child).values())
    assert torch.equal(other.layer.weight, parent.layer.weight)


def test_a_parent_is_told_of_wrong_and_missing_weights(tiny):
    parent = Parent(make_module(tiny))
    parent.configure_model()
    state = parent.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"layer\.bias\""):
        parent.load_state_dict({name: value for name, value in state.items() if name != "layer.bias"})
    lost = next(name for name in state if name.startswith("child."))
    with pytest.raises(InputError, match="another adapter, 1 weights differ"):
        parent.load_state_dict({name: value for name, value in state.items() if name != lost})


def test_a_parent_is_trained_saved_and_resumed(tiny, examples, tmp_path):
    parent = Parent(make_module(tiny))
    loader = DataLoader(examples, batch_size=2, collate_fn=parent.child.collator(train=True, image_size=112))
    trainer = Trainer(**CPU, max_steps=2)
    trainer.fit(parent, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = Parent(make_module(tiny))
    resumed = Trainer(**CPU, max_steps=3)
    resumed.fit(other, loader, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert resumed.global_step == 3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_model_is_called_directly(tiny, examples, precision):
    """As peft's and transformers' model, with the batch's tensors."""
    module = make_module(tiny)
    loader = DataLoader(examples[:2], batch_size=2, collate_fn=module.collator(train=True, image_size=112))
    Trainer(**CPU, precision=precision, max_steps=1).fit(module, loader)
    batch = next(iter(loader))
    output = module.model(**batch.model_inputs())
    loss, tokens = module.loss(batch)
    assert output.loss.item() == pytest.approx((loss / tokens).item(), rel=1e-4 if precision == "32-true" else 2e-2)
    output.loss.backward()


def test_a_trainer_without_the_packages_callbacks_is_left_as_it_is(tiny, examples):
    module = make_module(tiny)
    trainer, untouched = Trainer(**CPU, max_steps=1), Trainer(**CPU)
    loader = DataLoader(examples[:2], batch_size=2, collate_fn=module.collator(train=True, image_size=112))
    trainer.fit(module, loader)
    for get in (lambda t: t._signal_connector, lambda t: t._checkpoint_connector, lambda t: t.fit_loop.epoch_loop):
        assert type(get(trainer)) is type(get(untouched)) and vars(get(trainer)).keys() == vars(get(untouched)).keys()
