"""The model card's code answers as `ask` does, on any image, and raises instead of answering as the base model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from safetensors.torch import load_file, save_file

from idefics_lit import Example, Idefics2Module, export_adapter
from idefics_lit.data.images import open_page
from idefics_lit.data.sources.synthetic import SyntheticPages


@pytest.fixture(scope="module")
def module():
    """The reader in 4 bits with an adapter that changes its answers a little."""
    module = Idefics2Module("tiny", max_new_tokens=24)
    torch.manual_seed(1)
    module.configure_model()
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.002)
    return module


@pytest.fixture(scope="module", params=[False, True], ids=["adapter", "merged"])
def folder(request, module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "out"
    export_adapter(module, folder, merge=request.param)
    return folder


@pytest.fixture(scope="module")
def example():
    return SyntheticPages("card", 1, families=("form",))[0]


@pytest.fixture
def code(folder, example):
    """The card's code up to the page, and after it, with the example's question."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    load, answer = code.replace("What is the date?", example.question).split("pages = [", 1)
    return load, "pages = [" + answer


def odd_images(page, folder):
    """Write a page in many forms, of which most look wrong if they are opened without care; return the files."""
    grey = page.convert("L")
    values = np.asarray(grey)
    deep = values.astype(np.uint16) * 257
    paper = Image.new("RGBA", page.size)
    paper.putalpha(ImageOps.invert(grey))
    ink = Image.new("LA", page.size)
    ink.putalpha(ImageOps.invert(grey))
    palette = paper.quantize(64)
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    turned = grey.transpose(Image.Transpose.ROTATE_90)
    images = {
        "upside.png": (turned, {"exif": exif}),
        "turned.jpg": (turned, {"exif": exif, "quality": 95}),
        "16_bits.png": (Image.fromarray(deep), {}),
        "12_bits.png": (Image.fromarray(deep >> 4), {}),
        "turned_16_bits.tif": (Image.fromarray(np.rot90(deep).copy()), {"exif": exif}),
        "white_is_zero.tif": (Image.fromarray(65535 - deep), {"tiffinfo": {262: 0}}),
        "32_bits.tif": (Image.fromarray(deep.astype(np.int32) << 15), {}),
        "floats.tif": (Image.fromarray(values.astype(np.float32) / 255), {}),
        "alpha.png": (paper, {}),
        "alpha_turned.png": (paper.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
        "grey_alpha.png": (ink, {}),
        "palette.gif": (grey.convert("P"), {}),
        "palette_alpha.png": (palette, {}),
        "cmyk.jpg": (page.convert("CMYK"), {"quality": 95}),
        "1_bit.tif": (grey.point(lambda value: 255 * (value > 128)).convert("1"), {"compression": "group4"}),
        "lab.tif": (Image.merge("LAB", [grey, *[Image.new("L", page.size, 128)] * 2]), {}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
    return [folder / name for name in images]


def answer_of(code, names, capfd, file):
    capfd.readouterr()
    exec(code.replace('"page.png"', repr(str(file))), names)
    return capfd.readouterr().out.removesuffix("\n")


def test_odd_images_are_answered_as_ask_does(folder, code, example, run, capfd, tmp_path):
    files = odd_images(example.images[0], tmp_path)
    exec(code[0], names := {})
    model = ("--model.pretrained", folder, "--model.quantization", "none")
    if not (folder / "config.json").exists():
        model = ("--model.adapter", folder, "--model.pretrained", "tiny")
    same = ("--model.max_new_tokens", "24", "--trainer.accelerator", "cpu", "--json")
    run("ask", *model, *same, "--question", example.question, "--image", *files)
    expected = [json.loads(line)["answer"] for line in capfd.readouterr().out.splitlines()]
    wrong = {}
    for file, answer in zip(files, expected, strict=True):
        np.testing.assert_array_equal(names["open_page"](file), open_page(file).convert("RGB"), err_msg=file.name)
        if (answered := answer_of(code[1], names, capfd, file)) != answer:
            wrong[file.name] = answered, answer
    assert not wrong
    assert expected.count(expected[0]) > 12  # they show the same page


def test_several_pages_with_splitting_are_answered_as_predict_does(module, example, capfd, tmp_path):
    """`ask` takes each page alone; a question of `predict` may have several."""
    export_adapter(module, tmp_path / "out", image_splitting=True)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    other = SyntheticPages("other", 1, families=("table",))[0].images[0]
    pages = [other, example.images[0]]
    for number, page in enumerate(pages):
        page.save(tmp_path / f"{number}.png")
    code = code.replace("What is the date?", example.question)
    opened = ", ".join(f"open_page({str(tmp_path / f'{number}.png')!r})" for number in range(2))
    exec(code.replace('open_page("page.png")', opened), names := {})
    printed = capfd.readouterr().out.removesuffix("\n").splitlines()[-1]
    batch = module.collator(train=False, image_splitting=True)([Example(0, example.question, pages, page_id=0)])
    assert names["inputs"]["input_ids"].tolist() == batch.prompts.input_ids.tolist()
    pixels = names["inputs"]["pixel_values"].float()
    assert pixels.shape[1] == 10  # two pages, each as four quadrants and a whole
    torch.testing.assert_close(pixels, batch.pixel_values, rtol=0, atol=0.01)
    # The reader wasn't trained on several pages: in 16 bits, its answers to them are soon others.
    assert module.generate(batch)[0][:3] == printed[:3]


@pytest.mark.parametrize("change", ["renamed", "missing"])
def test_a_missing_weight_is_an_error(folder, code, tmp_path, change):
    """Not the answer of the base model, with which peft and transformers go on."""
    file = next(folder.glob("*model.safetensors"))
    weights = load_file(file)
    name = next(name for name in weights if "text_model.layers.1.self_attn.q_proj" in name)
    changed = {**weights, name.replace("q_proj", "q"): weights[name]} if change == "renamed" else dict(weights)
    del changed[name]
    save_file(changed, file, metadata={"format": "pt"})
    try:
        with pytest.raises(RuntimeError, match=r"weights are missing or have other names: .*layers\.1\.self_attn\.q"):
            exec(code[0], {})
    finally:
        save_file(weights, file, metadata={"format": "pt"})
