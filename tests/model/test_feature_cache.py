"""Cached features equal those of the vision tower; damaged, stale and foreign files are misses."""

import multiprocessing
import os
import random
import shutil
import time

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.errors import InputError
from idefics_lit.model.feature_cache import FolderCache, MemoryCache
from idefics_lit.model.loading import LoRA
from idefics_lit.pretrained import load_processor
from idefics_lit.training.module import Idefics2Module


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


def test_slabs_return_each_page_its_own_features(tiny):
    """A batch of a cached page and of new ones for which there is no memory."""
    pages = [
        Example(i, "Which?", [Image.frombytes("L", (56, 56), random.Random(i).randbytes(56 * 56))], ["a"])
        for i in range(10)
    ]
    collate = Idefics2Collator(load_processor(tiny, image_size=56), train=True)
    kept, mixed = collate(pages[:8]), collate([pages[0], *pages[8:]])
    plain = module(tiny, quantization="none")
    size = plain.backbone.encode_images(mixed.pixel_values[0].to(plain.device), mixed.image_sizes[0], ["0"])[0].nbytes
    slab = 1 << (size - 1).bit_length()
    assert 2 * size > slab  # each page has one
    cached = module(tiny, quantization="none", feature_cache="memory", feature_cache_gb=8 * slab / 1e9)
    weights = plain.state_dict()
    cached.load_state_dict(weights)
    for batch in (kept, mixed, kept, mixed):
        assert cached.loss(batch)[0].item() == plain.loss(batch)[0].item()


def test_returned_features_do_not_change(tmp_path):
    caches = [MemoryCache(8 * features(0).nbytes / 1e9), FolderCache(str(tmp_path), 1, "model")]
    for cache in caches:
        cache.put("a", features(1))
    given = [cache.get("a") for cache in caches]
    given[0].zero_()
    assert torch.equal(caches[0].get("a"), features(1))
    given[0] = caches[0].get("a")
    (file,) = tmp_path.iterdir()
    with file.open("r+b") as opened:  # another program's doing
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(some, features(1)) for some in given)
    assert caches[1].get("a") is None


def test_the_least_recently_used_files_are_evicted(tmp_path):
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


def test_the_first_in_memory_are_kept():
    size = features(0).nbytes
    cache = MemoryCache(20 * size / 1e9)
    for page in range(50):
        cache.put(str(page), features(page, patches=64 - page % 3))
        cache.put(str(page), features(-1))  # what is there stays
    kept = [page for page in range(50) if cache.get(str(page)) is not None]
    assert kept == list(range(len(kept)))
    assert 10 <= len(kept) <= 21
    assert all(torch.equal(cache.get(str(page)), features(page, patches=64 - page % 3)) for page in kept)
    cache.put("large", features(0, patches=10**5))
    assert cache.get("large") is None and cache.get("0") is not None
    assert [page for page in range(50) if cache.loader_get(str(page)) is not None] == kept


def test_a_truncated_file_is_a_miss(tmp_path):
    cache = FolderCache(str(tmp_path), 1, "model")
    cache.put("a", features(1))
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for part in (0, 3, 20, len(whole) - 1):
        file.write_bytes(whole[:part])
        assert cache.get("a") is None
    for place in (1, len(whole) // 2, len(whole) - 1):  # nothing is cut off
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
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


def test_all_processes_together_keep_the_limit(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(10**5))  # not the cache's
    size = features(0).nbytes + 200
    caches = [FolderCache(str(tmp_path), 12 * size / 1e9, "model") for _ in range(4)]
    most = []
    for page in range(60):
        caches[page % 4].put(str(page), features(page))
        most.append(sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) - 10**5)
    assert 8 * size < max(most) <= 12 * size
    assert (tmp_path / "model.safetensors").exists()
    FolderCache(str(tmp_path), 5 * size / 1e9, "model")
    assert len(list(tmp_path.iterdir())) <= 6
    large = features(1, patches=64 * 6)
    caches[0] = FolderCache(str(tmp_path), 5 * size / 1e9, "model")
    caches[0].put("large", large)  # it would drop all the others
    assert caches[0].get("large") is None and len(list(tmp_path.iterdir())) > 2


def test_unfinished_files_are_counted_and_deleted_when_stale(tmp_path):
    size = features(0).nbytes + 200
    cache = FolderCache(str(tmp_path), 4 * size / 1e9, "model")
    cache.put("a", features(0))
    (kept,) = tmp_path.iterdir()
    unfinished = [tmp_path / f"{kept.name}.{number}.tmp" for number in range(2)]
    for file in unfinished:
        file.write_bytes(bytes(size))
    os.utime(unfinished[0], (0, 0))
    cache = FolderCache(str(tmp_path), 4 * size / 1e9, "model")
    assert sorted(tmp_path.iterdir()) == [kept, unfinished[1]]
    for page in range(4):
        cache.put(str(page), features(page))
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 4 * size
    assert unfinished[1].exists() and cache.get("a") is None and cache.get("3") is not None


@pytest.mark.parametrize("replaced", ["weights", "config", "transformers"])
def test_features_of_what_was_there_before_are_not_found(tiny, examples, tmp_path, replaced, monkeypatch):
    """Files that have their predecessors' size and time too."""
    model, folder = tmp_path / "model", tmp_path / "features"
    shutil.copytree(tiny, model)
    batch = Idefics2Collator(load_processor(tiny, image_size=112), train=True)(examples)

    def loss(**options):
        torch.manual_seed(0)
        return module(str(model), quantization="none", **options).loss(batch)[0].item()

    before = loss(feature_cache=str(folder))
    assert loss(feature_cache=str(folder)) == before and len(list(folder.iterdir())) == len(examples)
    file = model / ("model.safetensors" if replaced == "weights" else "config.json")
    stat = file.stat()
    if replaced == "weights":
        weights = load_file(file)
        name = next(name for name in weights if "vision_model.post_layernorm.weight" in name)
        weights[name] = weights[name] * 0.5
        save_file(weights, file, {"format": "pt"})
    elif replaced == "config":
        file.write_text(file.read_text().replace('"layer_norm_eps": 1e-06', '"layer_norm_eps": 1e-01'))
    else:
        monkeypatch.setattr(transformers, "__version__", "another")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    after = loss(feature_cache=str(folder))
    assert after == loss() and (after == before) is (replaced == "transformers")
    assert len(list(folder.iterdir())) == 2 * len(examples)


def test_a_fit_that_compiles_finds_the_features_of_one_that_does_not(tiny, examples, tmp_path):
    """The modules that compute them aren't compiled."""
    batch = Idefics2Collator(load_processor(tiny, image_size=112), train=True)(examples)
    for compiled in (False, True):
        ours = module(tiny, quantization="none", feature_cache=str(tmp_path), compile=compiled)
        with torch.compiler.set_stance("force_eager"):
            ours.encode_pages(batch)
    assert len(list(tmp_path.iterdir())) == len(examples)


def test_other_models_and_other_pixels_have_other_features(tiny, examples, tmp_path):
    assert FolderCache(str(tmp_path), 1, "b").get("a") is None
    FolderCache(str(tmp_path), 1, "a").put("a", features(1))
    assert FolderCache(str(tmp_path), 1, "b").get("a") is None
    keys = []
    for size in (None, 112):
        batch = Idefics2Collator(load_processor(tiny, image_size=size), train=True)(examples)
        keys += [key for row in batch.image_keys for key in row]
    assert len(set(keys)) == 2 * len(examples)
    alone = Idefics2Collator(load_processor(tiny), train=True)(examples[:1])
    assert alone.image_keys == [keys[:1]]  # whatever it lies beside


def test_a_tower_that_is_trained_has_gradients_and_no_cache(tiny, examples):
    lora = LoRA(dropout=0.0, target_modules=r".*vision_model.*(q_proj|v_proj)")
    with pytest.raises(InputError, match=r"model\.feature_cache .* model\.lora\.target_modules train it"):
        module(tiny, lora=lora, feature_cache="memory")
    ours = module(tiny, lora=lora)
    ours.loss(Idefics2Collator(load_processor(tiny), train=True)(examples))[0].backward()
    gradients = [p.grad for name, p in ours.named_parameters() if "lora_B" in name]
    assert gradients and all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"model\.feature_cache .*file.*: can't be written"):
        FolderCache(str(tmp_path / "file" / "features"), 1, "model")
