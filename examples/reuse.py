"""Use the module, the collator and the metric in a Lightning project of your own, with data of your own.

python examples/reuse.py [PRETRAINED]
"""

import sys

from lightning import Trainer
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from idefics_lit import ANLS, Example, Idefics2Module, LoRA

pretrained = sys.argv[1] if len(sys.argv) > 1 else "tiny"  # or HuggingFaceM4/idefics2-8b

# Your data: any dataset that a DataLoader accepts and that yields Examples.
examples = []
for number in range(8):
    page = Image.new("RGB", (448, 336), "white")
    ImageDraw.Draw(page).text((40, 40), f"Invoice {number}", fill="black", font_size=24)
    examples.append(Example(number, "What is the invoice number?", [page], [str(number)]))

module = Idefics2Module(pretrained, lora=LoRA(r=4), lr=1e-3, warmup_steps=0, max_new_tokens=8)
train = DataLoader(examples, batch_size=2, collate_fn=module.collator(train=True))
val = DataLoader(examples, batch_size=4, collate_fn=module.collator(train=False))
trainer = Trainer(max_steps=2, precision="32-true", accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(module, train, val)

# Answers and the metric, without the Trainer.
answers = module.answer([example.images[0] for example in examples], "What is the invoice number?")
anls = ANLS()
anls.update(answers, [example.answers for example in examples])
print(f"ANLS {anls.compute():.3f}")
