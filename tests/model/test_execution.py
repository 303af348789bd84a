"""How a model is executed on a card: a table of cards."""

from dataclasses import asdict

import pytest
import torch
from conftest import DATA
from transformers import AutoConfig

from idefics_lit.model.execution import EXECUTION_OPTIONS, Device, Workload, choose_execution
from idefics_lit.model.loading import LoRA
from idefics_lit.model.memory import CUDA_GRAPHS, count_weights

OPEN = dict.fromkeys(EXECUTION_OPTIONS)
STEP = [16, 8, 4, 2, 1]  # batch sizes of a step of 16 on one device
VISION_LORA = LoRA(target_modules=r".*vision_model.*(q_proj|v_proj)$")


@pytest.fixture(scope="module")
def config(hub_files):
    return AutoConfig.from_pretrained(hub_files)


@pytest.fixture(scope="module")
def choose(config):
    counted = {}

    def choose(gib, precision="bf16-mixed", batch_sizes=STEP, *, device=(), sharded=False, load=(), **given):
        options = {"quantization": "nf4", "quantize_vision": False, "lora": asdict(LoRA()), **OPEN, **given}
        key = str((options["quantize_vision"], options["lora"]))
        counted[key] = counted.get(key) or count_weights(config, options)
        tokens = 66 * dict(load).get("images_per_page", 1)
        workload = Workload(batch_sizes, **{"questions_per_row": 4.0, "page_tokens": tokens, **dict(load)})
        card = Device("a card", "cuda", gib, 64)._replace(**dict(device))
        return choose_execution(card, config, counted[key], options, precision, workload, is_sharded=sharded)

    return choose


@pytest.mark.parametrize(
    ("gib", "precision", "splitting", "batch_size", "options"),
    [
        (7.6, "16-mixed", False, 4, ""),
        (14.6, "16-mixed", False, 8, "cuda_graphs"),
        (23.5, "bf16-mixed", False, 16, "cuda_graphs"),
        (39.4, "bf16-mixed", False, 16, "dequantize cuda_graphs compile"),
        (39.4, "16-mixed", False, 16, "dequantize cuda_graphs"),
        (79.0, "bf16-mixed", False, 16, "dequantize cuda_graphs compile"),
        (139.0, "bf16-mixed", False, 16, "dequantize cuda_graphs compile"),
        (7.6, "16-mixed", True, 4, "gradient_checkpointing"),
        (14.6, "16-mixed", True, 8, ""),
        (23.5, "bf16-mixed", True, 4, "cuda_graphs"),
        (39.4, "bf16-mixed", True, 8, "dequantize cuda_graphs compile"),
        (79.0, "bf16-mixed", True, 16, "dequantize cuda_graphs compile"),
    ],
)
def test_a_card_gets_the_fastest_options_that_fit(choose, gib, precision, splitting, batch_size, options):
    chosen = choose(gib, precision, load={"images_per_page": 5 if splitting else 1})
    assert (chosen.batch_size, {name for name, on in chosen.model_options.items() if on}) == (
        batch_size,
        set(options.split()),
    )


def test_two_devices_share_a_step(choose):
    assert choose(79, batch_sizes=[8, 4, 2, 1]).batch_size == 8
    chosen = choose(23.5, batch_sizes=[8, 4, 2, 1])  # half the batch leaves no room for 11 GiB either
    assert (chosen.batch_size, chosen.cuda_graphs, chosen.dequantize) == (8, True, False)


def test_more_rows_need_smaller_batches(choose):
    assert choose(14.6, "16-mixed", load={"questions_per_row": 1.0}).batch_size < choose(14.6, "16-mixed").batch_size
    large = {"images_per_page": 5, "longest_edge": 980}
    assert choose(52, load={**large, "longest_edge": 490}).batch_size > choose(52, load=large).batch_size


def test_a_mean_number_of_questions_is_not_rounded_up(choose):
    """16 questions at 1.5 a page are 11 rows, not the 8 of two a page."""
    plain = {"dequantize": False, "cuda_graphs": False, "gradient_checkpointing": False}
    sizes = [
        [choose(gib, "16-mixed", load={"questions_per_row": mean}, **plain).batch_size for gib in range(8, 24)]
        for mean in (1.5, 2.0)
    ]
    assert sizes[0] != sizes[1] and all(more <= fewer for more, fewer in zip(*sizes, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        {"dequantize": True},
        {"dequantize": False},
        {"cuda_graphs": False},
        {"cuda_graphs": True},
        {"compile": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "dequantize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("gib", [7.6, 14.6, 23.5, 79.0])
def test_given_options_are_kept(choose, gib, given):
    chosen = choose(gib, **given)
    assert {name: getattr(chosen, name) for name in given} == given
    assert not (chosen.cuda_graphs and chosen.gradient_checkpointing)
    assert choose(gib, batch_sizes=[2], **given).batch_size == 2


def test_what_cannot_be_captured_or_compiled_is_left_out(choose):
    """Each of these would fail in the first steps: a trained vision tower, shards, a 16-bit base without 4 bits."""
    assert not choose(79, lora=asdict(VISION_LORA)).cuda_graphs
    sharded = choose(39, batch_sizes=[8], sharded=True, quantization="none")
    assert sharded == (8, False, False, False, False)
    assert not choose(79, quantization="none").dequantize
    assert choose(79, quantization="none").cuda_graphs
    without_compiler = choose(79, device={"can_compile": False})
    assert without_compiler.dequantize and not without_compiler.compile


@pytest.mark.parametrize(("steps", "compiled"), [(40, False), (178, True)])
def test_a_short_fit_is_not_compiled(choose, steps, compiled):
    chosen = choose(139, load={"steps": steps})
    assert (chosen.dequantize, chosen.cuda_graphs, chosen.compile) == (True, True, compiled)
    assert choose(139, load={"steps": steps}, compile=True).compile


def test_a_cpu_runs_plain(choose):
    assert choose(900, "32-true", device={"type": "cpu"}) == (16, False, False, False, False)
    assert choose(64, "32-true", device={"type": "cpu"}, batch_sizes=[8]).batch_size == 8


def test_a_cpu_needs_memory_for_the_resamplers_activations(choose):
    """Unlike a GPU, it doesn't compute them again."""
    cpu = {"device": {"type": "cpu"}, "gradient_checkpointing": False}
    sizes = [
        [choose(gib, "32-true", load={"longest_edge": edge}, **cpu).batch_size for edge in (70, 980)]
        for gib in range(8, 60, 2)
    ]
    assert any(small > full for small, full in sizes) and all(small >= full for small, full in sizes)


def test_what_does_not_fit_at_all_gets_the_least(choose):
    assert choose(1, "16-mixed") == (1, False, False, False, True)


@pytest.mark.parametrize(  # peaks of benchmarks/results/train_throughput*.json
    ("images", "rows", "tokens", "peak", "dequantized"),
    [(16, 16, 112, 29.7, True), (4, 4, 192, 20.9, True), (2, 2, 192, 7.9, False), (20, 4, 432, 30.6, True)],
)
def test_memory_with_cuda_graphs_agrees_with_measurements(config, images, rows, tokens, peak, dequantized):
    options = {"quantization": "nf4", "quantize_vision": False, "lora": asdict(LoRA())}
    weights = count_weights(config, options).gib(in_4_bits=not dequantized, precision="bf16-mixed")
    mib = 3785 * images * CUDA_GRAPHS.mib_per_patch + rows * tokens * CUDA_GRAPHS.mib_per_token
    assert weights + CUDA_GRAPHS.fixed_gib + mib / 1024 == pytest.approx(peak, abs=2)


# Edge of a tile, and tokens of a page of 4 x 4 tiles.
PAGES = {
    "Idefics3-8B-Llama3": (364, 3027),
    "SmolVLM-Instruct": (384, 1548),
    "SmolVLM-256M-Instruct": (512, 1127),
    "SmolVLM2-500M-Video-Instruct": (512, 1127),
}


def choose_with_tiles(name, gib):
    config = AutoConfig.from_pretrained(DATA / "idefics3-files" / name)
    options = {"quantization": "nf4", "quantize_vision": False, "lora": asdict(LoRA()), **OPEN}
    card, workload = Device("a card", "cuda", gib, 64), Workload(STEP, 4.0, 17, *PAGES[name])
    return choose_execution(card, config, count_weights(config, options), options, "bf16-mixed", workload)


@pytest.mark.parametrize(
    ("name", "gib", "batch_size", "options"),
    [
        ("Idefics3-8B-Llama3", 139.0, 8, "dequantize compile"),  # 6,300 tokens: launches take no time, graphs memory
        ("Idefics3-8B-Llama3", 79.0, 8, "dequantize compile"),
        ("Idefics3-8B-Llama3", 39.4, 4, ""),
        ("Idefics3-8B-Llama3", 23.5, 8, "gradient_checkpointing"),
        ("Idefics3-8B-Llama3", 14.6, 8, "gradient_checkpointing"),
        ("SmolVLM-Instruct", 139.0, 16, "dequantize cuda_graphs compile"),
        ("SmolVLM-Instruct", 23.5, 4, "cuda_graphs"),
        ("SmolVLM-256M-Instruct", 79.0, 16, "dequantize cuda_graphs compile"),
        ("SmolVLM-256M-Instruct", 14.6, 16, "dequantize cuda_graphs compile"),
        ("SmolVLM2-500M-Video-Instruct", 7.6, 8, ""),
    ],
)
def test_a_card_gets_options_that_fit_pages_of_seventeen_tiles(name, gib, batch_size, options):
    chosen = choose_with_tiles(name, gib)
    on = {name for name, on in chosen.model_options.items() if on}
    assert (chosen.batch_size, on) == (batch_size, set(options.split()))


def test_counting_leaves_the_random_state(config):
    """A run and its repeat from its saved config, which has nothing to count for, begin with the same adapter."""
    state = torch.get_rng_state()
    count_weights(config, {"quantization": "nf4", "quantize_vision": False, "lora": asdict(LoRA())})
    assert torch.equal(torch.get_rng_state(), state)
