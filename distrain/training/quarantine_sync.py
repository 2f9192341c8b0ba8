"""Quarantine of files that crash the decoder.

Verdicts of earlier attempts are kept in the run directory, and shared by all ranks.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress

from distrain.config import Config
from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import sanitize_file
from distrain.data.decoding.quarantine import claim_suspects, decode_one_by_one
from distrain.data.order import IntArray
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.distributed.numerics import collect_environment
from distrain.distributed.world import World
from distrain.errors import RunError
from distrain.rundir import files


def sync_quarantine(
    config: Config,
    world: World,
    datasets: Sequence[Dataset],
    store: Store,
    log_local: Callable[[str], None],
    on_progress: Callable[[str], None],
) -> None:
    """Mark files as bad samples, on all ranks, that crashed a decoder in this run.

    Of a verified data set, no file becomes a bad sample: earlier steps may have trained
    on a window of it that decoded, and the weights would depend on when it crashed.

    Args:
        config: the run.
        world: this rank and the others.
        datasets: the data sets of the run.
        store: the run directory, where rank 0 keeps the verdicts.
        log_local: logs a line on any rank: suspects found on its machine.
        on_progress: gets a short text after each suspect that was decoded.

    Raises:
        RunError: a file of a verified data set crashes the decoder; on all ranks.
    """
    known: dict[str, dict[str, str]] = {}
    local_verdicts: dict[str, dict[int, str]] = {}
    decoder = _describe_decoder(config, world)
    keys = [f"{dataset.manifest.fingerprint} {decoder}" for dataset in datasets]

    # The stack holds the notes of crashed processes, and removes them once the verdicts
    # are stored: if this attempt dies before, the next one finds them again.
    with ExitStack() as notes:
        # Read what is known, and decode this machine's suspects.
        with world.raise_on_all_ranks():
            if world.is_rank_zero and store.exists(files.QUARANTINE_FILE):
                # The file only saves time: what is lost with a damaged one is found out
                # again.
                with suppress(ValueError):
                    known = json.loads(store.read(files.QUARANTINE_FILE))
            for key, dataset in zip(keys, datasets, strict=True):
                local_verdicts[key] = _decode_suspects(
                    config, world, dataset, notes, log_local, on_progress
                )

        # Merge the verdicts of all ranks in one collective call, which does not depend
        # on the data: a rank may have opened another data set, which
        # `check_equal_on_all_ranks` reports later.
        gathered = world.all_gather_object([known, local_verdicts])
        merged = _merge_verdicts(gathered)

        # Store them if they are new.
        with world.raise_on_all_ranks():
            if world.is_rank_zero and merged != known:
                text = json.dumps(merged, indent=1)
                store.write(files.QUARANTINE_FILE, text.encode())

    # Apply them.
    for key, dataset in zip(keys, datasets, strict=True):
        verdicts = {int(i): reason for i, reason in merged.get(key, {}).items()}
        if verdicts and dataset.manifest.verified:
            raise _make_crash_error(dataset, verdicts)
        dataset.bad_samples.update(verdicts)


def _make_crash_error(dataset: Dataset, verdicts: Mapping[int, str]) -> RunError:
    described = [
        f"{i} ({dataset.describe_sample(i)}): {reason}"
        for i, reason in sorted(verdicts.items())
    ]
    return RunError(
        f"DALI cannot decode these samples of {dataset.store.redacted_url}, although "
        f"PIL could: {'; '.join(described)}; pack the data set, which encodes its "
        "images again, or start a new run with data.backend=torch"
    )


def _describe_decoder(config: Config, world: World) -> str:
    # Part of a verdict's key: another version or device may decode what crashes this.
    versions = collect_environment(world.device)
    dali_version = versions.get("nvidia-dali-cuda130") or versions.get(
        "nvidia-dali-cuda120", ""
    )
    return f"{config.data.backend} {dali_version} {world.device.type}"


def _merge_verdicts(
    gathered: Sequence[Sequence[Mapping[str, Mapping[str, str]]]],
) -> dict[str, dict[str, str]]:
    """Merge verdicts of all ranks: reason by sample id, by data set and decoder."""
    merged: dict[str, dict[str, str]] = {}
    for tables_of_rank in gathered:
        for table in tables_of_rank:
            for key, verdicts in table.items():
                merged.setdefault(key, {}).update(verdicts)
    return {key: verdicts for key, verdicts in merged.items() if verdicts}


def _decode_suspects(
    config: Config,
    world: World,
    dataset: Dataset,
    stack: ExitStack,
    log_local: Callable[[str], None],
    on_progress: Callable[[str], None],
) -> dict[int, str]:
    """Decode one by one what was in flight when a process died on this machine.

    Returns:
        Reason by sample id of the files that crash the decoder, or that it rejects.
    """
    may_crash = dataset.manifest.may_crash_decoder
    if not may_crash or config.data.backend != "dali":
        return {}
    ids = stack.enter_context(claim_suspects(str(config.run), dataset))
    if not len(ids):
        return {}
    log_local(
        f"an earlier attempt crashed while it decoded {len(ids)} files "
        f"({_describe_samples(dataset, ids)}): checking them one by one"
    )

    # Read the files. What is bad for `sanitize_file` never gets to the decoder.
    contents = {}
    for i, row in zip(ids.tolist(), dataset.read_rows(ids), strict=True):
        with suppress(BadImageError):
            contents[i] = sanitize_file(
                row.data, config.data.pixel_limit, dataset.manifest.reading
            ).data

    verdicts = decode_one_by_one(
        list(contents.values()),
        world.device,
        lambda n: on_progress(f"verdict {n} of {len(contents)}"),
    )
    # A verdict is None for a file that decodes.
    reasons = {i: v for i, v in zip(contents, verdicts, strict=True) if v}
    if not reasons:
        log_local("all of these files decode: they did not cause the crash")
    return reasons


def _describe_samples(dataset: Dataset, ids: IntArray) -> str:
    first = "; ".join(f"{i}: {dataset.describe_sample(i)}" for i in ids[:3])
    return f"{first}; and {len(ids) - 3} more" if len(ids) > 3 else first
