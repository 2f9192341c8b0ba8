"""Photographs with ImageNet's sizes and bytes a pixel, made from the two that scikit-learn ships.

Sizes and qualities follow a sample of ILSVRC-2012: most are 500 x 375, quality 85 to 97, 70 % 4:2:0, 1 % grey. Noise
brings them to about 100 kB, as sensors do.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = 10
_SIZES = (
    [(375, 500)] * 62
    + [(500, 375)] * 14
    + [(333, 500)] * 12
    + [(500, 333)] * 4
    + [(480, 640)] * 5
    + [(768, 1024)] * 3
)


def photograph(seed: int) -> bytes:
    """One JPEG file; the same for the same seed."""
    rng = np.random.default_rng(seed)
    source = Image.fromarray(load_sample_images().images[seed % 2])
    height, width = _SIZES[rng.integers(len(_SIZES))]
    zoom = max(height / source.height, width / source.width) * rng.uniform(1.0, 2.0)
    large = source.resize(
        (int(source.width * zoom) + 1, int(source.height * zoom) + 1),
        Image.Resampling.BICUBIC,
    )
    left, top = (
        rng.integers(large.width - width + 1),
        rng.integers(large.height - height + 1),
    )
    pixels = np.asarray(large.crop((left, top, left + width, top + height))).astype(
        np.float64
    )
    pixels = pixels * rng.uniform(0.6, 1.2) + rng.normal(
        0, rng.uniform(2, 6), (height, width, 3)
    )
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    if rng.random() < 0.014:
        image = image.convert("L")
    image.save(
        file,
        "JPEG",
        quality=int(rng.integers(85, 98)),
        subsampling=[2, 2, 2, 1, 0][rng.integers(5)],
    )
    return file.getvalue()


def folder(path: Path, count: int) -> Path:
    """A folder of one folder a class, made on first use."""
    if not path.exists():
        for i in range(count):
            place = path / f"class-{i % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:06d}.JPEG").write_bytes(photograph(i))
    return path
