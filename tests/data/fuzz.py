"""Feeds mutated files among good ones through the loader: `python fuzz.py FOLDER FIRST_SEED COUNT BATCH`.

Prints what it found as JSON and ends with 0, or with a traceback: a good file that was not delivered bit-identical, a
bad one that was not named, memory over the bound. A crash of the decoder is a crash of this process.
"""

import hashlib
import json
import resource
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from photos import encoded, kinds, mutated, picture, write_set
from test_loader import deliver, requests

from distrain.config import Config, parse_config

PIXEL_LIMIT = 2_000_000


def settings() -> Config:
    tree = {
        "data": {"train": "fuzz", "pixel_limit": PIXEL_LIMIT, "max_bad_samples": 10**9},
        "augment": {"crop": 64, "short_side": 72},
        "schedule": {"name": "constant", "lr": 1.0},
    }
    return parse_config(tree, "fuzz")


def images(
    folder: Path, files: list[bytes], batch: int
) -> tuple[dict[int, str], dict[int, str]]:
    """Hash of each image that has a weight, and reason of each that has none, by place."""
    found, bad = {}, {}
    for micro_batch in deliver(
        settings(),
        write_set(folder, files),
        requests(range(len(files)), batch),
        batch,
        augmented=False,
    ):
        for i, sample in enumerate(micro_batch.sample_ids.tolist()):
            if micro_batch.sample_weights[i]:
                found[sample] = hashlib.sha256(
                    micro_batch.images[i].numpy().tobytes()
                ).hexdigest()
        bad.update(micro_batch.bad_samples)
    return found, bad


def fuzz(folder: Path, first: int, count: int, batch: int) -> dict[str, object]:
    """As many mutated files as good ones, mixed; every good one is compared with a run of good ones alone."""
    warnings.simplefilter("ignore")
    sources = [
        *kinds(83, 101).values(),
        *(encoded(picture(i, 64 + i, 90)) for i in range(20)),
    ]
    good = [sources[i % len(sources)] for i in range(count)]
    alone, none = images(folder / "good", good, batch)
    assert len(alone) == count
    assert not none
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    bad_ones = [mutated(seed, sources) for seed in range(first, first + count)]
    is_mutated = (
        np.random.default_rng(first).permutation(np.arange(2 * count) % 2).astype(bool)
    )
    places = {True: iter(bad_ones), False: iter(good)}
    found, bad = images(
        folder / "mixed", [next(places[bool(m)]) for m in is_mutated], batch
    )
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    rank = 0
    for place, changed in enumerate(is_mutated):
        if changed:
            assert (place in found) != (place in bad), (
                f"seed {first + place}: neither decoded nor named, or both"
            )
            assert place in found or bad[place], "a reason"
        else:
            assert found[place] == alone[rank], (
                f"good file {rank} was changed by its neighbours"
            )
            rank += 1
    # The bound: three batches of images that each have as many pixels as the limit allows.
    assert after - before < 3 * batch * 3 * PIXEL_LIMIT, f"{(after - before) >> 20} MiB"
    return {
        "mutated": count,
        "batch": batch,
        "bad": len(bad),
        "decoded all the same": len(found) - count,
        "peak MiB over the good ones alone": (after - before) >> 20,
        "verdicts": hashlib.sha256(
            json.dumps([sorted(bad), sorted(found.items())]).encode()
        ).hexdigest(),
    }


if __name__ == "__main__":
    where, first_seed, how_many, batch_size = sys.argv[1:]
    sys.stdout.write(
        json.dumps(fuzz(Path(where), int(first_seed), int(how_many), int(batch_size)))
        + "\n"
    )
