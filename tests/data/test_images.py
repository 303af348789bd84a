"""Every kind of image file becomes the page that the processor takes, or an error that names the row."""

import io
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
import zlib

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import AppendingTiffWriter
from transformers.image_transforms import convert_to_rgb

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.documents import count_pages, read_page
from idefics_lit.data.images import open_page
from idefics_lit.data.sources import stored_images
from idefics_lit.data.sources.hub import HubDocVQA
from idefics_lit.data.sources.official import OfficialDocVQA
from idefics_lit.data.sources.splits import find_splits
from idefics_lit.data.sources.stored_images import open_stored
from idefics_lit.data.sources.streaming import find_streams
from idefics_lit.errors import InputError
from idefics_lit.pretrained import load_processor

RAMP = np.arange(40 * 30, dtype=np.uint32).reshape(30, 40)
GREY = Image.fromarray((RAMP // 5).astype(np.uint8))
COLOUR = Image.merge("RGB", [GREY, ImageOps.mirror(GREY), ImageOps.flip(GREY)])


def encode(image, kind="PNG", **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def official(folder, content):
    """Open the content as the page of an official folder."""
    folder.mkdir()
    (folder / "page").write_bytes(content)
    row = {"questionId": 7, "question": "What?", "image": "page", "answers": ["a"]}
    (folder / "train.json").write_text(json.dumps({"data": [row]}))
    return find_splits(str(folder), None, None, "en", 0)["train"]()[0].images[0]


def saved(folder, content):
    """Open the content as one of two pages of a row that is saved with `datasets`."""
    row = {"question": "What?", "images": [{"bytes": content, "path": None}] * 2, "answers": ["a"]}
    features = {"question": datasets.Value("string"), "images": datasets.List(datasets.Image())}
    features["answers"] = datasets.List(datasets.Value("string"))
    datasets.Dataset.from_list([row], datasets.Features(features)).save_to_disk(str(folder))
    return find_splits(str(folder), None, None, "en", 0)["train"]()[0].images[1]


def streamed(folder, content):
    """Open the content as a page in a parquet file that is streamed."""
    folder.mkdir()
    rows = datasets.Dataset.from_list([{"question": "What?", "image": {"bytes": content, "path": "p.png"}}])
    rows.cast_column("image", datasets.Image()).to_parquet(str(folder / "train.parquet"))
    return find_streams(str(folder), None, None, "en")["train"].first(1)[0].images[0]


both = pytest.mark.parametrize("read", [official, saved])


def assert_page(image, expected):
    """The page is ready for the processor, which sees the expected pixels."""
    assert image.mode in ("1", "L", "RGB")
    assert open_page(image) is image
    np.testing.assert_array_equal(convert_to_rgb(image, return_numpy=True), expected)


def with_alpha(mode):
    return Image.merge(mode, [*(GREY if mode == "LA" else COLOUR).split(), ImageOps.flip(GREY)])


PALETTE = COLOUR.quantize(16)
ORDINARY = {
    "1": encode(GREY.convert("1")),
    "L": encode(GREY),
    "L, JPEG": encode(GREY, "JPEG"),
    "L with a transparent grey": encode(GREY, transparency=100),
    "LA": encode(with_alpha("LA")),
    "P": encode(PALETTE),
    "P, BMP": encode(PALETTE, "BMP"),
    "P with a transparent colour": encode(PALETTE, transparency=3),
    "P with alphas": encode(PALETTE, transparency=bytes(range(0, 256, 16))),
    "P with a transparent colour, GIF": encode(PALETTE, "GIF", transparency=3),
    "RGB": encode(COLOUR),
    "RGB, JPEG": encode(COLOUR, "JPEG"),
    "RGB, progressive JPEG": encode(COLOUR, "JPEG", progressive=True),
    "RGB, WebP": encode(COLOUR, "WEBP"),
    "RGB with a transparent colour": encode(COLOUR, transparency=COLOUR.getpixel((3, 3))),
    "RGBA": encode(with_alpha("RGBA")),
    "RGBA, WebP": encode(with_alpha("RGBA"), "WEBP", lossless=True),
    "CMYK, TIFF": encode(COLOUR.convert("CMYK"), "TIFF"),
    "CMYK, JPEG": encode(COLOUR.convert("CMYK"), "JPEG"),
    "Lab, TIFF": encode(COLOUR.convert("LAB"), "TIFF"),
}


@both
@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_images_have_the_pixels_that_the_processor_made_of_them(tmp_path, read, kind):
    """Alpha and palettes on white, as the processor itself does it."""
    plain = Image.open(io.BytesIO(ORDINARY[kind]))
    image = read(tmp_path / "data", ORDINARY[kind])
    assert_page(image, convert_to_rgb(plain, return_numpy=True))
    if plain.mode in ("1", "L", "RGB") and "transparent" not in kind:
        assert (image.mode, image.tobytes()) == (plain.mode, plain.tobytes())


def test_adobe_cmyk_is_not_inverted(tmp_path):
    red = Image.new("RGB", (16, 16), "red")
    pixels = np.array(official(tmp_path / "data", encode(red.convert("CMYK"), "JPEG"))).reshape(-1, 3)
    assert (abs(pixels.astype(int) - [255, 0, 0]) < 10).all()


@both
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, COLOUR),
        (2, ImageOps.mirror(COLOUR)),
        (3, COLOUR.rotate(180)),
        (4, ImageOps.flip(COLOUR)),
        (5, COLOUR.transpose(Image.Transpose.TRANSPOSE)),
        (6, COLOUR.rotate(-90, expand=True)),
        (7, COLOUR.transpose(Image.Transpose.TRANSVERSE)),
        (8, COLOUR.rotate(90, expand=True)),
    ],
)
def test_pages_are_upright(tmp_path, read, kind, orientation, turned):
    exif = Image.Exif()
    exif[0x112] = orientation
    content = encode(COLOUR, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert_page(read(tmp_path / "data", content), np.array(turned))


def test_a_turned_tiff_is_upright_when_it_is_opened_by_its_path(tmp_path):
    """Pillow maps an uncompressed file into memory and misplaces the pixels."""
    exif = Image.Exif()
    exif[0x112] = 6
    (tmp_path / "page.tif").write_bytes(encode(GREY, "TIFF", exif=exif))
    np.testing.assert_array_equal(open_page(tmp_path / "page.tif"), GREY.rotate(-90, expand=True))


def test_a_page_is_upright_in_a_stream_too(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    assert_page(streamed(tmp_path / "data", encode(COLOUR, exif=exif)), np.array(COLOUR.rotate(-90, expand=True)))


@pytest.mark.parametrize("damage", [b"", b"II*\0", b"MM\0*\0\0\0\x08\0\x05\1\x12\0\3", b"\xff" * 50])
def test_damaged_exif_data_is_no_reason_to_lose_a_page(tmp_path, damage):
    content = encode(COLOUR, exif=b"Exif\0\0" + damage)
    assert_page(official(tmp_path / "data", content), np.array(COLOUR))


@both
@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_is_taken(tmp_path, read, kind):
    more = [ImageOps.invert(COLOUR), Image.new("RGB", (40, 30))]
    first = PALETTE.convert("RGB")
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(first, kind, save_all=True, append_images=more, **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert_page(read(tmp_path / "data", content), np.array(first))


def tiff(*frames):
    """A TIFF of frames, each an image and its type of subfile: 0 a page, 1 a preview of one, 4 a mask."""
    content = io.BytesIO()
    with AppendingTiffWriter(content) as appending:
        for image, subfile in frames:
            image.save(appending, "TIFF", tiffinfo={254: subfile})
            appending.newFrame()
    return content.getvalue()


@both
def test_a_tiff_of_several_pages_is_refused(tmp_path, read):
    """`ask` reads them all."""
    content = tiff((COLOUR, 0), (GREY, 0), (GREY, 0))
    with pytest.raises(InputError, match=r"row 0.*can't be read: .*is a TIFF of 3 pages: "):
        read(tmp_path / "data", content)
    (tmp_path / "page.tif").write_bytes(content)
    assert count_pages(str(tmp_path / "page.tif")) == 3
    assert_page(read_page(str(tmp_path / "page.tif"), 1), np.array(GREY.convert("RGB")))


@both
@pytest.mark.parametrize("subfile", [1, 4, 5])
def test_a_preview_or_a_mask_is_no_page(tmp_path, read, subfile):
    page, small = (COLOUR, 0), (GREY.resize((4, 3)), subfile)
    for number, content in enumerate((tiff(page, small), tiff(small, page))):
        assert_page(read(tmp_path / f"{number}", content), np.array(COLOUR))
        (tmp_path / "page.tif").write_bytes(content)

        assert count_pages(str(tmp_path / "page.tif")) == 1
        assert_page(read_page(str(tmp_path / "page.tif"), 0), np.array(COLOUR))


def grey(values, dtype, kind="TIFF"):
    return encode(Image.fromarray(values.astype(dtype)), kind)


def twelve_bits(values):
    """A TIFF whose samples are packed."""
    high, low = values.reshape(-1, 2).T
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=1).astype(np.uint8).tobytes()
    height, width = values.shape
    entries = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    entries.append((279, len(packed)))
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    return head + packed + struct.pack("<H", len(entries)) + directory + bytes(4)


@both
@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_scanners_bits_in_16_are_scaled_by_their_number(tmp_path, read, bits, kind):
    values = RAMP * (2**bits - 1) // RAMP.max()
    image = read(tmp_path / "data", grey(values, np.uint16, kind))
    assert np.abs(np.array(image) - values * 255 / (2**bits - 1)).max() < 0.51


def test_packed_samples_are_scaled_by_the_depth_that_the_file_tells(tmp_path):
    image = official(tmp_path / "data", twelve_bits(RAMP // 2))  # a dark page: no value says 12 bits
    assert np.abs(np.array(image) - (RAMP // 2) * 255 / 4095).max() < 0.51


@both
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize(("dtype", "white"), [(np.uint16, 2**16 - 1), (np.uint16, 2**12 - 1), (np.float32, 1)])
def test_where_white_is_zero_ink_is_black(tmp_path, read, dtype, white, compression):
    values = (RAMP / RAMP.max() * white).astype(dtype)
    content = encode(Image.fromarray(values), "TIFF", compression=compression, tiffinfo={262: 0})
    image = read(tmp_path / "data", content)
    assert np.abs(np.array(image) - (255 - values * (255 / white))).max() < 0.51


@pytest.mark.parametrize("odd", [1.04, np.inf, -np.inf, -0.02])
def test_odd_values_do_not_darken_a_page(odd):
    values = (RAMP / RAMP.max()).astype(np.float32)
    values[3, 3] = odd
    page = np.array(open_page(Image.fromarray(values)))
    assert page[3, 3] == (255 if odd > 0 else 0) and page[-1, -1] == 255


def deep_png(values):
    """A PNG of 16 bits a colour."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.repeat(3).astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *values.T.shape, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@both
def test_colours_of_a_scanners_bits_in_16_are_refused(tmp_path, read):
    """Pillow keeps their upper 8 bits: nothing is left of the page."""
    for bits in (10, 12, 14):
        content = deep_png(RAMP * (2**bits - 1) // RAMP.max())
        with pytest.raises(InputError, match=f"its colours have 16 bits, of which {bits} are used: save it with 8"):
            read(tmp_path / f"{bits}", content)
    assert_page(read(tmp_path / "16", deep_png(RAMP * 54)), np.repeat((RAMP * 54 >> 8)[..., None], 3, -1))


@both
@pytest.mark.parametrize(
    ("content", "white"),
    [
        (grey(RAMP * 54, np.uint16, "PNG"), 2**16 - 1),
        (grey(RAMP * 54, np.uint16), 2**16 - 1),
        (grey(RAMP * 54, ">u2"), 2**16 - 1),
        (grey(RAMP * 54, np.int32), 2**16 - 1),
        (grey(RAMP * 1_700_000, np.int32), 2**31),
        (grey(RAMP // 5, np.int32), 255),
        (grey(RAMP // 5, np.float32), 255),
        (grey(RAMP / 1200, np.float32), 1),
        (grey(np.where(RAMP, RAMP / 1200, np.nan), np.float32), 1),
    ],
)
def test_deep_grey_is_scaled_and_not_clipped(tmp_path, read, content, white):
    values = np.nan_to_num(np.array(Image.open(io.BytesIO(content)), dtype=np.float64))
    image = read(tmp_path / "data", content)
    assert image.mode == "L"
    assert np.abs(np.array(image) - values * 255 / white).max() < 0.51
    assert_page(image, np.repeat(np.array(image)[..., None], 3, -1))


def test_full_scale_is_white():
    for value, mode in ((65535, "I;16"), (65535, "I;16B"), (65535, "I"), (1.0, "F"), (255.0, "F")):
        assert open_page(Image.new(mode, (2, 2), value)).getpixel((0, 0)) == 255
        assert open_page(Image.new(mode, (2, 2), 0)).getpixel((0, 0)) == 0


@both
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.95])
def test_what_is_cut_off_is_no_page(tmp_path, read, kind, kept):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    content = encode(noise, kind)
    with pytest.raises(InputError, match=r"row 0.*: the (image|row) can't be read: "):
        read(tmp_path / "data", content[: int(kept * len(content))])


@both
@pytest.mark.parametrize("content", [b"<html></html>", b"%PDF-1.7", b"\0" * 1000, b"\x89PNG\r\n\x1a\n" + b"\xff" * 50])
def test_what_is_no_image_is_named(tmp_path, read, content):
    with pytest.raises(InputError, match=r"row 0.*: the (image|row) can't be read: ") as caught:
        read(tmp_path / "data", content)
    assert "\n" not in str(caught.value)


@both
def test_there_is_one_limit_of_size(tmp_path, read, monkeypatch):
    """Pillow warns from half of it on, of what it then reads."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30 // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert_page(read(tmp_path / "most", encode(COLOUR)), np.array(COLOUR))
    with pytest.raises(InputError, match=r"can't be read: .*1271 pixels\) exceeds limit of 1200 .* Scale it down"):
        read(tmp_path / "more", encode(COLOUR.resize((41, 31))))


def bomb(width, height):
    """A PNG that says it has so many pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content = encode(GREY.convert("1"))
    return content[:8] + header + content[33:]


@both
@pytest.mark.parametrize("size", [(100_000, 100_000), (0, 5), (5, 0)])
def test_a_page_too_large_or_of_no_pixels_is_named(tmp_path, read, size):
    with pytest.raises(InputError, match=r"row 0.*: the (image|row) can't be read: "):
        read(tmp_path / "data", bomb(*size))


def test_an_archive_is_not_unpacked_without_a_limit(tmp_path):
    """A page of 600 MB is half a megabyte in a zip."""
    folder = image_folder(tmp_path / "data", zipped=True)
    packed = zipfile.ZipFile(folder / "train.zip", "a", zipfile.ZIP_DEFLATED)
    with packed as archive, archive.open("big.png", "w") as page:
        for _ in range(600):
            page.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"zip://big.png::.*train.zip has more than 256 MiB: scale it down"):
        open_stored({"bytes": None, "path": f"zip://big.png::{folder}/train.zip"}, str(folder))
    assert tracemalloc.get_traced_memory()[1] < 560 * 2**20
    tracemalloc.stop()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peaks are Linux's")
@pytest.mark.parametrize("kind", ["RGBA", "I;16"])
def test_a_large_page_takes_little_more_than_its_pixels(kind):
    script = f"""from PIL import Image
from idefics_lit.data.images import open_page
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
image = Image.new("{kind}", (6000, 6000), 0)
before = peak()
open_page(image)
print(peak() - before)"""
    taken = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert int(taken) * 1024 < 5 * 6000**2  # bytes a pixel: the page has 1 or 3


def test_an_image_without_pixels_in_memory():
    with pytest.raises(ValueError, match="an image of 0 x 5 pixels"):
        open_page(Image.new("L", (0, 5)))


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1), (2, 60_000)])
def test_extreme_shapes_are_collated(tmp_path, tiny, size):
    image = official(tmp_path / "data", encode(Image.new("L", size, 255)))
    example = OfficialDocVQA(tmp_path / "data" / "train.json")[0]
    assert image.size == size
    assert Idefics2Collator(load_processor(tiny), train=True)([example]).pixel_values.shape[:3] == (1, 1, 3)


def test_text_in_a_file_is_left_alone(tmp_path):
    info = PngInfo()
    info.add_text("comment", "x" * 1000)
    assert_page(official(tmp_path / "data", encode(COLOUR, pnginfo=info)), np.array(COLOUR))


TEXT = datasets.Value("string")
FORMS = {
    "image": ({"question": TEXT, "image": datasets.Image()}, lambda path: {"bytes": None, "path": path}),
    "images": (
        {"question": TEXT, "image": datasets.List(datasets.Image())},
        lambda path: [{"bytes": None, "path": path}],
    ),
    "struct": (
        {"question": TEXT, "image": {"bytes": datasets.Value("binary"), "path": TEXT}},
        lambda path: {"bytes": None, "path": path},
    ),
    "text": ({"question": TEXT, "image": TEXT}, lambda path: path),
}


def in_memory(form, path, folder):
    feature, store = FORMS[form]
    rows = datasets.Dataset.from_dict({"question": ["What?"], "image": [store(path)]}, datasets.Features(feature))
    return HubDocVQA(rows, "set", folder=folder and str(folder))


@pytest.mark.parametrize("form", FORMS)
def test_a_path_in_the_datas_folder_is_opened(tmp_path, form):
    (tmp_path / "data").mkdir()
    COLOUR.save(tmp_path / "data" / "p.png")
    for path in (str(tmp_path / "data" / "p.png"), "p.png", "../data/p.png"):
        assert_page(in_memory(form, path, tmp_path / "data")[0].images[0], np.array(COLOUR))


@pytest.mark.parametrize("form", FORMS)
def test_a_path_elsewhere_is_not_opened(tmp_path, form, monkeypatch):
    (tmp_path / "data").mkdir()
    COLOUR.save(tmp_path / "outside.png")
    COLOUR.save(tmp_path / "data-too.png")
    monkeypatch.chdir(tmp_path)
    outside = str(tmp_path / "outside.png")
    paths = [outside, "../outside.png", "../data-too.png", f"file://{outside}", f"zip://p.png::{outside}"]
    paths += ["https://example.com/p.png", "hf://datasets/me/set/p.png", f"local://{outside}::{tmp_path}/data/p.zip"]
    for path in paths:
        with pytest.raises(InputError, match=r"^set, row 0: the row can't be read: the image path .* lies outside"):
            in_memory(form, path, tmp_path / "data")[0]
    for path in (outside, "outside.png", "https://example.com/p.png"):  # nor where the data is from the Hub
        with pytest.raises(InputError, match=r"^set, row 0: the row can't be read: the image path .* lies outside"):
            in_memory(form, path, None)[0]


def test_what_datasets_has_in_its_caches_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_images, "CACHES", (tmp_path / "cache",))
    (tmp_path / "cache").mkdir()
    COLOUR.save(tmp_path / "cache" / "p.png")
    assert_page(in_memory("image", str(tmp_path / "cache" / "p.png"), None)[0].images[0], np.array(COLOUR))


def image_folder(folder, zipped=False):
    """Write images with metadata, in an archive or not."""
    folder.mkdir()
    names = ["p.png", "q.png", "r.png"]  # `datasets` goes by what there is most of
    metadata = "".join(json.dumps({"file_name": name, "question": "What?"}) + "\n" for name in names)
    files = {**dict.fromkeys(names, encode(COLOUR)), "metadata.jsonl": metadata.encode()}
    for name, content in files.items():
        if zipped:
            with zipfile.ZipFile(folder / "train.zip", "a") as archive:
                archive.writestr(name, content)
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["folder", "archive", "linked folder", "linked image"])
def test_folders_of_images_are_read(tmp_path, streaming, kind):
    folder = image_folder(tmp_path / "data", zipped=kind == "archive")
    if kind == "linked folder":
        os.symlink(folder, tmp_path / "link")
        folder = tmp_path / "link"
    if kind == "linked image":
        os.rename(folder / "p.png", tmp_path / "elsewhere.png")
        os.symlink(tmp_path / "elsewhere.png", folder / "p.png")
    if streaming:
        page = find_streams(str(folder), None, None, "en")["train"].first(1)[0].images[0]
    else:
        page = find_splits(str(folder), None, None, "en", 0)["train"]()[0].images[0]
    assert_page(page, np.array(COLOUR))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_that_leads_elsewhere_is_named(tmp_path, streaming):
    COLOUR.save(tmp_path / "outside.png")
    (tmp_path / "data").mkdir()
    feature, store = FORMS["image"]
    stored = store(str(tmp_path / "outside.png"))
    rows = datasets.Dataset.from_dict({"question": ["What?"], "image": [stored]}, datasets.Features(feature))
    pq.write_table(rows.data.table, tmp_path / "data" / "train.parquet")  # `datasets` would embed it
    if streaming:
        examples = find_streams(str(tmp_path / "data"), None, None, "en")["train"].first(1)
    else:
        examples = find_splits(str(tmp_path / "data"), None, None, "en", 0)["train"]()
    with pytest.raises(InputError, match=r"train, row 0: the row can't be read: the image path .* lies outside"):
        examples[0]


def test_a_program_is_no_image(tmp_path):
    """PostScript would be run by Ghostscript."""
    Image.new("RGB", (20, 20)).save(tmp_path / "page.eps")
    with pytest.raises(UnidentifiedImageError):
        open_page(tmp_path / "page.eps")


@pytest.mark.parametrize("kind", ["<u4", "<i4"])
def test_grey_of_32_bits_is_scaled_by_its_own_depth(tmp_path, kind):
    """With a sign and without, from black to white; Pillow writes no such file."""
    grey = np.linspace(0, 255, 600 * 3).astype(np.uint8).reshape(600, 3)
    values = (grey / 255 * np.iinfo(kind).max).astype(kind)
    strip = 8 + 2 + 10 * 12 + 4
    tags = [(256, 4, 3), (257, 4, 600), (258, 3, 32), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, strip), (277, 3, 1), (278, 4, 600), (279, 4, values.nbytes), (339, 3, 2 if kind == "<i4" else 1)]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in tags)
    (tmp_path / "page.tif").write_bytes(head + bytes(4) + values.tobytes())
    page = np.asarray(open_page(tmp_path / "page.tif")).astype(int)
    assert np.abs(page - grey).max() <= 1
