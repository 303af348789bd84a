from types import SimpleNamespace

import pytest
import torch
from comparisons import StepLosses, trainer_losses
from lightning import Callback, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.errors import InputError
from idefics_lit.model.loading import LoRA
from idefics_lit.pretrained import load_processor
from idefics_lit.training.module import Idefics2Module
from idefics_lit.training.trained_weights import trained_parameters

CPU = {"accelerator": "cpu", "precision": "32-true", "logger": False, "enable_progress_bar": False,
       "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip


@pytest.fixture(scope="module")
def processor(tiny):
    return load_processor(tiny, image_size=112)  # a small page, for speed


@pytest.fixture(scope="module")
def examples():
    pages = SyntheticPages("train", 12)
    examples = [pages[i] for i in range(32)]
    for example in examples:
        example.answers = example.answers[:1]
    return examples


def module(tiny, **kwargs):
    torch.manual_seed(0)
    kwargs.setdefault("lora", LoRA(dropout=0.0))
    return Idefics2Module(tiny, **kwargs)


def gradients(module, batch):
    module.zero_grad()
    loss, tokens = module.loss(batch)
    (loss / tokens).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_every_loss_is_transformers_trainers(tiny, processor, examples, tmp_path):
    """30 optimizer steps of 2 x 4 examples in float32, the same order, labels and schedule."""
    steps, data = 30, [examples[i % len(examples)] for i in range(30 * 8)]
    collator = Idefics2Collator(processor, train=True)
    ours = module(tiny, quantization="none", lr=1e-3, warmup_steps=5)
    losses = StepLosses()
    trainer = Trainer(**CPU, max_steps=steps, accumulate_grad_batches=4, gradient_clip_val=1.0, callbacks=[losses])
    trainer.fit(ours, DataLoader(data, batch_size=2, collate_fn=collator))
    theirs = module(tiny, quantization="none")
    expected = trainer_losses(theirs, data, collator, tmp_path, steps=steps, accumulate=4)
    assert len(losses.values) == len(expected) == steps
    assert losses.values == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0]


def test_gradients_before_and_after_a_validation_are_equal_in_nf4(tiny, processor, examples):
    ours = module(tiny)
    ours.configure_model()
    batch = Idefics2Collator(processor, train=True)(examples[:4])
    before = gradients(ours, batch)
    Trainer(**CPU).validate(
        ours, DataLoader(examples[:4], batch_size=2, collate_fn=Idefics2Collator(processor, train=False)), verbose=False
    )
    after = gradients(ours.train(), batch)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(gradient.any() for name, gradient in before.items() if "lora_B" in name)


def test_gradient_checkpointing_recomputes_and_changes_nothing(tiny, processor, examples):
    batch = Idefics2Collator(processor, train=True)(examples[:2])
    results = {}
    for checkpointing in (False, True):
        ours = module(tiny, gradient_checkpointing=checkpointing)
        ours.configure_model()
        calls, vision = [], []
        base = ours.model.get_base_model().model
        base.text_model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        base.vision_model.post_layernorm.register_forward_hook(lambda m, i, out, v=vision: v.append(out.requires_grad))
        results[checkpointing] = gradients(ours, batch)
        assert len(calls) == (2 if checkpointing else 1)
        assert not any(vision)  # the frozen tower stays out of autograd
    assert results[True].keys() == results[False].keys()
    assert all(torch.allclose(results[True][n], results[False][n], atol=1e-7) for n in results[True])


def test_predictions_depend_on_neither_batch_size_nor_neighbours(tiny, processor, examples):
    ours = module(tiny, quantization="none", max_new_tokens=6)
    with torch.random.fork_rng():
        ours.configure_model()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)  # a random model says one thing to everybody
    ours.eval()
    mixed = [Example(e.question_id, e.question, e.images, e.answers) for e in examples[:8]]
    mixed[3].images = [Image.new("L", (90, 112), 200)]  # another shape: its neighbours are padded
    collator = Idefics2Collator(processor, train=False)

    def predict(size, examples):
        batches = Trainer(**CPU).predict(ours, DataLoader(examples, batch_size=size, collate_fn=collator))
        return {answer.question_id: answer.prediction for batch in batches for answer in batch}

    one_by_one = predict(1, mixed)
    assert len(set(one_by_one.values())) > 1
    assert predict(8, mixed) == predict(3, mixed[::-1]) == one_by_one


def test_weight_decay_spares_vectors_and_the_schedule_steps(tiny, processor, examples):
    ours = module(tiny, lr=1e-3, warmup_steps=2)
    rates = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, *args):
            rates.append(trainer.callback_metrics["lr"].item())

    loader = DataLoader(examples[:8], batch_size=2, collate_fn=Idefics2Collator(processor, train=True))
    Trainer(**CPU, max_steps=4, callbacks=[Rates()]).fit(ours, loader)
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4])


class Rates(Callback):
    """The learning rates of an optimizer's groups, step by step."""

    def __init__(self):
        self.values = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.values.append([group["lr"] for group in optimizer.param_groups])


@pytest.fixture
def rates(tiny, monkeypatch):
    """Make so many steps and return the first group's learning rates, and the trainer."""

    def loss(self, batch):  # of no work: only rates are looked at
        return sum(p.sum() for p in self.parameters() if p.requires_grad) * 0, torch.ones(())

    monkeypatch.setattr(Idefics2Module, "loss", loss)

    def rates(steps, ckpt_path=None, kind=Idefics2Module, **options):
        ours = kind(tiny, **{"quantization": "none", "lr": 1e-3, "warmup_steps": 2, **options})
        trainer = Trainer(**CPU, **(steps if isinstance(steps, dict) else {"max_steps": steps}), callbacks=[Rates()])
        trainer.fit(
            ours,
            DataLoader([SimpleNamespace(is_empty=False)] * 2, batch_size=None),
            ckpt_path=ckpt_path,
            weights_only=True,
        )
        return [group[0] for group in trainer.callbacks[0].values], trainer

    return rates


@pytest.mark.parametrize("options", [{"lr": 5e-3}, {"schedule": "cosine"}, {"warmup_steps": 5, "steps": 5}])
def test_a_resumed_run_has_its_own_schedules_rates_from_the_first_step(rates, tmp_path, options):
    """Of more steps or fewer, another rate, another schedule: as if it had been so from the beginning."""
    first, trainer = rates(3)
    assert first == pytest.approx([0, 5e-4, 1e-3])  # and 0 at the end
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    options = {"steps": 8, **options}
    whole, _ = rates(**options)
    assert rates(ckpt_path=tmp_path / "a.ckpt", **options)[0] == whole[3:]


class TwoRates(Idefics2Module):
    """LoRA+: the B matrices learn 16 times faster."""

    schedule = None

    def configure_optimizers(self):
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if (letter in name)], "lr": lr, "weight_decay": decay}
            for letter, lr, decay in (("lora_A", 1e-4, 0.1), ("lora_B", 16e-4, 0.2))
        ]
        optimizer = torch.optim.AdamW(groups)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


class TwoFallingRates(TwoRates):
    def schedule(self, optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


class OurOptimizerAlone(Idefics2Module):
    def configure_optimizers(self):
        return super().configure_optimizers()["optimizer"]


class OurOptimizerAndAnotherGroup(Idefics2Module):
    """Its schedule is ours, the group isn't."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        group = configured["optimizer"].param_groups[0]
        moved = {**group, "params": [group["params"].pop()], "initial_lr": 7e-4, "weight_decay": 0.5}
        configured["optimizer"].param_groups.append(moved)
        schedule = configured["lr_scheduler"]["scheduler"]
        schedule.base_lrs.append(7e-4)
        schedule.lr_lambdas.append(schedule.lr_lambdas[0])
        return configured


@pytest.mark.parametrize(
    ("kind", "lrs", "decays"),
    [
        (TwoRates, [1e-4, 16e-4], [0.1, 0.2]),
        (TwoFallingRates, [1e-4 / 8, 16e-4 / 8], [0.1, 0.2]),
        (OurOptimizerAlone, [3e-3], [0.3]),
        (OurOptimizerAndAnotherGroup, [3e-3 * 3 / 6, 7e-4 * 3 / 6], [0.3, 0.5]),
    ],
)
def test_a_resumed_run_changes_the_rates_of_its_own_groups_alone(rates, tmp_path, kind, lrs, decays):
    _, trainer = rates(3, kind=kind, warmup_steps=0)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    changed = {"kind": kind, "lr": 3e-3, "weight_decay": 0.3, "warmup_steps": 0}
    _, trainer = rates(6, tmp_path / "a.ckpt", **changed)
    assert trainer.callbacks[0].values[0] == pytest.approx(lrs)
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == decays


def test_without_a_last_step_the_rate_stays(rates):
    """By time alone, or without an end."""
    with pytest.warns(UserWarning, match="model.schedule linear: training has no last step at which the learning rate"):
        found, _ = rates({"max_epochs": -1, "max_time": {"seconds": 1}})
    assert found[:3] == [0, 5e-4, 1e-3] and set(found[3:]) <= {1e-3}


def test_weights_alone_are_refused_to_resume_from(rates, tmp_path):
    _, trainer = rates(1)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(InputError, match=r"ckpt_path .*a\.ckpt holds weights alone \(save_weights_only\), from"):
        rates(2, tmp_path / "a.ckpt")


def test_load_from_checkpoint(tmp_path, tiny, processor, examples):
    ours = module(tiny)
    trainer = Trainer(**CPU, max_steps=2)
    trainer.fit(ours, DataLoader(examples[:4], batch_size=2, collate_fn=Idefics2Collator(processor, train=True)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Idefics2Module.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    batch = Idefics2Collator(processor, train=False)(examples[:2])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batch), ours.eval()(batch))


def test_weights_are_loaded_into_a_module_whose_model_is_not_there_yet(tiny):
    ours, other = module(tiny, quantization="none"), module(tiny, quantization="none")
    ours.configure_model()
    with torch.no_grad():
        for parameter in trained_parameters(ours).values():
            parameter.fill_(0.5)
    other.load_state_dict(ours.state_dict())
    assert all((parameter == 0.5).all() for parameter in trained_parameters(other).values())


def test_another_adapters_checkpoint_is_refused(tmp_path, tiny):
    ours = module(tiny)
    ours.configure_model()
    for lora, message in ((LoRA(r=4), "weights differ"), (LoRA(alpha=16), "alpha 8, this run has 16")):
        other = module(tiny, lora=lora)
        other.configure_model()
        with pytest.raises(InputError, match=message):
            other.on_load_checkpoint({"hyper_parameters": dict(ours.hparams)})
            other.load_state_dict(ours.state_dict())
