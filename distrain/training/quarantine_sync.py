"""What attempts found out about files that may kill the decoder: kept in the run directory, agreed on by all ranks."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from distrain.config import Config
from distrain.data.decoding.image import BadImageError, sanitize_file
from distrain.data.decoding.quarantine import claim_suspects, decode_one_by_one
from distrain.data.order import IntArray
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.distributed.numerics import collect_environment
from distrain.distributed.world import World
from distrain.rundir import files


def sync_quarantine(
    config: Config,
    world: World,
    datasets: Sequence[Dataset],
    store: Store,
    warn: Callable[[str], None],
    on_progress: Callable[[str], None],
) -> None:
    """Learn on all ranks what attempts before this one found out about files that may kill the decoder.

    Args:
        config: the run.
        world: this rank and the others.
        sets: the data sets.
        store: the run directory, where the lead keeps what is known.
        alarm: is told on every rank what is found there.
        told: is told of progress.
    """
    known: dict[str, dict[str, str]] = {}
    own: dict[str, dict[int, str]] = {}
    # Another version or device may decode what this one dies of.
    version = collect_environment(world.device)
    decoder = f"{config.data.backend} {version.get('nvidia-dali-cuda130', '')} {world.device.type}"
    keys = [f"{dataset.manifest.fingerprint} {decoder}" for dataset in datasets]
    with ExitStack() as notes:
        with world.raise_on_all_ranks():
            if world.is_rank_zero and store.exists(files.QUARANTINE_FILE):
                with suppress(
                    ValueError
                ):  # a memory: what it no longer says is found out again
                    known = json.loads(store.read(files.QUARANTINE_FILE))
            for key, dataset in zip(keys, datasets, strict=True):
                own[key] = _decode_suspects(
                    config, world, dataset, notes, warn, on_progress
                )
        merged: dict[str, dict[str, str]] = {}
        # One collective call, whatever a rank has found: its data may be other data, which `agree` will tell.
        for found in (
            found for part in world.all_gather_object([known, own]) for found in part
        ):
            for key, verdicts in found.items():
                merged.setdefault(key, {}).update(
                    {str(k): reason for k, reason in verdicts.items()}
                )
        merged = {key: verdicts for key, verdicts in merged.items() if verdicts}
        for key, dataset in zip(keys, datasets, strict=True):
            dataset.bad_samples.update(
                {int(k): v for k, v in merged.get(key, {}).items()}
            )
        with world.raise_on_all_ranks():
            if world.is_rank_zero and merged != known:
                store.write(
                    files.QUARANTINE_FILE, json.dumps(merged, indent=1).encode()
                )


def _decode_suspects(
    config: Config,
    world: World,
    dataset: Dataset,
    stack: ExitStack,
    warn: Callable[[str], None],
    on_progress: Callable[[str], None],
) -> dict[int, str]:
    """Reason by sample id of the files that killed the decoder of a process on this machine."""
    if dataset.manifest.verified or config.data.backend != "dali":
        return {}
    ids = stack.enter_context(claim_suspects(str(config.run), dataset))
    if not len(ids):
        return {}
    warn(
        f"an attempt died while it decoded {len(ids)} files ({_describe_samples(dataset, ids)}): each is decoded alone now"
    )
    files = {}
    for i, row in zip(ids.tolist(), dataset.read_rows(ids), strict=True):
        with suppress(BadImageError):  # never gets as far as the decoder
            files[i] = sanitize_file(row.data, config.data.pixel_limit).data
    verdicts = decode_one_by_one(
        list(files.values()),
        world.device,
        lambda n: on_progress(f"verdict {n} of {len(files)}"),
    )
    found = {i: verdict for i, verdict in zip(files, verdicts, strict=True) if verdict}
    if not found:
        warn("each of them decodes alone: none is to blame")
    return found


def _describe_samples(dataset: Dataset, ids: IntArray) -> str:
    first = "; ".join(f"{i}: {dataset.describe_sample(i)}" for i in ids[:3])
    return f"{first}; and {len(ids) - 3} more" if len(ids) > 3 else first
