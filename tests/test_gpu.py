"""Tests that need a GPU; `pytest -m gpu` runs them."""

import shutil
import signal

import pytest
import torch
from lightning import Trainer

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.model.cuda_graphs import CALLS_BEFORE_CAPTURE, CudaGraphCache
from idefics_lit.model.loading import LoRA
from idefics_lit.pretrained import load_processor
from idefics_lit.training.module import Idefics2Module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("graphs", ["false", "true"])
def test_fit_in_mixed_precision(run, tiny, docvqa, precision, graphs):
    options = ["--model.pretrained", tiny, "--data.source", docvqa, "--data.limit_train", 4, "--trainer.max_steps", 6]
    options += ["--model.cuda_graphs", graphs, "--trainer.precision", precision, "--trainer.gradient_clip_val", 1.0]
    options += ["--trainer.devices", 1]
    folder = run("fit", *options)
    checkpoint = torch.load(next(folder.rglob("*.ckpt")), weights_only=True)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.parametrize("graphs", ["false", "true"])
def test_a_resumed_fit_is_as_near_as_the_same_fit_again(run, short_fit, graphs, capsys):
    """Sums on a GPU differ in the last bits; the resumed fit runs the first steps of a captured shape uncaptured."""
    args = short_fit("--model.cuda_graphs", graphs, "--model.quantization", "nf4", "--data.num_workers", 2)
    args += ["--trainer.accelerator", "gpu", "--trainer.devices", 1, "--trainer.precision", "16-mixed"]
    every = ["--trainer.callbacks+", "lightning.pytorch.callbacks.ModelCheckpoint"]
    every += ["--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.save_top_k", "-1"]

    def adapter(*more):
        folder = run(*args, *every, *more)
        checkpoints = {
            torch.load(path, weights_only=True)["global_step"]: path for path in folder.rglob("*step=*.ckpt")
        }
        return checkpoints, torch.load(checkpoints[max(checkpoints)], weights_only=True)["state_dict"]

    checkpoints, whole = adapter()
    middle = shutil.copy(checkpoints[4], "middle.ckpt")
    shutil.rmtree("lightning_logs")
    _, again = adapter()
    shutil.rmtree("lightning_logs")
    _, resumed = adapter("--ckpt_path", middle)
    begun = torch.load(middle, weights_only=True)["state_dict"]

    def apart(first, second):
        return sum((first[name] - second[name]).double().norm() ** 2 for name in first) ** 0.5

    noise, difference, moved = apart(whole, again), apart(whole, resumed), apart(whole, begun)
    with capsys.disabled():
        print(f"\nadapters apart: the same fit again {noise:.1e}, resumed {difference:.1e}; moved by {moved:.1e} since")
    assert difference <= max(3 * noise, 0.02 * moved)


@pytest.mark.parametrize("options", [{}, {"dequantize": True}, {"dequantize": True, "compile": True}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_graphs_give_the_loss_and_the_gradients_of_what_they_capture(tiny, options, dropout):
    """Also with dropout: a replayed graph reads the current state of the random generator."""
    pages = SyntheticPages("train", 4)
    collate = Idefics2Collator(load_processor(tiny), train=True)
    examples = [pages[i] for i in range(16)]
    for example in examples:
        example.answers = example.answers[:1]
    batches = [collate(examples[:8]), collate(examples[8:])]
    found = []
    for graphs in (False, True):
        torch.manual_seed(0)
        module = Idefics2Module(tiny, lora=LoRA(dropout=dropout), cuda_graphs=graphs, **options)
        module.trainer = Trainer(precision="32-true", logger=False, enable_checkpointing=False)
        module.configure_model()
        results = []
        for step in range(CALLS_BEFORE_CAPTURE + 2):  # plain, captured, replayed, each batch
            for batch in batches:
                torch.manual_seed(step)
                loss, tokens = module.loss(module.transfer_batch_to_device(batch, module.model.device, 0))
                (loss / tokens).backward()
            grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            results.append((loss.item(), grads))
            with torch.no_grad():  # an optimizer step: the graph must read the new weights
                for name, parameter in module.named_parameters():
                    if parameter.grad is not None:
                        parameter.sub_(grads[name], alpha=0.01)
            module.zero_grad()
        found.append(results)
    assert len({loss for loss, _ in found[0]}) == CALLS_BEFORE_CAPTURE + 2
    for (plain, plain_grads), (graphed, graphed_grads) in zip(*found, strict=True):
        assert graphed == pytest.approx(plain, rel=1e-4)
        assert graphed_grads.keys() == plain_grads.keys()
        for name, grad in plain_grads.items():
            assert (graphed_grads[name] - grad).norm() <= 1e-2 * grad.norm() + 1e-5


def test_a_module_without_a_trainer_answers(tiny):
    page = SyntheticPages("test", 1)[0]
    module = Idefics2Module(tiny)
    answers = module.answer(page.images, page.question)
    assert module.device.type == "cuda" and len(answers) == 1


def test_two_forwards_before_a_backward_are_refused(tiny):
    pages = SyntheticPages("train", 1)
    batch = Idefics2Collator(load_processor(tiny), train=True)([pages[0]])
    module = Idefics2Module(tiny, cuda_graphs=True)
    module.configure_model()
    batch = module.transfer_batch_to_device(batch, module.model.device, 0)
    for _ in range(CALLS_BEFORE_CAPTURE):
        module.loss(batch)[0].backward()
    first, _ = module.loss(batch)
    module.loss(batch)
    with pytest.raises(RuntimeError, match="backward must come before"):
        first.backward()


def test_answers_with_graphs_are_those_without():
    """In float32, token for token, with full and partial batches whose rows finish at different steps."""
    pages = SyntheticPages("validation", 30)
    collate = Idefics2Collator(load_processor("tiny"), train=False)
    examples = [pages[i] for i in range(120)]
    batches = [collate(examples[start:stop]) for start, stop in ((0, 64), (64, 75), (75, 120), (0, 64))]
    found = []
    for graphs in (False, True):
        module = Idefics2Module("tiny", quantization="none", cuda_graphs=graphs)
        module.trainer = Trainer(precision="32-true", logger=False, enable_checkpointing=False)
        module.configure_model()
        module.eval()
        batches = [module.transfer_batch_to_device(batch, module.model.device, 0) for batch in batches]
        found.append([module.generate(batch) for batch in batches])
    assert found[0] == found[1]
    assert len({answer for answers in found[0] for answer in answers}) > 50


def test_graphs_are_freed_when_a_new_shape_runs_out_of_memory():
    """The function is called when a shape is new, and at its second use, which captures it; a graph doesn't call it."""
    layer = torch.nn.Linear(64, 64, device="cuda")
    rows = []

    def function(x):
        rows.append(len(x))
        if rows.count(2) == 1 and len(x) == 2:
            raise torch.OutOfMemoryError
        return layer(x).relu()

    graphed = CudaGraphCache(function, layer)

    def use(count):
        x = torch.randn(count, 64, device="cuda")
        result = graphed.replay(x, calls_before_capture=1)
        torch.testing.assert_close(result, layer(x).relu())
        result.sum().backward()

    for _ in range(3):
        use(1)
    assert rows == [1, 1]
    use(2)
    assert rows == [1, 1, 2, 2]
    for _ in range(3):
        use(1)
    assert rows == [1, 1, 2, 2, 1, 1]


SHARED = {"LOCAL_RANK": "0", "NODE_RANK": "{rank}", "NCCL_HOSTID": "rank{rank}", "NCCL_SOCKET_IFNAME": "lo"}
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


@pytest.mark.parametrize(
    ("environment", "nodes", "devices"),
    [
        # Two ranks on one GPU: NCCL must believe that they are on two machines.
        pytest.param(SHARED, 2, 1, id="shared"),
        pytest.param({"LOCAL_RANK": "{rank}", "NODE_RANK": "0"}, 1, 2, id="own", marks=TWO_GPUS),
    ],
)
def test_two_ranks_end_after_the_same_batch(two_ranks, tmp_path, environment, nodes, devices):
    options = ["--trainer.num_nodes", str(nodes), "--trainer.devices", str(devices), "--trainer.accelerator", "gpu"]
    options += ["--trainer.precision", "bf16-mixed", "--model.cuda_graphs", "true", "--trainer.max_steps", "2000"]
    ranks = two_ranks(tmp_path, *options, "--data.limit_val", "4", **environment, WORLD_SIZE="2")
    ranks.wait_for("*step=20.ckpt")
    ranks.processes[1].send_signal(signal.SIGTERM)
    assert ranks.end() == [128 + signal.SIGTERM] * 2, ranks.printed()
    assert ranks.printed().count("stopped by SIGTERM at step") == 1
    torch.load(next(tmp_path.rglob("interrupted.ckpt")), weights_only=True)
