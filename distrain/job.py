"""What a run is made of: `setup` checks everything, makes it once, and takes over a checkpoint."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from distrain.checkpoint import Checkpoints, Loaded, checkpoint_attempts, load_newest, write_best
from distrain.config import Config, result_fields, to_yaml
from distrain.data.manifest import MANIFEST, Manifest
from distrain.data.order import Ids, Order
from distrain.data.pack import pack_digits
from distrain.data.shards import Dataset
from distrain.data.store import Store
from distrain.errors import UserError
from distrain.model import build
from distrain.monitor.meters import Meters
from distrain.monitor.sinks import Console, MetricsFile, metrics_attempts
from distrain.optim.accumulate import Accumulator
from distrain.optim.adam import adam
from distrain.optim.optimizer import Optimizer
from distrain.optim.sgd import sgd
from distrain.world import Lanes, World, environment, lanes_for


@dataclass
class Job:
    """All that a step touches, made once by `setup`."""

    config: Config
    world: World
    console: Console
    store: Store
    dataset: Dataset
    val: Dataset | None
    order: Order
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    accumulator: Accumulator
    optimizer: Optimizer
    meters: Meters
    lanes: Lanes
    checkpoints: Checkpoints
    metrics: MetricsFile
    start: int
    """The step that comes next."""
    bad: dict[int, str]
    """Reasons by sample id, of all bad training samples met so far."""
    bad_told: set[int]
    """Those of them that were named already."""
    best: dict[str, Any]
    """The best evaluation: step, top1 and samples as counts."""
    last: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """The last record of each kind."""
    waited: float = 0.0
    """Seconds that lanes waited for data since the last log step."""
    logged: float = 0.0
    """Clock at the last log step."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.order.steps


def setup(config: Config, world: World, console: Console, stack: ExitStack, *, must_resume: bool) -> Job:
    """Check config, data and run directory, build everything, and restore the newest whole checkpoint.

    Raises:
        UserError: something does not fit together.
        RunError: there are checkpoints, but none is whole.
    """
    assert config.run is not None
    store = Store(config.run)
    try:
        loaded, problems = load_newest(store)
    except OSError as error:
        raise UserError(f"cannot read the run directory {store.name}: {error}; choose another, run=...") from None
    if must_resume and loaded is None:
        raise UserError(f"there is no checkpoint to resume from in {store.name}: leave out --resume to start the run")
    if config.data.pack:
        pack_built_in(config, console)
    dataset, val = open_data(config)
    config = pin_data(config, dataset.manifest)
    order = order_of(config, dataset.manifest.group_rows)

    model = build(config.model, len(dataset.manifest.classes), config.seed).to(world.device)
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(config, parameters)
    accumulator = Accumulator(
        list(parameters.values()),
        virtual_workers=config.virtual_workers,
        micro_batch=config.micro_batch,
        fraction_bits=config.reduction.fraction_bits if config.reduction.mode == "exact" else None,
    )
    warning = memory_warning(config, dataset.manifest, world)
    if warning:
        console.event(warning)
    for problem in problems:
        console.event(f"{problem}; falling back to the one before")
    if loaded is not None:
        restore(config, world, console, loaded, model, optimizer)
    write_config(config, store)
    best = loaded.state["best"] if loaded else {}
    if loaded and best.get("step") == loaded.step:
        write_best(store, loaded.name, best)  # in case the run was killed just before it did
    if best.get("val") != val_fingerprint(val):
        best = {}  # counts of another validation set say nothing
    attempt = 1 + max([0, *metrics_attempts(store), *checkpoint_attempts(store)])
    metrics = MetricsFile(store, attempt)
    stack.callback(metrics.close)
    bad = {int(k): v for k, v in loaded.state["bad_samples"].items()} if loaded else {}
    return Job(
        config=config,
        world=world,
        console=console,
        store=store,
        dataset=dataset,
        val=val,
        order=order,
        model=model,
        parameters=parameters,
        accumulator=accumulator,
        optimizer=optimizer,
        meters=Meters(world.device, accumulator.loss_shift),
        lanes=stack.enter_context(Lanes(lanes_for(config, world), config.threads, world.device)),
        checkpoints=Checkpoints(store, attempt=attempt, keep=config.checkpoint.keep, tell=console.event),
        metrics=metrics,
        start=loaded.step if loaded else 0,
        bad=bad,
        bad_told=set(bad),
        best=best,
    )


def val_fingerprint(val: Dataset | None) -> str | None:
    """What the best evaluation was measured on."""
    return val.manifest.fingerprint if val else None


def streams_bytes(config: Config, manifest: Manifest, hosted: int) -> int:
    """What a rank's streams want in memory: a shuffled block of each hosted virtual worker, cut at group edges."""
    sizes = [group.end - group.start for shard in manifest.shards for group in shard.groups]
    block = min(config.data.shuffle_rows, -(-manifest.rows // config.virtual_workers))
    return min(sum(sizes), hosted * (block * sum(sizes) // manifest.rows + max(sizes)))


def memory_warning(config: Config, manifest: Manifest, world: World) -> str | None:
    """What to say where the streams do not fit the memory: then rows are read many times over."""
    wanted = streams_bytes(config, manifest, len(world.hosted(config.virtual_workers)))
    if wanted <= int(config.data.memory):
        return None
    return (
        f"warning: data.memory = {int(config.data.memory):,} bytes is less than the {wanted:,} that the streams of the "
        "virtual workers want, so row groups are read many times: raise it, or lower data.shuffle_rows"
    )


def build_optimizer(config: Config, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer that the config names."""
    rule = config.optimizer
    return sgd(rule, parameters) if rule.name == "sgd" else adam(rule, parameters)


def pack_built_in(config: Config, console: Console) -> None:
    """Pack the built-in source that the config names, on first use."""
    if config.data.val is None:
        raise UserError(f"data.pack = {config.data.pack} makes a validation set too: set data.val")
    if not all(Store(url).exists(MANIFEST) for url in (config.data.train, config.data.val)):
        console.event(f"packing scikit-learn's digits into {config.data.train} and {config.data.val}")
        pack_digits(config.data.train, config.data.val)


def open_data(config: Config) -> tuple[Dataset, Dataset | None]:
    """The training and the validation set, checked against each other and the config."""
    memory, retries = int(config.data.memory), config.data.retries
    sets = []
    for url in (config.data.train, config.data.val):
        if url is not None:
            store = Store(url)
            manifest = Manifest.load(store)
            if min(manifest.height, manifest.width) < config.augment.crop:
                raise UserError(
                    f"augment.crop = {config.augment.crop} does not fit the {manifest.width} x {manifest.height} pixel "
                    f"images of {store.name}: lower it, or pack larger images"
                )
            sets.append(Dataset(store, manifest, memory=memory, retries=retries))
            # Validation reads one group after another: two of them are enough.
            memory = 2 * max(group.end - group.start for shard in manifest.shards for group in shard.groups)
    train, val = sets[0], sets[1] if len(sets) > 1 else None
    if val is not None and val.manifest.classes != train.manifest.classes:
        raise UserError(
            f"{train.store.name} has {len(train.manifest.classes)} classes and {val.store.name} "
            f"{len(val.manifest.classes)}, or other names: pack both from folders of the same names"
        )
    return train, val


def pin_data(config: Config, manifest: Manifest) -> Config:
    """The config with the fingerprint of the data that is there."""
    wanted, found = config.data.fingerprint, manifest.fingerprint
    if wanted not in (None, found):
        raise UserError(
            f"data.fingerprint is {wanted}, but {config.data.train} holds {found}: "
            "use the data set that the config was made for, or another fingerprint and run directory"
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"fingerprint": found})})


def order_of(config: Config, group_rows: Ids) -> Order:
    """The order of the training samples."""
    return Order(group_rows, config.seed, config.virtual_workers, config.micro_batch, config.data.shuffle_rows)


def restore(
    config: Config, world: World, console: Console, loaded: Loaded, model: nn.Module, optimizer: Optimizer
) -> None:
    """Take over a checkpoint, if it belongs to this config.

    Raises:
        UserError: a field that decides the weights differs.
    """
    saved, own = loaded.state["result"], result_fields(config)
    changed = [
        f"\n  - {key}: {saved.get(key)!r} in the checkpoint, {own.get(key)!r} now"
        for key in sorted(saved.keys() | own.keys())
        if saved.get(key) != own.get(key)
    ]
    if changed:
        raise UserError(
            f"{config.run} was trained with other settings, so it cannot go on with these "
            f"(change them back, or start afresh with run=...):{''.join(changed)}"
        )
    before, now = loaded.state["environment"], environment(world.device)
    keys = sorted(before.keys() | now.keys())
    differs = [f"{k} {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]
    if differs:
        console.event(f"warning: the weights may differ in their last bits from here on: {'; '.join(differs)}")
    model.load_state_dict(loaded.model)
    optimizer.load(loaded.optimizer)
    console.event(f"resumed from step {loaded.step} ({loaded.name})")


def write_config(config: Config, store: Store) -> None:
    """Save the resolved config in the run directory, which proves that it can be written to."""
    try:
        store.write("config.yaml", to_yaml(config).encode())
    except OSError as error:
        raise UserError(
            f"the run directory {store.name} cannot be written to ({error}): choose another, run=..."
        ) from None
