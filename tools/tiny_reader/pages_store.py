"""Rendered pages with their tasks: rendered by worker processes during training, stored on the device, batched.

Workers write blocks of pages into shared memory; `PageStore.grow` copies finished blocks to the device, where they
replace the oldest ones if the store is full.
"""

import math
import mmap
import multiprocessing
import os
import random
from collections import deque
from multiprocessing.pool import AsyncResult, Pool
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scatter import SCATTER
from tasks import QUESTIONS, READINGS, SLOT, question_tasks, reading_tasks
from torch import Tensor

from idefics_lit.data.pages import FAMILIES, Page, render_page
from idefics_lit.model.tiny import LATENTS, PAGE_HEIGHT, PAGE_WIDTH, PATCH

TRAINED_FAMILIES = FAMILIES[:3]
SHARES = (0.3, 0.32, 0.2, 0.18)  # sampling weights of the families and of `SCATTER`
FIRST_TRAINING_SEED = 1_000_000_000  # smaller seeds are held out

GLYPHS = 384  # kept per page
BLOCK = 256
BLOCKS = 96  # in shared memory

# Augmentation: the largest shift in pixels, the smallest scale, the largest noise in grey levels, the largest change
# of stroke width (1 is a pixel on each side).
SHIFT, SHRINK, NOISE, BOLDER, THINNER = 6, 0.87, 8.0, 0.5, 0.35

ROWS, COLUMNS = PAGE_HEIGHT // PATCH, PAGE_WIDTH // PATCH
SIDE = math.isqrt(LATENTS)  # latents correspond to a grid of SIDE x SIDE regions of the page
CELLS = 3  # cells per patch, side by side, one character each

FIELDS = {
    "image": ((PAGE_HEIGHT, PAGE_WIDTH), np.uint8),
    "glyph_xy": ((GLYPHS, 2), np.int16),
    "glyph_class": ((GLYPHS,), np.uint8),
    "ids": ((QUESTIONS + READINGS, SLOT), np.int16),
    "start": ((QUESTIONS + READINGS,), np.uint8),
    "length": ((QUESTIONS + READINGS,), np.uint8),
    "glyph": ((QUESTIONS + READINGS, SLOT), np.int16),
    "questions": ((), np.uint8),
    "readings": ((), np.uint8),
}
PAGE_BYTES = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in FIELDS.values())


class Batch(NamedTuple):
    """A training batch of B pages with Q tasks of S tokens each; -100 means no target."""

    image: Tensor  # B, height, width, in [-1, 1]
    ids: Tensor  # B, Q, S
    target: Tensor  # B, Q, S: the next id, for the answers' characters and the end
    cells: Tensor  # B, patches * CELLS: class of the character in each cell of the page, 0 for none
    row: Tensor  # B, Q, S: row of patches of the answer's next character,
    column: Tensor  # B, Q, S: its column of cells,
    latent: Tensor  # B, Q, S: its latent


def fill(arrays: dict[str, np.ndarray], index: int, page: Page) -> None:
    """Write a page and its tasks to a row of the arrays.

    Raises:
        ValueError: the page has no question or no line that fits.
    """
    rng = random.Random(page.seed)
    questions, readings = question_tasks(page, rng), reading_tasks(page, rng)
    if not questions or not readings:
        raise ValueError(f"page {page.family} {page.seed} has no task that fits")
    arrays["image"][index] = np.asarray(page.image)
    for i, (char, x, y) in enumerate(page.glyphs[:GLYPHS]):
        arrays["glyph_xy"][index, i] = round(x), round(y)
        arrays["glyph_class"][index, i] = ord(char) - 32 if 32 < ord(char) < 127 else 0
    arrays["questions"][index], arrays["readings"][index] = len(questions), len(readings)
    arrays["glyph"][index] = -1
    for first, tasks in ((0, questions), (QUESTIONS, readings)):
        for i, task in enumerate(tasks, start=first):
            end = task.start + len(task.glyphs)
            arrays["ids"][index, i, : len(task.ids)] = task.ids
            arrays["start"][index, i], arrays["length"][index, i] = task.start, len(task.ids)
            arrays["glyph"][index, i, task.start : end] = [g if g < GLYPHS else -1 for g in task.glyphs]


def shared_arrays(pages: int = BLOCKS * BLOCK) -> dict[str, np.ndarray]:
    """Return arrays of `FIELDS`, in memory that is shared with forked processes."""
    arrays = {}
    for name, (shape, dtype) in FIELDS.items():
        size = pages * math.prod(shape) * np.dtype(dtype).itemsize
        memory = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        arrays[name] = np.frombuffer(memory, dtype=dtype).reshape(pages, *shape)
    return arrays


_arrays: dict[str, np.ndarray] = {}  # the shared arrays, in each worker


def start_pool(arrays: dict[str, np.ndarray]) -> Pool:
    """Start a worker per core; call it before CUDA is initialized."""
    return multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), _start_worker, (arrays,))


def _start_worker(arrays: dict[str, np.ndarray]) -> None:
    os.nice(10)  # give priority to the training process
    _arrays.update(arrays)


def _fill_block(block: int, number: int) -> None:
    """Render training pages from ``number`` on into a block; a page that fails is rendered with another seed."""
    for index in range(BLOCK):
        for attempt in range(20):
            seed = FIRST_TRAINING_SEED + number + index + attempt * 100_000_000
            family = random.Random(seed).choices((*TRAINED_FAMILIES, SCATTER), SHARES)[0]
            try:
                fill(_arrays, block * BLOCK + index, render_page(family, seed))
                break
            except Exception:
                if attempt == 19:
                    raise


class PageStore:
    """Pages on the device, which grow while workers render.

    Args:
        pages: the capacity.
        device: the device.
    """

    def __init__(self, pages: int, device: torch.device) -> None:
        """See the class."""
        self.device, self.size, self.rendered = device, 0, 0
        self.on_device = {
            name: torch.empty(pages, *shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device)
            for name, (shape, dtype) in FIELDS.items()
        }
        self._waiting: deque[tuple[int, AsyncResult[None]]] = deque()

    @classmethod
    def of(cls, pages: list[Page], device: torch.device) -> "PageStore":
        """Return a store of these pages."""
        arrays = {name: np.zeros((len(pages), *shape), dtype) for name, (shape, dtype) in FIELDS.items()}
        for index, page in enumerate(pages):
            fill(arrays, index, page)
        store = cls(len(pages), device)
        store._add(arrays)
        return store

    def render(self, pool: Pool, arrays: dict[str, np.ndarray]) -> None:
        """Start rendering; `grow` requests further blocks."""
        self._pool, self._arrays, self._number = pool, arrays, 0
        for block in range(len(arrays["image"]) // BLOCK):
            self._request(block)

    def _request(self, block: int) -> None:
        self._waiting.append((block, self._pool.apply_async(_fill_block, (block, self._number))))
        self._number += BLOCK

    def grow(self, max_blocks: int = 2) -> None:
        """Copy finished blocks to the device, few per call, so that no training step waits long."""
        while max_blocks and self._waiting and self._waiting[0][1].ready():
            block, result = self._waiting.popleft()
            try:
                result.get()
            except Exception as error:  # losing a block is better than losing the run
                print(f"WARNING: a block of pages was not rendered: {error!r}", flush=True)
            else:
                self._add({name: array[block * BLOCK : (block + 1) * BLOCK] for name, array in self._arrays.items()})
            self._request(block)
            max_blocks -= 1

    def _add(self, arrays: dict[str, np.ndarray]) -> None:
        capacity, count = len(self.on_device["image"]), len(arrays["image"])
        first = self.rendered % (capacity // count * count)
        for name, array in arrays.items():
            self.on_device[name][first : first + count].copy_(torch.from_numpy(array))
        self.rendered += count
        self.size = max(self.size, first + count)

    def training_batch(self, pages: int, slots: int, reading: float) -> Batch:
        """Return augmented random pages with random tasks, of which a fraction ``reading`` are reading tasks."""
        rows = torch.randint(self.size, (pages,), device=self.device)
        offset = torch.arange(slots, device=self.device)

        def pick(count: Tensor) -> Tensor:
            start = torch.rand(pages, 1, device=self.device) * count[:, None]
            return (start.long() + offset) % count[:, None]

        questions, readings = (pick(self.on_device[name][rows].long()) for name in ("questions", "readings"))
        reads = torch.rand(pages, slots, device=self.device) < reading
        return self.batch(rows, torch.where(reads, QUESTIONS + readings, questions), augment=True)

    def batch(self, rows: Tensor, tasks: Tensor, augment: bool = False) -> Batch:
        """Return the pages ``rows`` (B) with their tasks ``tasks`` (B, Q)."""
        on_device, device, count = self.on_device, self.device, len(rows)
        image, xy = on_device["image"][rows], on_device["glyph_xy"][rows].long()
        if augment:
            image, xy = _augment(image, xy)
        x, y = xy.unbind(-1)
        row, column = y // PATCH, x * CELLS // PATCH
        inside = (x >= 0) & (x < PAGE_WIDTH) & (y >= 0) & (y < PAGE_HEIGHT)
        classes = on_device["glyph_class"][rows].long()
        dummy_cell = ROWS * COLUMNS * CELLS
        cells = torch.zeros(count, dummy_cell + 1, dtype=torch.long, device=device)
        cells.scatter_(1, torch.where(inside & (classes > 0), row * COLUMNS * CELLS + column, dummy_cell), classes)

        pages = rows[:, None]
        ids = on_device["ids"][pages, tasks].long()
        start, length = (on_device[name][pages, tasks].long()[..., None] for name in ("start", "length"))
        position = torch.arange(1, SLOT + 1, device=device)
        target = torch.where((position >= start) & (position < length), _next(ids, 0), -100)
        glyph = _next(on_device["glyph"][pages, tasks].long(), -1)

        def at_glyph(value: Tensor) -> Tensor:
            values = value.gather(1, glyph.clamp_min(0).flatten(1)).view_as(glyph)
            known = (glyph >= 0) & inside.gather(1, glyph.clamp_min(0).flatten(1)).view_as(glyph)
            return torch.where(known, values, -100)

        latent = (y // PATCH) * SIDE // ROWS * SIDE + (x // PATCH) * SIDE // COLUMNS
        positions = at_glyph(row), at_glyph(column), at_glyph(latent)
        return Batch(image.float() / 127.5 - 1, ids, target, cells[:, :-1], *positions)


def _next(values: Tensor, last: int) -> Tensor:
    """Shift values by one position to the left, and append ``last``."""
    return torch.cat([values[..., 1:], torch.full_like(values[..., :1], last)], dim=-1)


def _augment(image: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Shift, scale down (half of the pages), darken, add noise, and embolden or thin the strokes of some pages."""
    count, device = len(image), image.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, device=device)

    page = torch.tensor([PAGE_WIDTH - 1, PAGE_HEIGHT - 1], device=device)
    scale = torch.where(uniform(1) < 0.5, 1.0, 1 - (1 - SHRINK) * uniform(2))
    # A scaled page may be anywhere; shifts are whole pixels, so that unscaled pages stay sharp.
    shift = ((1 - scale) * page * uniform(2) + SHIFT * (2 * uniform(2) - 1)).round()
    theta = torch.zeros(count, 2, 3, device=device)
    # affine_grid takes the inverse of new = scale * old + shift, in coordinates from -1 to 1.
    theta[:, 0, 0], theta[:, 1, 1] = (1 / scale).unbind(-1)
    theta[:, :, 2] = 1 / scale - 1 - 2 * shift / (scale * page)
    grid = F.affine_grid(theta, [count, 1, PAGE_HEIGHT, PAGE_WIDTH], align_corners=True)
    image = F.grid_sample(image[:, None].float(), grid, padding_mode="border", align_corners=True)
    xy = (xy * scale[:, None] + shift[:, None]).round().long()

    stroke = uniform(1, 1, 1)
    amount = uniform(1, 1, 1)
    bold, thin = -F.max_pool2d(-image, 3, 1, 1), F.max_pool2d(image, 3, 1, 1)
    image = torch.where(stroke < 0.15, torch.lerp(image, bold, BOLDER * amount), image)
    image = torch.where(stroke > 0.85, torch.lerp(image, thin, THINNER * amount), image)
    noise = NOISE * uniform(1, 1, 1) ** 2 * torch.randn_like(image)
    light = 1 - 0.15 * uniform(1, 1, 1)
    return ((image + noise) * light).clamp(0, 255)[:, 0], xy
