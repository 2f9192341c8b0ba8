"""Make the photographs and the sets of the sheet, on many processes: `prep.py prep SECONDS`."""

import io
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import photographs
from common import DATA, DRY, Out, main
from photos import STATISTICS, true_size
from PIL import Image
from sets import SetWriter

from distrain.data.decoding.image import encode_jpeg, encode_ppm, resize_to_square
from distrain.data.storage.store import Store

UNIQUE, PACKED, AS_IS, RAW = (64, 512, 128, 64) if DRY else (2048, 16384, 4096, 2048)
PROCESSES = 2 if DRY else 10
SIZE = (256, 256)

photographs.load_sample_images = lru_cache(
    photographs.load_sample_images
)  # it decodes two files at each call


def make(seed: int) -> tuple[bytes, bytes, bytes]:
    """Return one photograph as it is, packed to 256 x 256 as JPEG of quality 95, and its raw pixels."""
    data = photographs.photograph(seed)
    pixels = np.asarray(
        resize_to_square(Image.open(io.BytesIO(data)).convert("RGB"), SIZE[0])
    )
    return data, encode_jpeg(pixels, 95), bytes(encode_ppm(pixels))


def write(
    name: str,
    files: list[bytes],
    count: int,
    size: tuple[int, int] | None,
    **options: Any,
) -> None:
    """Write a set of `count` rows, in which each file comes several times."""
    sizes = [size or true_size(data) for data in files]
    writer = SetWriter(
        Store(str(DATA / name)),
        [str(i) for i in range(1000)],
        size,
        proved=True,
        **options,
    )
    for i in range(count):
        writer.add(
            files[i % len(files)], (i * 7919) % 1000, f"{i}.jpg", sizes[i % len(files)]
        )
    writer.finish(STATISTICS)


def write_files(files: list[bytes]) -> None:
    """Write JPEG files for loaders that read no set, and the list of them."""
    folder = DATA / "files"
    folder.mkdir()
    paths = [folder / f"{i:05d}.jpg" for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    (DATA / "files.json").write_text(json.dumps([str(path) for path in paths]))


def prep(out: Out) -> None:
    """Make the photographs, then each set; a file NAME.ready says that it is complete."""
    began = time.monotonic()
    DATA.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(PROCESSES) as pool:
        made = list(pool.map(make, range(UNIQUE), chunksize=8))
    as_is, packed, raw = map(list, zip(*made, strict=True))
    sizes = {
        "bytes_as_is": sum(map(len, as_is)) // UNIQUE,
        "bytes_packed": sum(map(len, packed)) // UNIQUE,
    }
    out("made", seconds=round(time.monotonic() - began, 1), **sizes)
    write_files(packed)
    sets: list[tuple[str, list[bytes], int, tuple[int, int] | None, dict[str, Any]]] = [
        ("packed", packed, PACKED, SIZE, {}),
        ("raw", raw, RAW, SIZE, {"encoding": "raw"}),
        ("as-is", as_is, AS_IS, None, {}),
    ]
    for name, files, count, size, options in sets:
        with out.guarded(name):
            write(name, files, count, size, **options)
            (DATA / f"{name}.ready").touch()
            out(
                "written",
                set=name,
                rows=count,
                at_seconds=round(time.monotonic() - began, 1),
            )


if __name__ == "__main__":
    main({"prep": prep})
