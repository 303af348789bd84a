"""Validation at full size: plain `generate` beside `python -m idefics_lit validate`, one process each, in one run.

    python benchmarks/validation.py --tokenizer tokenizer.model --results benchmarks/results/validation.json

640 questions, four on each of 160 pages around 1700 x 2200 px, at most 20 new tokens. The weights are random, so no
answer ends early. ``generate_N`` is transformers' own, N questions a batch, 4 bits, each question with its page, 12
loader workers; "unpacked" with its weights in 16 bits, as ours has them; ``generate_best`` is the fastest of them. Ours
computes the loss and the scores besides. The first batch is left out. "agreement" is how many of 500 answers of the
reader that comes with the package differ, in 16 bits, and what that does to ANLS. Needs what full_size.py needs;
``--tiny`` tries it on a CPU.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from full_size import GPU_15GB, GPU_80GB, arguments, build, command, measure, save, versions
from lightning import Callback
from train_throughput import build_data

NEW_TOKENS = 20


class BatchTimes(Callback):
    """Write when each batch of a validation was done, and its questions, to the file that $STEP_TIMES names."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.steps.append({"at": time.perf_counter(), "questions": len(batch.question_ids)})

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            write(self.steps)


def write(steps: list[dict[str, float]]) -> None:
    """Write questions/s after the first batch, and the peak memory."""
    cuda = torch.cuda.is_available()
    questions = sum(step["questions"] for step in steps[1:])
    result = {
        "steps": [],
        "questions_per_s": round(questions / (steps[-1]["at"] - steps[0]["at"]), 2),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }
    Path(os.environ["STEP_TIMES"]).write_text(json.dumps(result))


def alone(loader: Any) -> Any:
    """Give each question of a loader's batches its own row with its page, as in batches without packing."""
    collate = loader.collate_fn

    def collate_alone(examples: Any) -> Any:
        for example in examples:
            example.page_id = None
        return collate(examples)

    loader.collate_fn = collate_alone
    return loader


def generate(model: Any, processor: Any, batch: Any) -> torch.Tensor:
    """Answer a batch with transformers' generate; returns the new tokens (B, T)."""
    device, dtype, tokenizer = model.device, model.dtype, processor.tokenizer
    fake, image, end = tokenizer.convert_tokens_to_ids(
        ["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
    )
    batch = batch.to(device)
    inputs = {"input_ids": batch.prompts.input_ids, "attention_mask": batch.prompts.attention_mask}
    inputs |= {"pixel_values": batch.pixel_values.to(dtype), "pixel_attention_mask": batch.pixel_attention_mask}
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        ids: torch.Tensor = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=[tokenizer.eos_token_id, end],
            bad_words_ids=[[fake], [image]],
            pad_token_id=tokenizer.pad_token_id,
        )
    return ids[:, batch.prompts.input_ids.shape[1] :]


def run_generate(options: argparse.Namespace) -> None:
    """Answer with transformers' generate, every question with its page."""
    from idefics_lit.data.datamodule import DocVQADataModule
    from idefics_lit.model.loading import load_model
    from idefics_lit.model.lora import LoRA

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    device = torch.device("cuda" if cuda else "cpu")
    unpacked = {"quantize_vision": False, "dequantize": True} if options.unpacked else {}
    model = load_model(options.model, quantization="nf4", lora=LoRA(), dtype=dtype, device=device, **unpacked).eval()
    data = DocVQADataModule(
        options.data,
        options.model,
        val_split="train",
        eval_batch_size=options.batch,
        num_workers=0 if options.tiny else 12,
        image_size=112 if options.tiny else None,
    )
    data.setup("validate")
    steps = []
    for batch in alone(data.val_dataloader()):
        generate(model, data.processor, batch)
        if cuda:
            torch.cuda.synchronize()
        steps.append({"at": time.perf_counter(), "questions": len(batch.question_ids)})
        if len(steps) == options.steps:
            break
    write(steps)


def run_agreement(_: argparse.Namespace) -> None:
    """Answer 500 questions with the small reader in 16 bits, with generate and as validation does."""
    from lightning import Trainer

    from idefics_lit.data.datamodule import DocVQADataModule
    from idefics_lit.metrics import anls
    from idefics_lit.training.module import Idefics2Module

    cuda = torch.cuda.is_available()
    trainer = Trainer(precision="bf16-mixed" if cuda else "32-true", logger=False, enable_checkpointing=False)
    module = Idefics2Module("tiny", quantization="none", cuda_graphs=True, max_new_tokens=NEW_TOKENS)
    module.trainer = trainer
    module.configure_model()
    module.eval()
    data = DocVQADataModule("synthetic", "tiny", limit_val=500, eval_batch_size=32, num_workers=0)
    data.setup("validate")
    answers: dict[str, dict[int, str]] = {"generate": {}, "ours": {}}
    references = {}
    for batch in alone(data.val_dataloader()):
        ids = generate(module.model, module.processor, batch)
        texts = module.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers["generate"] |= zip(batch.prompts.indices, (text.strip() for text in texts), strict=True)
        references |= zip(batch.prompts.indices, batch.prompts.references, strict=True)
    for batch in data.val_dataloader():
        texts = module.generate(module.transfer_batch_to_device(batch, module.model.device, 0))
        answers["ours"] |= zip(batch.prompts.indices, texts, strict=True)
    result = {
        "questions": len(references),
        "differing": sum(answers["generate"][i] != answers["ours"][i] for i in references) / len(references),
        "anls": {
            name: sum(anls(given[i], references[i]) for i in references) / len(references)
            for name, given in answers.items()
        },
    }
    Path(os.environ["STEP_TIMES"]).write_text(json.dumps({"steps": [], "agreement": result}))


def main() -> None:
    parser = arguments(__doc__, "validation")
    parser.add_argument("--contenders", help="only these, with commas")
    for name in ("run", "model", "data"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("batch", "steps"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--unpacked", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:  # the child process that is measured
        {"generate": run_generate, "agreement": run_agreement}[options.run](options)
        return

    work = options.work
    model, data = build(options, lambda folder: build_data(folder, options.tiny))

    def child(run: str, batch: int = 0, *more: str) -> list[str]:
        arguments = ["--run", run, *more, "--model", model, "--data", data]
        arguments += ["--batch", batch, "--steps", max(4, 192 // max(batch, 1))]
        arguments += ["--tiny"] if options.tiny else []
        return [sys.executable, __file__, *map(str, arguments)]

    def ours(options_of: list[str], *more: object) -> list[str]:
        changed = [*options_of, "--data.global_batch_size", "null"]
        changed += ["--model.pretrained", model, "--data.source", data, "--data.val_split", "train"]
        changed += ["--data.num_workers", 0 if options.tiny else 12, "--model.max_new_tokens", NEW_TOKENS]
        changed += ["--trainer.logger", "false", "--trainer.callbacks", "validation.BatchTimes"]
        changed += ["--data.image_size", 112, "--trainer.precision", "32-true"] if options.tiny else []
        return command("validate", ["docvqa.yaml"], *changed, *more)

    contenders = {
        "ours": ours(GPU_80GB),
        "generate_16": child("generate", 16),
        "generate_64": child("generate", 64),
        "generate_128": child("generate", 128),
        "generate_64_unpacked": child("generate", 64, "--unpacked"),
        "generate_128_unpacked": child("generate", 128, "--unpacked"),
        "ours_16": ours(GPU_80GB, "--data.eval_batch_size", 16),
        "ours_256": ours(GPU_80GB, "--data.eval_batch_size", 256),
        "ours_15gb": ours(GPU_15GB),
        "agreement": child("agreement"),
    }
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "contenders": {},
    }
    chosen = options.contenders.split(",") if options.contenders else list(contenders)
    found = report["contenders"]
    for name in chosen:
        result = measure(name, contenders[name], work)
        keys = ("questions_per_s", "peak_gib", "agreement", "failed")
        found[name] = {key: result.get(key) for key in keys if key in result}
        plain = [found[name] for name in found if name.startswith("generate_") and "questions_per_s" in found[name]]
        if plain:
            found["generate_best"] = max(plain, key=lambda contender: contender["questions_per_s"])
        save(report, options)
    print(f"\n{report['device']}, {report['versions']}\n{'':20} questions/s  peak GiB")
    for name, result in found.items():
        print(f"{name:20} {result.get('questions_per_s')!s:>11}  {result.get('peak_gib') or 0:.1f}")


if __name__ == "__main__":
    main()
