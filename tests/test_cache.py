"""What is kept of a page's vision features is what the tower makes of it, and is never wrong."""

import multiprocessing
import time

import pytest
import torch

from idefics_lit.cache import FolderCache, MemoryCache
from idefics_lit.collator import Idefics2Collator
from idefics_lit.data.synthetic import SyntheticPages
from idefics_lit.errors import InputError
from idefics_lit.model import LoRA
from idefics_lit.module import Idefics2Module
from idefics_lit.pretrained import load_processor


@pytest.fixture(scope="module")
def examples():
    pages = SyntheticPages("train", 3)
    return [pages[pages.page_ids.index(page)] for page in dict.fromkeys(pages.page_ids)]


def module(tiny, **kwargs):
    ours = Idefics2Module(tiny, **{"lora": LoRA(dropout=0.0), **kwargs})
    ours.configure_model()
    return ours


def features(value, patches=64):
    return torch.full((patches, 16), float(value))


@pytest.fixture(params=["memory", "folder"])
def place(request, tmp_path):
    return "memory" if request.param == "memory" else str(tmp_path / "features")


def test_the_tower_runs_once_a_page_and_the_loss_is_the_same(tiny, examples, place):
    batch = Idefics2Collator(load_processor(tiny), train=True)(examples)
    torch.manual_seed(0)
    expected, _ = module(tiny).loss(batch)
    torch.manual_seed(0)
    ours = module(tiny, feature_cache=place)
    runs = []
    encoder = ours.model.get_base_model().model.vision_model.encoder
    encoder.register_forward_pre_hook(lambda *args, **kwargs: runs.append(len(kwargs or args[2]["inputs_embeds"])),
                                      with_kwargs=True)  # fmt: skip
    assert [ours.loss(batch)[0].item() for _ in range(3)] == [expected.item()] * 3
    assert sum(runs) == len(examples)
    one = Idefics2Collator(load_processor(tiny), train=True)(examples[1:2])
    ours.loss(one)
    assert sum(runs) == len(examples)
    if place != "memory":  # another run finds them too
        torch.manual_seed(0)
        assert module(tiny, feature_cache=place).loss(batch)[0].item() == expected.item()


def test_the_least_recently_used_files_go(tmp_path):
    size = features(0).nbytes
    cache = FolderCache(str(tmp_path), 10.5 * size / 1e9, "model")
    for page in range(10):
        cache.put(str(page), features(page))
    time.sleep(0.05)  # a file system's clock is coarse
    assert torch.equal(cache.get("0"), features(0))
    for page in range(10, 18):
        cache.put(str(page), features(page))
    kept = [page for page in range(18) if cache.get(str(page)) is not None]
    assert 0 in kept and 17 in kept and 1 not in kept
    assert 7 <= len(kept) <= 10
    assert all(torch.equal(cache.get(str(page)), features(page)) for page in kept)


def test_the_oldest_in_memory_go():
    size = features(0).nbytes
    cache = MemoryCache(20 * size / 1e9)
    for page in range(50):
        cache.put(str(page), features(page, patches=64 - page % 3))
        cache.put(str(page), features(-1))  # what is there stays
    kept = [page for page in range(50) if cache.get(str(page)) is not None]
    assert kept == list(range(50 - len(kept), 50))
    assert 10 <= len(kept) <= 21
    assert all(torch.equal(cache.get(str(page)), features(page, patches=64 - page % 3)) for page in kept)
    cache.put("large", features(0, patches=10**5))
    assert cache.get("large") is None and cache.get("49") is not None


def test_what_a_killed_writer_leaves_is_a_miss(tmp_path):
    cache = FolderCache(str(tmp_path), 1, "model")
    cache.put("a", features(1))
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for part in (0, 3, 20, len(whole) - 1):
        file.write_bytes(whole[:part])
        assert cache.get("a") is None
    (tmp_path / "left.tmp").write_bytes(whole[:50])
    cache = FolderCache(str(tmp_path), 1, "model")
    cache.put("a", features(2))
    assert torch.equal(cache.get("a"), features(2))


def write(folder, number):
    cache = FolderCache(folder, 40 * features(0).nbytes / 1e9, "model")
    for page in range(60):
        cache.put(str(page), features(page))
        found = cache.get(str((page * number) % 60))
        assert found is None or torch.equal(found, features((page * number) % 60))


def test_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write, args=(str(tmp_path), number)) for number in (7, 11)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert not list(tmp_path.glob("*.tmp"))


def test_other_models_and_other_pixels_have_other_features(tiny, examples, tmp_path):
    assert FolderCache(str(tmp_path), 1, "b").get("a") is None
    FolderCache(str(tmp_path), 1, "a").put("a", features(1))
    assert FolderCache(str(tmp_path), 1, "b").get("a") is None
    keys = []
    for size in (None, 112):
        batch = Idefics2Collator(load_processor(tiny, image_size=size), train=True)(examples)
        keys += [key for row in batch["image_keys"] for key in row]
    assert len(set(keys)) == 2 * len(examples)


def test_a_tower_that_is_trained_has_gradients_and_no_cache(tiny, examples):
    lora = LoRA(dropout=0.0, target_modules=r".*vision_model.*(q_proj|v_proj)")
    with pytest.raises(InputError, match=r"model\.feature_cache .* model\.lora\.target_modules train it"):
        module(tiny, lora=lora, feature_cache="memory")
    ours = module(tiny, lora=lora)
    ours.loss(Idefics2Collator(load_processor(tiny), train=True)(examples))[0].backward()
    gradients = [p.grad for name, p in ours.named_parameters() if "lora_B" in name]
    assert gradients and all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_folder_that_cant_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"model\.feature_cache .*file.*: can't be written"):
        FolderCache(str(tmp_path / "file" / "features"), 1, "model")
