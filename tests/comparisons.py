"""What several tests compare: a module with an adapter that does something, and the losses of transformers' Trainer."""

from dataclasses import replace

import torch
import transformers
from lightning import Callback
from torch.utils.data import SequentialSampler

from idefics_lit import Idefics2Module, LoRA


def adapted_module(folder, target_modules=None, *, std=0.1, **options):
    """Return a module in eval mode whose LoRA weights B aren't zero."""
    torch.manual_seed(0)
    lora = LoRA(dropout=0.0, **({"target_modules": target_modules} if target_modules else {}))
    ours = Idefics2Module(folder, lora=lora, **options)
    ours.configure_model()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return ours.eval()


def alone(examples):
    """Return the questions without their page's id, so that each has a row of its own."""
    return [replace(example, page_id=None) for example in examples]


def answer_logits_loss_and_gradients(ours, batch):
    """Return the logits of the answers' tokens, the loss and its tokens, and the gradients by name."""
    ours.zero_grad()
    loss, tokens = ours.loss(batch)
    loss.backward()
    with torch.no_grad():
        logits = ours(batch)[:, :-1][batch.labels[:, 1:] != -100]
    return logits, loss, tokens, {name: p.grad.clone() for name, p in ours.named_parameters() if p.requires_grad}


class StepLosses(Callback):
    """Remembers the loss of each optimizer step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step > len(self.values):
            self.values.append(trainer.callback_metrics["train/loss"].item())


class _InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def trainer_losses(ours, data, collate, folder, *, steps, accumulate):
    """Return the losses of transformers' Trainer with a module's model: batches of 2, lr 1e-3, 5 warm-up steps."""
    ours.configure_model()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-3,
        weight_decay=0.01,
        warmup_steps=5,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )
    reference = _InOrder(
        ours.model, arguments, train_dataset=data, data_collator=lambda batch: collate(batch).model_inputs()
    )
    reference.train()
    return [entry["loss"] for entry in reference.state.log_history if "loss" in entry]
