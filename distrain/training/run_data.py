"""Data sets of a run: opened, and checked against each other and the config."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from distrain import __version__
from distrain.config import Config
from distrain.data.batch import BatchRequest
from distrain.data.batch_builder import Normalization, get_normalization
from distrain.data.config import Augment, DataConfig
from distrain.data.loader import Loader
from distrain.data.order import IntArray, SampleOrder
from distrain.data.prepare.builtin import BUILT_IN_DATASETS
from distrain.data.prepare.pack_notes import is_pack_target
from distrain.data.shards.class_names import match_classes
from distrain.data.shards.dataset import Dataset, open_shard_store
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.shards.stats import ColorStatistics
from distrain.data.storage.cache import DiskCache
from distrain.data.storage.store import Store
from distrain.distributed.process import count_available_memory
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.monitor.sinks import Console
from distrain.rundir.model_info import ModelInfo

# Batches whose row groups an evaluation keeps in memory.
_PREFETCH_BATCHES = 4


@dataclass(frozen=True)
class RunData:
    """Data sets of a run, and the order of its training samples."""

    train: Dataset
    val: Dataset | None
    order: SampleOrder
    """Training samples of each step."""

    @property
    def all_datasets(self) -> list[Dataset]:
        """Training set, and validation set if there is one."""
        return [self.train] if self.val is None else [self.train, self.val]


def open_datasets(config: Config) -> tuple[Dataset, Dataset | None]:
    """Open the training and the validation set, and check that they fit together.

    Raises:
        UserError: a set does not exist, its images are too small, the validation set
            has a class that the training set lacks, or the loss does not fit the number
            of classes.
    """
    train = open_dataset(config.data.train, config.data, config.augment)
    val = None
    if config.data.val is not None:
        val = open_dataset(
            config.data.val,
            config.data,
            config.augment,
            sequential_batch_size=config.evaluate.batch,
        )
        # Labels are numbers, which mean the same only by the names of their classes.
        numbers = match_classes(
            val.classes,
            Store(config.data.val).redacted_url,
            train.classes,
            Store(config.data.train).redacted_url,
        )
        val.renumber_classes(train.classes, numbers)
    config.loss.check_num_classes(len(train.manifest.classes))
    return train, val


def open_dataset(
    url: str,
    data: DataConfig,
    augment: Augment,
    *,
    sequential_batch_size: int | None = None,
) -> Dataset:
    """Open one data set, and check that the crop fits into its images.

    Args:
        url: URL or path of the data set.
        data: memory, cache and retries of its reads.
        augment: the crop.
        sequential_batch_size: samples per batch if the set is read in its order, which
            takes less memory; None: it is shuffled.

    Raises:
        UserError: it does not exist, or its images are too small.
    """
    store = Store(url)
    manifest = Manifest.load(store, data.patience)
    check_image_size(augment, store, manifest)

    # An evaluation gets only the memory that it needs: it reads each row group once.
    memory_bytes = int(data.memory)
    if sequential_batch_size is not None:
        needed_bytes = estimate_sequential_bytes(manifest, sequential_batch_size)
        memory_bytes = min(memory_bytes, needed_bytes)

    # An indexed data set has its shards elsewhere than its manifest.
    store = open_shard_store(manifest, store)
    cache = None
    if data.cache:
        cache = DiskCache(data.cache, int(data.cache_bytes), store.counters)
    return Dataset(
        store,
        manifest,
        memory_bytes=memory_bytes,
        retry_seconds=data.patience,
        disk_cache=cache,
    )


def pack_built_in(name: str, config: Config, console: Console) -> None:
    """Pack a built-in source into the config's data sets, on first use.

    Raises:
        UserError: the config has no validation set, or a folder has other content.
    """
    built_in = BUILT_IN_DATASETS[name]
    if config.data.val is None:
        raise UserError(
            f"data.pack = {name} also packs a validation set: set data.val to where it "
            "goes"
        )
    # A set without a manifest was packed in part, or not at all.
    urls = (config.data.train, config.data.val)
    if all(Store(url).exists(MANIFEST_FILE) for url in urls):
        return
    # The user's own images, most likely: digits are not what they want to train on.
    for url in urls:
        store = Store(url)
        if store.list_names() and not is_pack_target(store):
            raise UserError(
                f"{store.redacted_url} has content, but is no data set: pack it with "
                f"distrain pack, or name a new folder for the {name} (data.pack)"
            )
    console.log(
        f"packing {built_in.title} into {config.data.train} and {config.data.val}"
    )
    built_in.pack_splits(config.data.train, config.data.val)


def check_image_size(augment: Augment, store: Store, manifest: Manifest) -> None:
    """Check that the crop fits into the images as they are stored.

    Raises:
        UserError: it does not, or the images differ in size and are not resized.
    """
    crop = augment.crop
    # With `short_side`, images are resized first: Augment has checked that one.
    if augment.short_side is not None:
        return
    if manifest.image_size is None:
        # 256 for a crop of 224 (Krizhevsky et al. 2012).
        side = crop * 256 // 224
        raise UserError(
            f"the images of {store.redacted_url} differ in size: set "
            f"augment.short_side={side} (the paper's choice for a crop of {crop}), or "
            f"pack them with --geometry square:{side}"
        )
    height, width = manifest.image_size
    if min(height, width) < crop:
        raise UserError(
            f"augment.crop = {crop} does not fit the {width} x {height} pixel images "
            f"of {store.redacted_url}: lower it, set augment.short_side, or pack "
            "larger images"
        )


def pin_data_fingerprint(config: Config, manifest: Manifest) -> Config:
    """Return the config with the fingerprint of the data set that was opened.

    Raises:
        UserError: the config has another fingerprint already.
    """
    expected = config.data.fingerprint
    actual = manifest.fingerprint
    if expected not in (None, actual):
        raise UserError(
            f"data.fingerprint is {expected}, but {config.data.train} holds {actual}: "
            "use the data set that the config was made for, or another fingerprint and "
            "run directory"
        )
    data = config.data.model_copy(update={"fingerprint": actual})
    return config.model_copy(update={"data": data})


def describe_model(config: Config, manifest: Manifest) -> ModelInfo:
    """Return the content of `model.json`.

    Args:
        config: the run.
        manifest: the training set's.
    """
    mean, std = get_normalization(manifest.statistics, config.augment)
    return ModelInfo(
        distrain=__version__,
        model=config.model.model_dump(mode="json"),
        classes=manifest.classes,
        channels="RGB",
        # Doubles that become the same float32 again.
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        crop=config.augment.crop,
        short_side=config.augment.short_side,
        image_size=manifest.image_size,
        interpolation="bilinear",
        antialias=True,
    )


def build_order(config: Config, group_rows: IntArray) -> SampleOrder:
    """Build the order of the training samples.

    Args:
        config: the run.
        group_rows: rows of each row group, shape (groups,).

    Raises:
        UserError: the data set has fewer samples than one global batch.
    """
    return SampleOrder(
        group_rows,
        config.seed,
        config.virtual_workers,
        config.micro_batch_size,
        config.data.shuffle_rows,
    )


def get_val_fingerprint(val: Dataset | None) -> str | None:
    """Return the fingerprint of the validation set, which best evaluations refer to."""
    return val.manifest.fingerprint if val else None


def explain_memory_shortage(
    config: Config, manifest: Manifest, world: World
) -> str | None:
    """Return a warning if row groups do not fit the memory and are read many times."""
    num_virtual_workers = len(world.local_virtual_workers(config.virtual_workers))
    needed_bytes = estimate_shuffle_bytes(config, manifest, num_virtual_workers)
    memory_bytes = int(config.data.memory)
    if needed_bytes <= memory_bytes:
        return None
    return (
        f"warning: data.memory = {memory_bytes:,} bytes is less than the "
        f"{needed_bytes:,} that the virtual workers of a rank need to shuffle, so row "
        "groups are read many times: raise it (a lower data.shuffle_rows is for new "
        "runs only)"
    )


def explain_memory_excess(
    config: Config, manifest: Manifest, world: World
) -> str | None:
    """Return a warning if the row groups of a machine's ranks may exceed its memory.

    All ranks must call it.

    Args:
        config: the run.
        manifest: of the training set. An evaluation keeps only a few batches.
        world: this rank.
    """
    # Ranks of one machine have its address; containers on it have smaller limits.
    ranks = world.all_gather_object([world.node_address, count_available_memory()])
    rank_bytes = min(int(config.data.memory), sum(_list_row_group_bytes(manifest)))
    num_ranks = Counter(address for address, _ in ranks)
    for address, available_bytes in sorted(ranks):
        if num_ranks[address] * rank_bytes > available_bytes:
            fitting_bytes = available_bytes // num_ranks[address]
            return (
                f"warning: data.memory = {int(config.data.memory):,} bytes per rank is "
                f"more than {address} has ({available_bytes:,} for all of its ranks, "
                f"{num_ranks[address]}), so that they may be killed: lower it well "
                f"below {fitting_bytes:,}"
            )
    return None


def estimate_shuffle_bytes(
    config: Config, manifest: Manifest, num_local_virtual_workers: int
) -> int:
    """Estimate the memory in bytes that a rank needs to shuffle.

    It is one shuffled block per local virtual worker, rounded up to row groups; at most
    the whole data set.
    """
    sizes = _list_row_group_bytes(manifest)
    total_bytes = sum(sizes)
    # A virtual worker has no more rows than its segment of the epoch.
    segment_rows = -(-manifest.num_rows // config.virtual_workers)
    block_rows = min(config.data.shuffle_rows, segment_rows)
    block_bytes = block_rows * total_bytes // manifest.num_rows
    # A block ends within a row group, which is kept whole.
    return min(total_bytes, num_local_virtual_workers * (block_bytes + max(sizes)))


def estimate_sequential_bytes(manifest: Manifest, batch_size: int) -> int:
    """Estimate the memory in bytes that it takes to read a data set in its order.

    It is the row groups of a few batches, which are fetched ahead.
    """
    sizes = _list_row_group_bytes(manifest)
    num_prefetched_rows = _PREFETCH_BATCHES * batch_size
    num_groups = -(-num_prefetched_rows * len(sizes) // manifest.num_rows)
    # Two more: batches begin and end within a row group.
    return max(sizes) * (2 + num_groups)


def _list_row_group_bytes(manifest: Manifest) -> list[int]:
    """Return the size of each row group in bytes."""
    return [
        group.end - group.start for shard in manifest.shards for group in shard.groups
    ]


def open_loader(
    config: Config,
    world: World,
    dataset: Dataset,
    statistics: ColorStatistics | Normalization,
    requests: Iterable[BatchRequest],
    *,
    evaluation: bool = False,
) -> Loader:
    """Start a loader of a run on the rank's device.

    Args:
        config: the run.
        world: this rank.
        dataset: the data set to read.
        statistics: for normalization and color shifts; always the training set's. For
            an evaluation, the normalization is enough.
        requests: the batches to load.
        evaluation: True: chunks of `evaluate.batch` samples, center crops; False:
            micro-batches, augmented.
    """
    return Loader(
        dataset,
        statistics,
        requests,
        data=config.data,
        augment=config.augment,
        seed=config.seed,
        run_dir=str(config.run),
        batch_size=config.evaluate.batch if evaluation else config.micro_batch_size,
        device=world.device,
        use_augmentation=not evaluation,
        num_cores=world.num_cores,
    )
