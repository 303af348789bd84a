"""Training speed at full size: transformers' Trainer beside `python -m idefics_lit fit`, one process each, in one run.

    python benchmarks/train_throughput.py --tokenizer tokenizer.model --results benchmarks/results/train_throughput.json

Every contender trains on the same 640 questions, four on each of 160 pages of 14 shapes around 1700 x 2200 px, with
16 questions a step (64 where its name says so) and 12 loader workers, in bfloat16, the recipe and the options of
small cards in float16; "headline" is docvqa.yaml alone. ``--hub_model Idefics3-8B-Llama3`` (or another folder of
tests/assets/idefics3-files) compares on that model, with its pages split into tiles and the options that are worked
out; it needs no tokenizer file. Seconds are from step to step, loading included; the first
steps (compiling, capturing; for the feature cache the first epoch) are left out. ``--image_splitting`` compares with
320 image tokens a page. "agreement" is how far losses lie from those of transformers' own forward with every question
in a row of its own; before transformers 5.21 that places patches wrongly in 16 bits, and losses differ by that too.
Needs what full_size.py needs, and trl; ``--tiny`` tries it on a CPU.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from full_size import GPU_15GB, GPU_80GB, RECIPE, REPOSITORY, arguments, build, command, measure, save, versions

from idefics_lit.model.lora import TARGET_MODULES, LoRA

TILE = 112  # of the small Idefics3 and SmolVLM
SIZES = [(1650 + 9 * i, 2200) for i in range(12)] + [(2200, 1700), (1700, 1700)]  # one page in seven is no portrait


def build_data(folder: Path, tiny: bool) -> None:
    """Write 160 pages with four training questions each, and 8 with four test questions, in the official form."""
    from multiprocessing.pool import ThreadPool

    from PIL import Image

    from idefics_lit.data.sources.synthetic import SyntheticPages, write_docvqa

    for split, pages in (("train", 190), ("test", 12)):
        file = write_docvqa(SyntheticPages(split, pages), folder)
        content = json.loads(file.read_text())
        by_page: dict[str, list[Any]] = {}
        for row in content["data"]:
            by_page.setdefault(row["image"], []).append(row)
        full = [rows[:4] for rows in by_page.values() if len(rows) >= 4][: 160 if split == "train" else 8]
        assert len(full) == (160 if split == "train" else 8)
        content["data"] = [row for rows in full for row in rows]
        file.write_text(json.dumps(content))

    def enlarge(numbered: tuple[int, Path]) -> None:
        number, page = numbered
        Image.open(page).resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC).save(page)

    if not tiny:
        with ThreadPool() as pool:
            pool.map(enlarge, list(enumerate(sorted((folder / "documents").iterdir()))))


def run_trl(options: argparse.Namespace) -> None:
    """Train with TRL's SFTTrainer and its own collator, on answers alone.

    In bfloat16, which it casts adapters to, and without an adapter on the head, which it refuses.
    """
    import transformers
    from datasets import Dataset, Image
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        options.model,
        quantization_config=quantization if cuda else None,
        dtype=dtype,
        device_map={"": 0} if cuda else None,
    )
    processor = transformers.AutoProcessor.from_pretrained(options.model)
    processor.image_processor.do_image_splitting = options.image_splitting
    folder = Path(options.data)
    rows = json.loads((folder / "train_v1.0_withQT.json").read_text())["data"]
    data = Dataset.from_list(
        [
            {
                "images": [str(folder / row["image"])],
                "prompt": [{"role": "user", "content": f"Answer briefly. {row['question']}"}],
                "completion": [{"role": "assistant", "content": row["answers"][0]}],
            }
            for row in rows
        ]
    ).cast_column("images", [Image()])
    times: list[float] = []

    class Times(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    arguments = SFTConfig(
        output_dir=options.work,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        dataloader_num_workers=options.workers,
        learning_rate=1e-4,
        weight_decay=0.01,
        warmup_steps=75,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        max_length=None,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    targets = TARGET_MODULES.removesuffix("|lm_head$")
    lora = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1, init_lora_weights="gaussian", target_modules=targets)
    SFTTrainer(
        model, args=arguments, train_dataset=data, processing_class=processor, peft_config=lora, callbacks=[Times()]
    ).train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    steps = [{"seconds": s} for s in [0.0, *(b - a for a, b in itertools.pairwise(times))]]
    Path(os.environ["STEP_TIMES"]).write_text(json.dumps({"steps": steps, "peak_gib": peak}))


def run_agreement(options: argparse.Namespace) -> None:
    """Print how far our losses lie from transformers' own, on the same questions and without dropout."""
    from itertools import islice

    from lightning import Trainer

    from idefics_lit.data.datamodule import DocVQADataModule
    from idefics_lit.model.cuda_graphs import CALLS_BEFORE_CAPTURE
    from idefics_lit.training.module import Idefics2Module

    cuda = torch.cuda.is_available()
    trainer = Trainer(precision="16-mixed" if cuda else "32-true", logger=False, enable_checkpointing=False)
    losses = {}
    for name, more in {
        "transformers": {"dequantize": False},
        "packed": {"dequantize": False},
        "packed, graphs": {"dequantize": False, "cuda_graphs": True},
        "packed, unpacked, graphs": {"dequantize": True, "cuda_graphs": True},
        "packed, unpacked, graphs, compiled": {"dequantize": True, "cuda_graphs": True, "compile": True},
    }.items():
        data = DocVQADataModule(
            options.data,
            options.model,
            questions_per_page=4,
            batch_size=options.batch or 16,
            num_workers=0,
            val_split="test",
            image_size=options.image_size or (112 if options.tiny else None),
        )
        data.setup("fit")
        batch = next(islice(data.train_dataloader(), 1))
        if name == "transformers":
            loader = data.train_dataloader()
            examples = [loader.dataset[visit] for visit in islice(loader.sampler, options.batch or 16)]
            for example in examples:
                example.page_id = None
            batch = loader.collate_fn(examples)
        module = Idefics2Module(options.model, quantize_vision=False, lora=LoRA(dropout=0.0), **more)
        module.trainer = trainer
        torch.manual_seed(0)
        module.configure_model()
        with torch.no_grad():  # an adapter that does something
            for key, parameter in module.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.01)
        batch = module.transfer_batch_to_device(batch, module.model.device, 0)
        found = []
        for _ in range(CALLS_BEFORE_CAPTURE + 2):  # the last but one is captured, the last replayed
            with trainer.precision_plugin.forward_context():
                if name == "transformers":
                    found.append(module.model(**batch.model_inputs()).loss.item())
                else:
                    loss, tokens = module.loss(batch)
                    found.append((loss / tokens).item())
                    loss.backward()
                    module.zero_grad()
        losses[name] = found
        apart = max(abs(loss - losses["transformers"][0]) for loss in found)
        print(f"{name:40} loss {found[0]:.6f}, from transformers' {apart:.1e}", flush=True)
        del module
    apart = [abs(loss - losses["transformers"][0]) for found in losses.values() for loss in found]
    Path(os.environ["STEP_TIMES"]).write_text(json.dumps({"steps": [], "losses": losses, "apart": max(apart)}))


def main() -> None:
    parser = arguments(__doc__, "throughput")
    parser.add_argument("--image_splitting", action="store_true")
    parser.add_argument("--minutes", type=float, default=60, help="begin no contender later than that")
    parser.add_argument("--contenders", help="only these, with commas")
    for name in ("run", "model", "data"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("batch", "workers", "steps", "image_size"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:  # the child process that is measured
        {"trl": run_trl, "agreement": run_agreement}[options.run](options)
        return

    started, work = time.perf_counter(), options.work
    options.image_splitting |= bool(options.hub_model)
    model, data = build(options, lambda folder: build_data(folder, options.tiny))
    print(f"model and data built in {time.perf_counter() - started:.0f} s", flush=True)
    workers = 0 if options.tiny else 12
    common = ["--model", model, "--data", data, "--work", work]
    common += ["--image_splitting"] if options.image_splitting else []
    common += ["--image_size", 2 * TILE] if options.tiny and options.hub_model else []

    def child(script: str, *arguments: object) -> list[str]:
        return [sys.executable, str(REPOSITORY / "benchmarks" / script), *map(str, [*common, *arguments])]

    def trainer(batch: int, workers: int, steps: int, *more: str) -> list[str]:
        return child("full_size.py", "--batch", batch, "--workers", workers, "--steps", steps, *more)

    def ours(options_of: list[str], *more: object, batch: int = 16, steps: int = 32) -> list[str]:
        changed = [*options_of, "--model.pretrained", model, "--data.source", data, "--data.num_workers", workers]
        changed += ["--trainer.precision", "32-true"] if options.tiny else []
        changed += ["--trainer.max_steps", steps]
        changed += ["--trainer.limit_val_batches", 0, "--trainer.logger", "false"]
        changed += ["--trainer.callbacks", "full_size.StepTimes", "--data.image_splitting", options.image_splitting]
        changed += ["--data.image_size", 2 * TILE if options.hub_model else 112] if options.tiny else []
        changed += ["--data.batch_size", batch, "--data.global_batch_size", max(16, batch)] if batch != 16 else []
        return command("fit", ["docvqa.yaml"], *changed, *more)

    def within(gib: float, typed: list[str]) -> list[str]:
        script = str(REPOSITORY / "benchmarks" / "cards.py")
        return [sys.executable, script, "--limit", str(gib), *typed[typed.index("fit") :]]

    fast, small = GPU_80GB, GPU_15GB
    single, cached = ["--data.questions_per_page", 1], ["--model.feature_cache", "memory"]
    eager, four_bits = ["--model.compile", "false"], ["--model.dequantize", "false", "--model.compile", "false"]
    graphs, plain = ["--model.cuda_graphs", "true"], ["--model.cuda_graphs", "false"]
    epoch = 640 // 16  # what comes after it finds its pages in the cache
    warm_up = 12
    contenders = {  # the command, questions a step, steps that don't count
        "trainer": (trainer(16, workers, 12 if options.image_splitting else 20, "--bf16"), 16, 5),
        "trainer_8": (trainer(8, workers, 10, "--bf16"), 16, 4),
        "packed_cached": (ours(fast, *cached, steps=2 * epoch), 16, epoch + 8),
        "packed_first": (ours(fast), 16, warm_up),
        "uncached": (ours(fast, *single, steps=epoch + 28), 16, epoch + 8),
        "uncached_8": (ours(fast, *single, batch=8), 16, warm_up),
        "cached": (ours(fast, *single, *cached, steps=epoch + 28), 16, epoch + 8),
        "trl": (
            child("train_throughput.py", "--run", "trl", "--batch", 16, "--workers", workers, "--steps", 18),
            16,
            6,
        ),
        "recipe": (trainer(2, 0, 8), 16, 3),
        "packed_cached_64": (ours(fast, *cached, batch=64, steps=30), 64, 16),
        "packed_first_64": (ours(fast, batch=64, steps=20), 64, 10),
        "packed_cached_eager": (ours(fast, *cached, *eager, steps=epoch + 20), 16, epoch + 4),
        "packed_first_eager": (ours(fast, *eager, steps=24), 16, warm_up),
        "packed_first_4_bits": (ours(fast, *four_bits, steps=24), 16, warm_up),
        "gpu_15gb": (ours(small, steps=16), 16, 6),
        "gpu_15gb_no_graphs": (ours(small, *plain, steps=8), 16, 3),
        "docvqa": (ours(RECIPE, steps=6), 16, 2),
        "docvqa_graphs": (ours(RECIPE, *graphs, steps=10), 16, 5),
        "headline": (ours([], steps=2 * epoch), 16, warm_up),  # what everybody types: all is worked out
        "agreement": (child("train_throughput.py", "--run", "agreement", *["--tiny"] * options.tiny), 16, 0),
    }
    if options.hub_model:  # Idefics3 or SmolVLM, with what is worked out
        is_small = any(size in options.hub_model for size in ("256M", "500M"))
        base = ["--model.quantization", "none"] if is_small else []
        off, compiled = ["--model.feature_cache", "off"], ["--model.compile", "true"]
        contenders = {
            "trainer_2": (trainer(2, workers, 8, "--bf16"), 16, 3),
            "trainer_4": (trainer(4, workers, 8, "--bf16"), 16, 3),
            "trainer_16": (trainer(16, workers, 10, "--bf16"), 16, 4),
            "packed_first": (ours(base, *off), 16, warm_up),
            "packed_first_compiled": (ours(base, *off, *compiled), 16, warm_up),
            "packed_cached": (ours(base, *cached, steps=2 * epoch), 16, epoch + 8),
            "packed_cached_compiled": (ours(base, *cached, *compiled, steps=2 * epoch), 16, epoch + 8),
            "uncached": (ours(base, *off, *single, steps=24), 16, warm_up),
            "within_24gb": (within(23.5, ours(base, *off, steps=24)), 16, warm_up),
            "agreement": (
                child("train_throughput.py", "--run", "agreement", "--batch", 4, *["--tiny"] * options.tiny),
                16,
                0,
            ),
        }
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "contenders": {},
    }
    chosen = options.contenders.split(",") if options.contenders else list(contenders)
    for name in chosen:
        typed, batch, warm_up = contenders[name]
        if time.perf_counter() - started > 60 * options.minutes:
            print(f"no time left for {name}", flush=True)
            continue
        result = measure(name, typed, work)
        steps = result.get("step_s", [])[warm_up:]
        report["contenders"][name] = {
            "questions_per_s": round(batch / statistics.median(steps), 2) if steps else None,
            "step_s": result.get("step_s"),
            "wait_s": result.get("wait_s"),
            "peak_gib": result.get("peak_gib"),
            "batch": batch,
            "losses": result.get("losses"),
            **{key: result[key] for key in ("failed", "apart") if key in result},
        }
        save(report, options)
    print(f"\n{report['device']}, {report['versions']}\n{'':20} questions/s  peak GiB")
    for name, result in report["contenders"].items():
        speed, peak = result["questions_per_s"], result["peak_gib"]
        print(f"{name:20} {speed!s:>11}  {f'{peak:.1f}' if peak else ''}  {'FAILED' if 'failed' in result else ''}")


if __name__ == "__main__":
    main()
