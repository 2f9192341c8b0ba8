"""What attempts found out about files that may kill the decoder: kept in the run directory, agreed on by all ranks."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from distrain.config import Config
from distrain.data.decoding.image import BadImageError, readable
from distrain.data.decoding.quarantine import judge, suspects
from distrain.data.order import Ids
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.distributed.numerics import environment
from distrain.distributed.world import World
from distrain.rundir import files


def recall(
    config: Config,
    world: World,
    sets: Sequence[Dataset],
    store: Store,
    alarm: Callable[[str], None],
    told: Callable[[str], None],
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
    version = environment(world.device)
    decoder = f"{config.data.backend} {version.get('nvidia-dali-cuda130', '')} {world.device.type}"
    keys = [f"{dataset.manifest.fingerprint} {decoder}" for dataset in sets]
    with ExitStack() as notes:
        with world.together():
            if world.lead and store.exists(files.QUARANTINE):
                with suppress(
                    ValueError
                ):  # a memory: what it no longer says is found out again
                    known = json.loads(store.read(files.QUARANTINE))
            for key, dataset in zip(keys, sets, strict=True):
                own[key] = _judged(config, world, dataset, notes, alarm, told)
        merged: dict[str, dict[str, str]] = {}
        # One collective call, whatever a rank has found: its data may be other data, which `agree` will tell.
        for found in (found for part in world.gather([known, own]) for found in part):
            for key, verdicts in found.items():
                merged.setdefault(key, {}).update(
                    {str(k): reason for k, reason in verdicts.items()}
                )
        merged = {key: verdicts for key, verdicts in merged.items() if verdicts}
        for key, dataset in zip(keys, sets, strict=True):
            dataset.bad.update({int(k): v for k, v in merged.get(key, {}).items()})
        with world.together():
            if world.lead and merged != known:
                store.write(files.QUARANTINE, json.dumps(merged, indent=1).encode())


def _judged(
    config: Config,
    world: World,
    dataset: Dataset,
    notes: ExitStack,
    alarm: Callable[[str], None],
    told: Callable[[str], None],
) -> dict[int, str]:
    """Reason by sample id of the files that killed the decoder of a process on this machine."""
    if dataset.manifest.proved or config.data.backend != "dali":
        return {}
    ids = notes.enter_context(suspects(str(config.run), dataset))
    if not len(ids):
        return {}
    alarm(
        f"an attempt died while it decoded {len(ids)} files ({_names(dataset, ids)}): each is decoded alone now"
    )
    files = {}
    for i, row in zip(ids.tolist(), dataset.rows(ids), strict=True):
        with suppress(BadImageError):  # never gets as far as the decoder
            files[i] = readable(row.data, config.data.pixel_limit).data
    verdicts = judge(
        list(files.values()),
        world.device,
        lambda n: told(f"verdict {n} of {len(files)}"),
    )
    found = {i: verdict for i, verdict in zip(files, verdicts, strict=True) if verdict}
    if not found:
        alarm("each of them decodes alone: none is to blame")
    return found


def _names(dataset: Dataset, ids: Ids) -> str:
    first = "; ".join(f"{i}: {dataset.describe(i)}" for i in ids[:3])
    return f"{first}; and {len(ids) - 3} more" if len(ids) > 3 else first
