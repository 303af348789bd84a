"""Adapters, configs and models that come from elsewhere: peft's, transformers', or those that `export` wrote."""

import json

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

from idefics_lit import DocVQADataModule, Idefics2Module, InputError, LoRA
from idefics_lit.data.sources.synthetic import SyntheticPages

CPU = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
       "enable_model_summary": False}  # fmt: skip
OPTIONS = {"quantization": "none", "lr": 1e-2, "warmup_steps": 0, "max_new_tokens": 2}
CONFIG = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def examples():
    pages = SyntheticPages("train", 4)
    return [pages[i] for i in range(4)]


@pytest.fixture
def batch(tiny, examples):
    return Idefics2Module(tiny).collator(train=True, image_size=112)(examples[:2])


@pytest.fixture
def base(tiny):
    return AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32)


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter that plain peft wrote, whose update isn't zero."""
    torch.manual_seed(0)
    model = get_peft_model(base, CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    return str(tmp_path / "adapter")


@pytest.fixture
def fit(examples, tmp_path):
    """Train a module for a step; return the file of its checkpoint."""

    def fit(module, steps=1):
        loader = DataLoader(examples[:2], batch_size=2, collate_fn=module.collator(train=True, image_size=112))
        trainer = Trainer(**CPU, max_steps=steps)
        trainer.fit(module, loader)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return fit


def loss(module, batch):
    module.configure_model()
    with torch.no_grad():
        return module.eval().loss(batch)[0].item()


def reload(path, kind=Idefics2Module):
    return kind.load_from_checkpoint(path, weights_only=True)


def test_a_peft_config(tiny, batch, fit):
    module = Idefics2Module(tiny, lora=CONFIG, **OPTIONS)
    other = reload(fit(module))
    assert loss(other, batch) == loss(module, batch)
    config = other.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.task_type) == (4, 8, True, "CAUSAL_LM")
    assert LoRA.from_peft(config) == LoRA(**module.hparams.lora) == LoRA.from_peft(LoRA.from_peft(config).to_peft())


def test_another_scale_is_refused(tiny, fit):
    path = fit(Idefics2Module(tiny, lora=CONFIG, **OPTIONS))
    other = LoRA(4, 8, 0.0, True, ["q_proj", "v_proj"], {"task_type": "CAUSAL_LM"})
    with pytest.raises(InputError, match=r"trained with model\.lora\.options\.use_rslora True, this run has None"):
        Trainer(**CPU).validate(Idefics2Module(tiny, lora=other, **OPTIONS), [], ckpt_path=path, weights_only=True)


def test_an_adapter_of_pefts_is_the_start(tiny, base, adapter, batch, fit):
    """Its loss is that of the model that peft loads, and training continues from it."""
    reference = Idefics2Module(tiny, **OPTIONS)
    reference.configure_model(PeftModel.from_pretrained(base, adapter))
    module = Idefics2Module(tiny, adapter=adapter, **OPTIONS)
    assert loss(module, batch) == loss(reference, batch) != loss(Idefics2Module(tiny, lora=CONFIG, **OPTIONS), batch)
    started = {name: parameter.clone() for name, parameter in module.state_dict().items()}
    path = fit(module)
    assert any(not torch.equal(value, started[name]) for name, value in module.state_dict().items())
    assert loss(reload(path), batch) == loss(module, batch)
    assert "adapter" not in torch.load(path, weights_only=True)["hyper_parameters"]


def test_an_exported_adapter_is_the_start_on_the_command_line(run, short_fit, tiny, capsys):
    saving = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", 1)
    folder = run(*short_fit("--trainer.max_steps", 1, "--data.prompt_style", "idefics", *saving))
    (path,) = folder.rglob("*.ckpt")
    run("export", "--ckpt_path", path, "--output", "mine")
    with pytest.warns(UserWarning, match=r"trained with data\.prompt_style 'idefics', here 'recipe'"):
        run(*short_fit("--model.adapter", "mine", "--trainer.max_steps", 1, "--trainer.limit_val_batches", 0))
    start = Idefics2Module(tiny, adapter=str(folder / "mine"), quantization="none")
    start.configure_model()
    trained = reload(path)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in start.state_dict().items())
    assert start.collator(train=False).prompt_style == "idefics"
    with pytest.raises(SystemExit):
        run(*short_fit("--model.pretrained", "mine"))
    assert f"give --model.pretrained {tiny} --model.adapter mine" in capsys.readouterr().err


def test_options_beside_an_adapter(tiny, adapter):
    with pytest.raises(InputError, match=r"model\.lora: model\.adapter .* has other options, LoRA\(r=4, .*leave"):
        Idefics2Module(tiny, adapter=adapter, lora=LoRA(r=16))
    saved = LoRA(4, 8, 0.0, True, ["q_proj", "v_proj"], {"task_type": "CAUSAL_LM", "use_rslora": True})
    assert Idefics2Module(tiny, adapter=adapter, lora=saved).hparams.lora["r"] == 4


def test_what_is_no_lora_adapter_is_refused(tiny, base, adapter, tmp_path):
    with pytest.raises(InputError, match=r"model\.adapter 'nothing': no adapter can be read"):
        Idefics2Module(tiny, adapter="nothing")
    get_peft_model(base, IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(tmp_path / "ia3")
    with pytest.raises(InputError, match=r"is of the kind IA3: only LoRA"):
        Idefics2Module(tiny, adapter=str(tmp_path / "ia3"))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 2}))
    with pytest.raises(InputError, match=r"model\.adapter .* doesn't fit model\.pretrained \(.*: give the base model"):
        Idefics2Module(tiny, adapter=adapter, **OPTIONS).configure_model()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 4, "target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match=r"doesn't fit model\.pretrained, \d+ weights have no counterpart, such as"):
        Idefics2Module(tiny, adapter=adapter, **OPTIONS).configure_model()


def test_a_loaded_model_is_trained(tiny, base, batch, fit):
    module = Idefics2Module(tiny, **OPTIONS)
    module.configure_model(base)
    assert module.model.get_base_model() is base
    path = fit(module)
    assert loss(reload(path), batch) == loss(module, batch)


def test_a_peft_model_is_trained_on(tiny, base, adapter, batch, fit):
    module = Idefics2Module(tiny, **OPTIONS)
    module.configure_model(PeftModel.from_pretrained(base, adapter))  # loaded frozen
    before = loss(module, batch)
    path = fit(module, steps=3)
    assert loss(module, batch) < before
    assert loss(reload(path), batch) == loss(module, batch)


def test_the_options_of_a_peft_model_decide_what_is_cached(tiny, base, docvqa):
    """Also with the options of `LoRA` that the module has by default, which leave the vision tower frozen."""
    module = Idefics2Module(tiny, **OPTIONS)
    pages = DocVQADataModule(str(docvqa), tiny, image_size=112, limit_train=4, limit_val=1, num_workers=0)
    config = LoraConfig(r=2, target_modules=r".*vision_model.*q_proj")

    class TakesModel(Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.configure_model(get_peft_model(base, config))

    trainer = Trainer(**CPU, max_steps=1, limit_val_batches=0, callbacks=TakesModel())
    trainer.fit(module, pages)
    assert module.options.feature_cache == "off"


def test_a_checkpoint_of_a_changed_base_needs_that_base(tiny, base, batch, fit):
    with torch.no_grad():
        base.lm_head.weight.mul_(1.1)
    module = Idefics2Module(tiny, **OPTIONS)
    module.configure_model(base)
    path = fit(module)
    with pytest.raises(InputError, match=r"another base model than .* such as lm_head\.weight\)"):
        reload(path)
    other = Idefics2Module(tiny, **OPTIONS)
    other.configure_model(module.model.unload())
    Trainer(**CPU).validate(other, [], ckpt_path=path, weights_only=True)


def test_a_peft_model_with_other_adapters_is_refused(tiny, base):
    model = get_peft_model(base, CONFIG, adapter_name="mine")
    with pytest.raises(InputError, match=r"has the adapters mine \(LORA\): give one with a LoRA adapter named"):
        Idefics2Module(tiny).configure_model(model)


class WithToken(Idefics2Module):
    """Adds a token to processor and model."""

    def load_processor(self, **options):
        processor = super().load_processor(**options)
        processor.tokenizer.add_tokens(["<date>"])
        return processor

    def prepare_base(self, model):
        model.resize_token_embeddings(len(self.processor.tokenizer), mean_resizing=False)


TOKENS = LoRA(target_modules=r".*text_model.*q_proj", options={"modules_to_save": ["embed_tokens", "lm_head"]})


def test_a_token_is_added_and_trained(tiny, batch, fit, examples):
    module = WithToken(tiny, lora=TOKENS, **OPTIONS)
    token = len(module.collator(train=True).processor.tokenizer) - 1
    examples = [type(e)(e.question_id, "When? <date>", e.images, e.answers) for e in examples[:2]]
    batch = module.collator(train=True, image_size=112)(examples)
    assert (batch.input_ids == token).any()
    module.configure_model()
    before = module.model.get_input_embeddings().weight[token].clone()
    loader = DataLoader(examples, batch_size=2, collate_fn=module.collator(train=True, image_size=112))
    trainer = Trainer(**CPU, max_steps=1)
    trainer.fit(module, loader)
    assert not torch.equal(module.model.get_input_embeddings().weight[token], before)
    trainer.save_checkpoint(path := fit(module))
    assert loss(reload(path, WithToken), batch) == loss(module, batch)


def test_new_rows_that_no_checkpoint_holds_are_named_and_always_the_same(tiny):
    rows = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = WithToken(tiny, **OPTIONS)
        with pytest.warns(UserWarning, match="prepare_base added 1 rows to the embedding, which are neither trained"):
            module.configure_model()
        rows.append(module.model.get_input_embeddings().weight[-1])
    assert torch.equal(*rows)


def test_initializations_that_change_the_base_are_refused(tiny):
    with pytest.raises(InputError, match=r"model\.lora\.init olora: it may change the base model's weights"):
        Idefics2Module(tiny, lora=LoRA(init="olora"), **OPTIONS).configure_model()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_an_adapter_in_16_bits_is_refused_with_the_reason(tiny, precision):
    with pytest.raises(InputError, match=rf"trainer\.precision {precision}: .*bf16-mixed.*rounded away"):
        Trainer(**CPU, precision=precision).fit(Idefics2Module(tiny, **OPTIONS), [])


def test_an_adapter_is_the_start_in_a_users_own_command_line(tiny, adapter):
    args = ["--model.pretrained", tiny, "--model.adapter", adapter, "--model.quantization", "none"]
    cli = LightningCLI(Idefics2Module, run=False, args=args, save_config_callback=None)
    assert cli.model.hparams.lora == LoRA.from_peft(CONFIG).__dict__
    assert "adapter" not in cli.model.hparams
