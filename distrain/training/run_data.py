"""The data sets of a run: opened, and checked against each other and the config."""

from collections.abc import Iterable
from dataclasses import dataclass

from distrain.config import Config
from distrain.data.batch import BatchRequest
from distrain.data.config import Augment
from distrain.data.config import DataConfig as DataSection
from distrain.data.loader import Loader
from distrain.data.order import IntArray, SampleOrder
from distrain.data.prepare.builtin import BUILT_IN_DATASETS
from distrain.data.shards.dataset import Dataset, open_shard_store
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.shards.stats import ColorStatistics
from distrain.data.storage.cache import DiskCache
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.monitor.sinks import Console

# Batches whose row groups an evaluation keeps in memory.
_PREFETCH_BATCHES = 4


@dataclass(frozen=True)
class RunData:
    """The data of a run."""

    train: Dataset
    val: Dataset | None
    order: SampleOrder
    """Which training samples each step takes."""

    @property
    def all_datasets(self) -> list[Dataset]:
        """Both, or the one that there is."""
        return [self.train] if self.val is None else [self.train, self.val]


def open_datasets(config: Config) -> tuple[Dataset, Dataset | None]:
    """Open the training and the validation set, and check them against each other and the config.

    Raises:
        UserError: a set is not there, its images are too small, or classes do not fit each other or the loss.
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
        if val.manifest.classes != train.manifest.classes:
            raise UserError(
                f"{train.store.redacted_url} has {len(train.manifest.classes)} classes and {val.store.redacted_url} "
                f"{len(val.manifest.classes)}, or other names: pack both from folders of the same names"
            )
    config.loss.check_num_classes(len(train.manifest.classes))
    return train, val


def open_dataset(
    url: str,
    data: DataSection,
    augment: Augment,
    *,
    sequential_batch_size: int | None = None,
) -> Dataset:
    """Open one packed set, and check that the crop can be cut out of its images.

    Args:
        url: where it is; `data` says how it is read.
        data: memory, cache and patience.
        augment: the crop.
        in_order: samples of a batch of one that is read in its order, which takes less memory; None: it is shuffled.

    Raises:
        UserError: it is not there, or its images are too small.
    """
    store = Store(url)
    manifest = Manifest.load(store, data.patience)
    check_image_size(augment, store, manifest)
    memory = int(data.memory)
    if sequential_batch_size is not None:
        memory = min(memory, estimate_sequential_bytes(manifest, sequential_batch_size))
    store = open_shard_store(manifest, store)
    cache = (
        DiskCache(data.cache, int(data.cache_bytes), store.counters)
        if data.cache
        else None
    )
    return Dataset(
        store,
        manifest,
        memory_bytes=memory,
        retry_seconds=data.patience,
        disk_cache=cache,
    )


def pack_built_in(name: str, config: Config, console: Console) -> None:
    """Pack a built-in source into the config's sets, on first use."""
    built_in = BUILT_IN_DATASETS[name]
    if config.data.val is None:
        raise UserError(f"data.pack = {name} makes a validation set too: set data.val")
    if not all(
        Store(url).exists(MANIFEST_FILE) for url in (config.data.train, config.data.val)
    ):
        console.log(
            f"packing {built_in.title} into {config.data.train} and {config.data.val}"
        )
        built_in.pack_splits(config.data.train, config.data.val)


def check_image_size(augment: Augment, store: Store, manifest: Manifest) -> None:
    """Raises UserError where the crop cannot be cut out of the images."""
    crop, short_side = augment.crop, augment.short_side
    if short_side is not None:
        return
    if manifest.image_size is None:
        raise UserError(
            f"the images of {store.redacted_url} differ in size: set augment.short_side, to {crop * 256 // 224} as the paper "
            f"does for a crop of {crop}, or pack them with --geometry square:{crop * 256 // 224}"
        )
    if min(manifest.image_size) < crop:
        raise UserError(
            f"augment.crop = {crop} does not fit the {manifest.image_size[1]} x {manifest.image_size[0]} pixel images of "
            f"{store.redacted_url}: lower it, set augment.short_side, or pack larger images"
        )


def pin_data_fingerprint(config: Config, manifest: Manifest) -> Config:
    """The config with the fingerprint of the data that is there."""
    wanted, found = config.data.fingerprint, manifest.fingerprint
    if wanted not in (None, found):
        raise UserError(
            f"data.fingerprint is {wanted}, but {config.data.train} holds {found}: "
            "use the data set that the config was made for, or another fingerprint and run directory"
        )
    return config.model_copy(
        update={"data": config.data.model_copy(update={"fingerprint": found})}
    )


def build_order(config: Config, group_rows: IntArray) -> SampleOrder:
    """The order of the training samples."""
    return SampleOrder(
        group_rows,
        config.seed,
        config.virtual_workers,
        config.micro_batch_size,
        config.data.shuffle_rows,
    )


def get_val_fingerprint(val: Dataset | None) -> str | None:
    """What the best evaluation was measured on."""
    return val.manifest.fingerprint if val else None


def explain_memory_shortage(
    config: Config, manifest: Manifest, world: World
) -> str | None:
    """What to say where the streams do not fit the memory: then rows are read many times over."""
    wanted = estimate_shuffle_bytes(
        config, manifest, len(world.local_virtual_workers(config.virtual_workers))
    )
    if wanted <= int(config.data.memory):
        return None
    return (
        f"warning: data.memory = {int(config.data.memory):,} bytes is less than the {wanted:,} that the streams of the "
        "virtual workers want, so row groups are read many times: raise it, or lower data.shuffle_rows"
    )


def estimate_shuffle_bytes(
    config: Config, manifest: Manifest, num_local_virtual_workers: int
) -> int:
    """What a rank's streams want in memory: a shuffled block of each hosted virtual worker, cut at group edges."""
    sizes = [
        group.end - group.start for shard in manifest.shards for group in shard.groups
    ]
    block = min(
        config.data.shuffle_rows, -(-manifest.num_rows // config.virtual_workers)
    )
    return min(
        sum(sizes),
        num_local_virtual_workers
        * (block * sum(sizes) // manifest.num_rows + max(sizes)),
    )


def estimate_sequential_bytes(manifest: Manifest, batch_size: int) -> int:
    """What it takes to read a set in its order: the row groups of a few batches, fetched ahead."""
    sizes = [
        group.end - group.start for shard in manifest.shards for group in shard.groups
    ]
    return max(sizes) * (
        2 + -(-_PREFETCH_BATCHES * batch_size * len(sizes) // manifest.num_rows)
    )


def open_loader(
    config: Config,
    world: World,
    dataset: Dataset,
    statistics: ColorStatistics,
    requests: Iterable[BatchRequest],
    *,
    evaluation: bool = False,
) -> Loader:
    """Start a loader of a run on the rank's device.

    Args:
        config: the run.
        world: this rank.
        dataset: where the samples are.
        statistics: normalise and colour; always those of the training set.
        requests: what to load.
        evaluation: chunks of `evaluate.batch` samples, their centres; else micro-batches, augmented.
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
