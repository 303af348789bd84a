"""Degrade a clean page like a scan: rotation, blur, uneven light, noise, speckles, JPEG compression."""

import math
import random
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter

Matrix = tuple[float, float, float, float, float, float]
"""An affine transform (a, b, c, d, e, f) of (x, y) to (a x + b y + c, d x + e y + f)."""

CLEAN = 0.2
"""Fraction of pages that stay clean."""


def degrade(image: Image.Image, rng: random.Random, desk: int) -> tuple[Image.Image, Matrix]:
    """Degrade a clean page.

    Args:
        image: the page, mode "L".
        rng: the random generator of the scan.
        desk: the grey value of the background that a rotated page uncovers.

    Returns:
        The degraded page, of the same size, and the transform of its points.
    """
    transform: Matrix = (1, 0, 0, 0, 1, 0)
    if rng.random() < CLEAN:
        return image, transform
    if rng.random() < 0.6:
        image, transform = _rotate(image, rng, desk)
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
    image = _light_and_noise(image, rng)
    if rng.random() < 0.35:
        image = _compress(image, rng.randint(35, 75))
    return image, transform


def transform_point(transform: Matrix, x: float, y: float) -> tuple[float, float]:
    """Return the position on the degraded page of the clean page's point (x, y)."""
    a, b, c, d, e, f = transform
    return a * x + b * y + c, d * x + e * y + f


def _rotate(image: Image.Image, rng: random.Random, desk: int) -> tuple[Image.Image, Matrix]:
    angle = math.radians(rng.uniform(-0.7, 0.7))
    cos, sin = math.cos(angle), math.sin(angle)
    x0, y0 = image.width / 2, image.height / 2
    x1, y1 = x0 + rng.uniform(-2, 2), y0 + rng.uniform(-2, 2)
    # Pillow takes the inverse transform, from output to input.
    inverse = (cos, sin, x0 - cos * x1 - sin * y1, -sin, cos, y0 + sin * x1 - cos * y1)
    rotated = image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, fillcolor=desk)
    return rotated, (cos, -sin, x1 - cos * x0 + sin * y0, sin, cos, y1 - sin * x0 - cos * y0)


def _light_and_noise(image: Image.Image, rng: random.Random) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    height, width = pixels.shape
    # Not NumPy's generators, because their streams may change between versions.
    grain = np.frombuffer(rng.randbytes(height * width), dtype=np.uint8).reshape(height, width)
    level = rng.uniform(0, 26) / 255
    shade_x = np.linspace(rng.uniform(0.92, 1), rng.uniform(0.92, 1), width, dtype=np.float32)
    shade_y = np.linspace(rng.uniform(0.92, 1), rng.uniform(0.92, 1), height, dtype=np.float32)
    pixels = pixels * shade_x * shade_y[:, None] + (grain.astype(np.float32) - 127.5) * np.float32(level)
    if rng.random() < 0.4:
        for _ in range(rng.randint(5, 60)):
            x, y = rng.randrange(width - 1), rng.randrange(height - 1)
            pixels[y : y + rng.randint(1, 2), x : x + rng.randint(1, 2)] = rng.choice((40, 90, 140, 255))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _compress(image: Image.Image, quality: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as compressed:
        return compressed.convert("L")
