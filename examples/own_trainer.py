"""Train and score with a Trainer, callbacks and data of your own.

python examples/own_trainer.py [PRETRAINED]
"""

import logging
import sys
import warnings

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from idefics_lit import ANLS, Example, Idefics2Module, LoRA

# Hide Lightning's advertisement and a warning that concerns its own code.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())
warnings.filterwarnings("ignore", message=".*LeafSpec")

pretrained = sys.argv[1] if len(sys.argv) > 1 else "tiny"  # or HuggingFaceM4/idefics2-8b
seed_everything(0)

# Your data: anything that a DataLoader accepts and that yields Examples.
examples = []
for number in range(8):
    page = Image.new("RGB", (448, 336), "white")
    ImageDraw.Draw(page).text((40, 40), f"Invoice {number}", fill="black", font_size=24)
    examples.append(Example(number, "What is the invoice number?", [page], [str(number)]))

module = Idefics2Module(pretrained, lora=LoRA(r=4), lr=1e-3, warmup_steps=2, max_new_tokens=8)
train = DataLoader(examples[:6], batch_size=2, shuffle=True, collate_fn=module.collator(train=True))
val = DataLoader(examples[6:], batch_size=4, collate_fn=module.collator(train=False))

checkpoint = ModelCheckpoint(monitor="val/anls", mode="max")  # holds the adapter, not the base model
trainer = Trainer(
    max_epochs=2,
    precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
    callbacks=[checkpoint, EarlyStopping("val/loss", patience=3), LearningRateMonitor()],
    logger=CSVLogger("."),  # lightning_logs/version_N
    log_every_n_steps=1,
    gradient_clip_val=1.0,
)
trainer.fit(module, train, val)
(scores,) = trainer.validate(module, val, ckpt_path="best", weights_only=True)

# The best checkpoint's answers and their score, without the Trainer.
best = Idefics2Module.load_from_checkpoint(checkpoint.best_model_path, weights_only=True)
answers = best.answer([example.images[0] for example in examples[6:]], "What is the invoice number?")
anls = ANLS()
anls.update(answers, [example.answers for example in examples[6:]])
print(f"ANLS {anls.compute():.3f}, the Trainer's {scores['val/anls']:.3f}")
