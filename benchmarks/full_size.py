"""The shipped config on a full-size Idefics2 with random weights, beside transformers' Trainer, in one run.

    python benchmarks/full_size.py --tokenizer tokenizer.model --results benchmarks/results/full_size.json

Needs one GPU with 24 GB, 40 GB of disk, and Mistral-7B-v0.1's tokenizer.model (mistral-common ships it as
``tokenizer.model.v1``). It builds the 8.4B model and 80 pages of 1706 x 2198 px, then runs the recipe in transformers'
Trainer and ``python -m idefics_lit`` as a user types it: fit, resume, validate, predict. ``--tiny`` tries all of it on
a CPU with a small model.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from lightning import Callback

from idefics_lit.model.lora import TARGET_MODULES

REPOSITORY = Path(__file__).resolve().parents[1]
WARM_UP = 4  # steps that aren't counted


def flags(group: str, **values: object) -> list[str]:
    """Return options as flags, such as --data.batch_size 16."""
    return [text for name, value in values.items() for text in (f"--{group}.{name}", str(value))]


# What is worked out on a card of 80 GB, on a T4, and what the recipe's article runs, each without a feature cache.
EXECUTION = {"gradient_checkpointing": "false", "feature_cache": "off"}
GPU_80GB = flags("model", dequantize="true", cuda_graphs="true", compile="true", **EXECUTION)
GPU_80GB += flags("data", batch_size=16, questions_per_page=4) + flags("trainer", precision="bf16-mixed")
GPU_15GB = flags("model", dequantize="false", cuda_graphs="true", compile="false", **EXECUTION)
GPU_15GB += flags("data", batch_size=8, questions_per_page=4) + flags("trainer", precision="16-mixed")
RECIPE = flags("model", quantize_vision="true", dequantize="false", cuda_graphs="false", compile="false", **EXECUTION)
RECIPE += flags("data", batch_size=2, questions_per_page=1) + flags("trainer", precision="16-mixed")


class Clock:
    """Marks in time, on the GPU where there is one: it isn't waited for."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> int:
        """Remember now; returns the mark's number."""
        if torch.cuda.is_available():
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append(now)
        return len(self.marks) - 1

    def seconds(self, start: int, end: int) -> float:
        """Between two marks; waits for the GPU."""
        if not torch.cuda.is_available():
            return self.marks[end] - self.marks[start]
        torch.cuda.synchronize()
        return self.marks[start].elapsed_time(self.marks[end]) / 1000


class StepTimes(Callback):
    """Write the seconds, the loss and the memory of every optimizer step to the file that $STEP_TIMES names.

    "wait" are the seconds of it in which no batch was there.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.steps: list[dict[str, Any]] = []
        self.validations: list[tuple[int, int]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.first_step, self.last = trainer.global_step, self.clock.mark()
        self.wait, self.ended = 0.0, time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, *_: Any) -> None:
        self.wait += time.perf_counter() - self.ended

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.ended = time.perf_counter()
        if trainer.global_step == self.first_step + len(self.steps):
            return
        step = {"loss": module.step_loss, "wait": self.wait}  # Lightning's metrics would wait for the GPU
        step["from"], step["to"] = self.last, self.clock.mark()
        if torch.cuda.is_available():
            step["allocated_gib"] = torch.cuda.memory_allocated() / 2**30
            step["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.steps.append(step)
        self.last, self.wait = step["to"], 0.0

    def on_validation_start(self, *_: Any) -> None:
        self.started = self.clock.mark()

    def on_validation_end(self, *_: Any) -> None:
        # A validation between two steps doesn't count as a step's time.
        self.last = self.clock.mark()
        self.validations.append((self.started, self.last))

    def on_fit_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        for step in self.steps:
            step["seconds"] = self.clock.seconds(step.pop("from"), step.pop("to"))
            step["loss"] = float(step["loss"])
        validations = [self.clock.seconds(*marks) for marks in self.validations]
        Path(os.environ["STEP_TIMES"]).write_text(json.dumps({"steps": self.steps, "validation_s": validations}))


def build_model(folder: Path, options: argparse.Namespace) -> None:
    """Write the full-size model with random float16 weights, in the Hub's form."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

    if options.hub_model:
        sys.path.append(str(REPOSITORY / "tests"))
        from hub_files import hub_folder

        hub_folder(options.hub_model, folder)
        if options.tokenizer:
            shutil.copy(options.tokenizer, folder / "tokenizer.json")
    else:
        shutil.copytree(REPOSITORY / "tests" / "assets" / "idefics2-8b-files", folder)
        shutil.copy(options.tokenizer, folder / "tokenizer.model")
    config = AutoConfig.from_pretrained(folder)
    # The tokenizer that takes the place of Idefics3-8B's has another id.
    config.image_token_id = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<image>")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float16)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)


def build_small_model(folder: Path, hub_model: str | None) -> None:
    """Write a small model of the same architecture."""
    if hub_model is None:
        from idefics_lit.model.tiny import build_tiny

        build_tiny(folder)
        return
    sys.path.append(str(REPOSITORY / "tests"))
    from stand_ins import build_stand_in

    build_stand_in("idefics3" if hub_model.startswith("Idefics3") else "smolvlm", folder)


def build(options: argparse.Namespace, write_data: Callable[[Path], None] | None = None) -> tuple[Path, Path]:
    """Build the model, and data if asked, in the folder for work; what an earlier benchmark left there is taken."""
    work: Path = options.work
    model, data = work / "model", work / "data"
    if not (data if write_data else model).exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        if options.tiny:
            build_small_model(model, options.hub_model)
        else:
            build_model(model, options)
            torch.cuda.empty_cache()
        if write_data:
            write_data(data)
    return model, data


def arguments(description: str | None, work: str) -> argparse.ArgumentParser:
    """Return a parser of what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--hub_model", help="a folder of tests/assets/idefics3-files instead of Idefics2-8b")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--work", type=Path, default=Path(f"/tmp/idefics_lit_{work}"))
    parser.add_argument("--tiny", action="store_true")
    return parser


def command(name: str, configs: Sequence[str], *options: object) -> list[str]:
    """Return what a user types, with shipped configs and flags."""
    given = [argument for config in configs for argument in ("--config", REPOSITORY / "configs" / config)]
    return [sys.executable, "-m", "idefics_lit", name, *map(str, [*given, *options])]


def save(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the results if they are asked for, without this machine's paths."""
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1).replace(str(options.work), "WORK").replace(str(REPOSITORY), ".")
        options.results.write_text(text + "\n")


def build_data(folder: Path, size: tuple[int, int]) -> None:
    """Write 320 training questions on 80 pages and 32 test questions on 8, in the official form."""
    from PIL import Image

    from idefics_lit.data.sources.synthetic import SyntheticPages, write_docvqa

    for split, pages, questions in (("train", 80, 320), ("test", 8, 32)):
        file = write_docvqa(SyntheticPages(split, pages), folder)
        content = json.loads(file.read_text())
        content["data"] = content["data"][:questions]
        assert len(content["data"]) == questions
        file.write_text(json.dumps(content))

    def enlarge(page: Path) -> None:
        Image.open(page).resize(size, Image.Resampling.BICUBIC).save(page)

    with ThreadPool() as pool:
        pool.map(enlarge, list((folder / "documents").iterdir()))


def run_trainer(options: argparse.Namespace) -> None:
    """Train with the recipe as the article writes it, in transformers' Trainer; print the figures as JSON."""
    import random

    import transformers
    from peft import LoraConfig, get_peft_model
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if options.bf16 else torch.float16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForImageTextToText.from_pretrained(
        options.model,
        quantization_config=quantization if cuda else None,
        dtype=dtype if cuda else torch.float32,
        device_map={"": 0} if cuda else None,
    )
    lora = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1, init_lora_weights="gaussian", target_modules=TARGET_MODULES)
    model = get_peft_model(model, lora)
    processor = AutoProcessor.from_pretrained(options.model)
    processor.image_processor.do_image_splitting = options.image_splitting
    if options.image_size:
        processor.image_processor.size = {"longest_edge": options.image_size}
    folder = Path(options.data)
    rows = json.loads((folder / "train_v1.0_withQT.json").read_text())["data"]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts, images = [], []
        for row in rows:
            user = [{"type": "text", "text": "Answer briefly."}, {"type": "image"}]
            user.append({"type": "text", "text": row["question"]})
            answer = [{"type": "text", "text": random.choice(row["answers"])}]
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            texts.append(processor.apply_chat_template(messages, add_generation_prompt=False).strip())
            images.append([Image.open(folder / row["image"]).convert("RGB")])
        # Idefics3's chat template writes the BOS, which its tokenizer would add again.
        add_bos = not texts[0].startswith(processor.tokenizer.bos_token)
        batch = processor(text=texts, images=images, return_tensors="pt", padding=True, add_special_tokens=add_bos)
        labels = batch["input_ids"].clone()
        labels[labels == processor.tokenizer.pad_token_id] = -100
        batch["labels"] = labels
        return batch

    times: list[float] = []

    class Times(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        output_dir=options.work,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=16 // options.batch,
        dataloader_num_workers=options.workers,
        learning_rate=1e-4,
        weight_decay=0.01,
        warmup_steps=75,
        fp16=cuda and not options.bf16,
        bf16=cuda and options.bf16,
        use_cpu=not cuda,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Times()])
    trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(times)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    Path(os.environ["STEP_TIMES"]).write_text(
        json.dumps({"steps": [{"seconds": s} for s in [0.0, *seconds]], "peak_gib": peak})
    )


def devices(count: int) -> list[str]:
    """Return the flags for a number of ranks, each on its own GPU, or for two ranks that share one GPU."""
    if count == 2 and torch.cuda.device_count() == 1:
        return ["--trainer.num_nodes", "2", "--trainer.devices", "1"]
    return ["--trainer.devices", str(count)]


def environments(command: Sequence[str]) -> list[dict[str, str]]:
    """Return what is special to each process that a command is to be started in.

    Two ranks can share a GPU when NCCL takes them for two machines. It is no measure of speed: they take turns, and
    speak through sockets.
    """
    if "--trainer.num_nodes" not in command:
        return [{}]
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    both["NCCL_SOCKET_IFNAME"] = "lo"
    return [{**both, "NODE_RANK": rank, "NCCL_HOSTID": f"rank{rank}"} for rank in "01"]


def measure(name: str, command: list[str], work: Path, limit: float | None = None) -> dict[str, Any]:
    """Run a command; return its step times, examples/s, memory and, where it failed, the end of its output.

    After ``limit`` seconds the command and all processes that it started are killed, which counts as a failure.
    """
    file, log = work / f"{name}.steps.json", work / f"{name}.log"
    environment = {**os.environ, "STEP_TIMES": str(file), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    )
    for answers in (*work.glob("*_predictions.jsonl"), work / "submission.json"):  # runs without a logger replace none
        answers.unlink(missing_ok=True)
    own, *others = ({**environment, **special} for special in environments(command))
    started = time.perf_counter()
    ranks = [subprocess.Popen(command, cwd=work, env=other, stdout=subprocess.DEVNULL) for other in others]
    with log.open("w") as out:
        # In a new session, so that the ranks that Lightning starts are killed with it.
        done = subprocess.Popen(
            command, cwd=work, env=own, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            done.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)
            done.wait()
            out.write(f"\nkilled after {limit:.0f} s\n")
    for rank in ranks:
        rank.wait(60)
    result: dict[str, Any] = {"command": " ".join(command), "wall_s": round(time.perf_counter() - started, 1)}
    text = log.read_text()
    result["warnings"] = sorted({line for line in text.splitlines() if "warn" in line.lower()})
    if done.returncode:
        result["failed"] = text[-3000:]
    if file.exists():
        measured = json.loads(file.read_text())
        steps = measured["steps"]
        counted = [step["seconds"] for step in steps[WARM_UP:]]
        if counted:
            result["examples_per_s"] = round(16 * len(counted) / sum(counted), 2)
        peaks = [step["peak_gib"] for step in steps if "peak_gib" in step]
        result["peak_gib"] = max(peaks) if peaks else measured.get("peak_gib")
        result["allocated_gib"] = [round(step["allocated_gib"], 3) for step in steps if "allocated_gib" in step]
        result["losses"] = [round(step["loss"], 4) for step in steps if "loss" in step]
        result["wait_s"] = [round(step["wait"], 3) for step in steps if "wait" in step]
        result["step_s"] = [round(step["seconds"], 3) for step in steps]
        result["validation_s"] = measured.get("validation_s")
        result |= {
            key: measured[key]
            for key in ("losses", "apart", "agreement", "questions_per_s", "peak_gib")
            if key in measured
        }
    print(json.dumps({name: {k: v for k, v in result.items() if k != "command"}}), flush=True)
    return result


def main() -> None:
    parser = arguments(__doc__, "full_size")
    for name in ("bf16", "image_splitting"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("batch", "workers", "steps", "image_size"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:  # the child process that is measured
        run_trainer(options)
        return

    work, started = options.work, time.perf_counter()
    shutil.rmtree(work, ignore_errors=True)
    size = (448, 336) if options.tiny else (1706, 2198)
    model, data = build(options, lambda folder: build_data(folder, size))
    print(f"model and data built in {time.perf_counter() - started:.0f} s", flush=True)

    def trainer(batch: int, workers: int, steps: int) -> list[str]:
        arguments = ["--model", model, "--data", data, "--work", work, "--batch", batch, "--workers", workers]
        return [sys.executable, __file__, *map(str, arguments), "--steps", str(steps)]

    def ours(name: str, *more: object) -> list[str]:
        changed = [*RECIPE, "--model.pretrained", model, "--data.source", data]
        if options.tiny:
            changed += ["--trainer.precision", "32-true", "--data.image_size", "112"]
        return command(name, ["docvqa.yaml"], *changed, *more)

    # 20 steps, then a validation, and a checkpoint with it.
    fit = ["--trainer.max_steps", 20, "--data.val_every_n_steps", 20, "--trainer.callbacks+=full_size.StepTimes"]
    one_batch = ["--data.batch_size", 16, *fit]
    results = {
        "trainer, batch 2 x 8, no workers": measure("trainer_2x8", trainer(2, 0, 10), work),
        "trainer, batch 2 x 8, 12 workers": measure("trainer_2x8_12", trainer(2, 12, 14), work),
        "ours, batch 2 x 8": measure("fit", ours("fit", *fit), work),
    }
    checkpoint = next((work / "lightning_logs").rglob("last.ckpt"))
    size = checkpoint.stat().st_size
    adapter = sum(
        v.numel() * v.element_size() for v in torch.load(checkpoint, weights_only=True)["state_dict"].values()
    )
    resume = ["--ckpt_path", checkpoint, "--trainer.max_steps", 25, "--data.val_every_n_steps", 5]
    results["resume, 5 steps"] = measure(
        "resume", ours("fit", *resume, "--trainer.callbacks+=full_size.StepTimes"), work
    )
    results["validate"] = measure("validate", ours("validate", "--ckpt_path", checkpoint), work)
    results["predict"] = measure("predict", ours("predict", "--ckpt_path", checkpoint), work)
    results["trainer, batch 16 x 1, 12 workers"] = measure("trainer_16x1_12", trainer(16, 12, 16), work)
    results["ours, batch 16 x 1"] = measure("fit_16x1", ours("fit", *one_batch), work)
    report = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "checkpoint_bytes": size,
        "adapter_and_moments_bytes": 3 * adapter,
        "contenders": results,
    }
    save(report, options)
    print(f"\n{report['device']}, {report['versions']}")
    print(f"checkpoint {size} bytes, adapter and two moments {3 * adapter}")
    print(f"{'':36} examples/s  peak GiB")
    for name, result in results.items():
        speed, peak = result.get("examples_per_s", ""), result.get("peak_gib")
        print(f"{name:36} {speed!s:>10}  {f'{peak:.1f}' if peak else ''}  {'FAILED' if 'failed' in result else ''}")
    for name in ("fit", "validate"):
        print(f"\n--- the screen of {name}\n" + (work / f"{name}.log").read_text()[-4000:])


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "lightning")}


if __name__ == "__main__":
    main()
