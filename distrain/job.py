"""What a run is made of: `setup` checks everything, makes it once, and takes over a checkpoint."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from distrain.checkpoint import FOLDER as CHECKPOINTS
from distrain.checkpoint import Loaded, digest, load_newest, write_best
from distrain.config import Config, result_fields, to_yaml
from distrain.data.cache import DiskCache
from distrain.data.digits import pack_digits
from distrain.data.manifest import MANIFEST, Manifest
from distrain.data.order import Ids, Order
from distrain.data.shards import Dataset, store_of
from distrain.data.store import Store, may_pass
from distrain.errors import AttemptError, RunError, UserError
from distrain.hardware import agree, fingerprint
from distrain.imported import try_out
from distrain.lanes import Lanes, lanes_for
from distrain.layers import BatchNorm, batch_norms
from distrain.lease import Lease, attempts, claim, failures
from distrain.losses import check_loss
from distrain.model import build, trained
from distrain.monitor.health import Spikes, Stragglers, Watchdog
from distrain.monitor.meters import Meters
from distrain.monitor.prometheus import Metrics
from distrain.monitor.sinks import Console, read_metrics
from distrain.optim.accumulate import Accumulator
from distrain.optim.adam import adam
from distrain.optim.lars import lars
from distrain.optim.optimizer import Optimizer
from distrain.optim.schedule import Stall
from distrain.optim.sgd import sgd
from distrain.recall import recall
from distrain.record import Record
from distrain.sections import ImportedModel
from distrain.world import World, environment

# Batches whose row groups an evaluation keeps in memory.
_BATCHES_AHEAD = 4
T = TypeVar("T")


@dataclass
class Job:
    """All that a step touches, made once by `setup`."""

    config: Config
    world: World
    console: Console
    run: str
    """The run directory, as it may be shown."""
    record: Record | None
    """What is written there, on the lead."""
    watchdog: Watchdog
    metrics: Metrics
    dataset: Dataset
    val: Dataset | None
    order: Order
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    """Those that are trained."""
    batch_norms: list[BatchNorm]
    accumulator: Accumulator
    optimizer: Optimizer
    meters: Meters
    lanes: Lanes
    hardware: str | None
    """Hash of what the hardware computes, which the weights depend on; None where no bits are promised."""
    start: int
    """The step that comes next."""
    reached: int
    """On the lead: steps that earlier attempts had done, as far as their metrics tell."""
    bad: dict[int, str]
    """Reasons by sample id, of all bad training samples met so far."""
    bad_told: set[int]
    """Those of them that were named already."""
    val_bad_told: set[int]
    """The validation samples that do not decode, all of them named."""
    best: dict[str, Any]
    """The best evaluation: step, top1 and samples as counts."""
    plateau: Stall
    """What the plateau schedule has seen."""
    last: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """The last record of each kind."""
    saving: tuple[int, str | None] | None = None
    """Step and name of the checkpoint that was handed to the background last."""
    waited: float = 0.0
    """Seconds that lanes waited for data since the last log step."""
    arrived: float = 0.0
    """Seconds in which this rank came to the reductions since the last log step."""
    stragglers: Stragglers = field(default_factory=Stragglers)
    spikes: Spikes = field(default_factory=Spikes)
    logged: float = 0.0
    """Clock at the last log step."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.order.steps


def setup(
    config: Config,
    world: World,
    console: Console,
    alarm: Callable[[str], None],
    metrics: Metrics,
    stack: ExitStack,
    *,
    must_resume: bool,
    other_hardware: bool,
) -> Job:
    """Check config, data and run directory, build everything, and restore the newest whole checkpoint.

    `alarm` is told on every rank if it hangs; `metrics` is what the job counts in.

    Raises:
        UserError: something does not fit together, on any rank.
        RunError: there are checkpoints, but none is whole; or too many attempts failed.
    """
    assert config.run is not None
    store, lease, loaded, state = Store(config.run), None, None, None
    patience = Patience(store, config.checkpoint.patience, console)
    with world.together():
        if world.lead:
            lease, loaded = take_over(config, world, console, patience, stack, must_resume=must_resume)
            state = loaded and {**loaded.state, "name": loaded.name}
    state = world.gather(state)[0]
    watchdog = stack.enter_context(Watchdog(config.cluster.stall, _reporter(world, alarm, store, lease)))
    metrics.watch(watchdog)

    with world.together():
        dataset, val = open_data(config)
        config = pin_data(config, dataset.manifest)
        if state is not None:
            check_result(config, state["result"])
            check_plateau(config, val, state)
        order = order_of(config, dataset.manifest.group_rows)
        model = build_model(config, len(dataset.manifest.classes)).to(world.device)
    parameters, norms = trained(model), batch_norms(model)
    optimizer = build_optimizer(config, parameters)
    accumulator = Accumulator(
        list(parameters.values()),
        virtual_workers=config.virtual_workers,
        micro_batch=config.micro_batch,
        fraction_bits=config.reduction.fraction_bits if config.reduction.mode == "exact" else None,
        moments=sum(2 * layer.features for layer in norms),
    )
    lanes = stack.enter_context(Lanes(lanes_for(config, world), config.threads, world.device))
    watchdog.at("the verdicts on files")
    recall(config, world, [dataset, *([val] if val else [])], store, alarm, watchdog.at)
    watchdog.at("the check of the hardware")
    hardware = None
    with world.together():
        if config.reduction.mode == "exact":
            hardware = fingerprint(config, world, dataset, model, accumulator.scale, lanes)
    hosts = environment(world.device)
    agree(world, {**result_fields(config), "validation set": val_fingerprint(val), **hosts, "computed bits": hardware})
    if state is not None:
        check_hardware(console, state, hosts, hardware, other_hardware)
        watchdog.at("the restore", waiting=True)
        restore(world, model, optimizer, loaded)
        console.event(f"resumed from step {state['step']} ({state['name']})")
    if world.ranks > 1:
        agree(world, {"weights and moments": digest({**model.state_dict(), **optimizer.state()})})

    record, reached = None, 0
    best = state["best"] if state else {}
    with world.together():
        if lease is not None:
            patience(lambda: store.write("config.yaml", to_yaml(config).encode()))
            reached = max((r["step"] for r in patience(lambda: read_metrics(store))), default=0)
            if loaded and best.get("step") == loaded.step:  # the run may have been killed just before it did so
                patience(lambda: write_best(store, loaded.name, best))
            record = Record(config, store, lease, console, metrics, stack)
    for split, found in (("train", dataset), ("val", val)):
        if found is not None:
            metrics.store(split, found.store.counts)
    targets = [target for target in world.gather(metrics.target) if target]
    if record:
        if targets:
            record.targets(targets)
        metrics.set("attempt", record.lease.number)
        metrics.set("steps_planned", config.epochs * order.steps)
        metrics.set("step", state["step"] if state else 0)
    if best.get("val") != val_fingerprint(val):
        best = {}  # counts of another validation set say nothing
    if warning := memory_warning(config, dataset.manifest, world):
        console.event(warning)
    bad = {int(k): v for k, v in state["bad_samples"].items()} if state else {}
    dataset.bad.update(bad)
    return Job(
        config=config,
        world=world,
        console=console,
        run=store.name,
        record=record,
        watchdog=watchdog,
        metrics=metrics,
        dataset=dataset,
        val=val,
        order=order,
        model=model,
        parameters=parameters,
        batch_norms=norms,
        accumulator=accumulator,
        optimizer=optimizer,
        meters=Meters(world.device, accumulator.loss_shift),
        lanes=lanes,
        hardware=hardware,
        start=state["step"] if state else 0,
        reached=reached,
        bad=bad,
        bad_told=set(bad),
        val_bad_told=set(),
        best=best,
        plateau=plateau_of(state),
    )


def take_over(
    config: Config, world: World, console: Console, patience: "Patience", stack: ExitStack, *, must_resume: bool
) -> tuple[Lease, Loaded | None]:
    """On the lead: the right to write to the run directory, and the checkpoint to go on from.

    Raises:
        UserError: another run is at work there, or it cannot be used.
        RunError: no checkpoint is whole, or too many attempts of this launch have failed.
    """
    store = patience.store
    nothing = UserError(f"there is no checkpoint to resume from in {store.name}: leave out --resume to start the run")
    if must_resume and not patience(lambda: store.list(CHECKPOINTS)):
        raise nothing
    lease = stack.enter_context(patience(lambda: claim(store, world.session, console.event)))
    loaded, problems = patience(lambda: load_newest(store))
    if must_resume and loaded is None:
        raise nothing
    step = loaded.step if loaded else 0
    patience(lambda: lease.started_from(step))
    for problem in problems:
        console.event(f"{problem}; falling back to the one before")
    before = {number: record for number, record in patience(lambda: attempts(store)).items() if number < lease.number}
    failed = failures(before, world.session, step)
    if failed >= config.cluster.max_failures:
        raise RunError(
            f"{failed} attempts in a row failed after step {step} without a new checkpoint, which is as many as "
            "cluster.max_failures allows: mend the cause, then run the same command to go on"
        )
    if config.data.pack:
        pack_built_in(config, console)
    return lease, loaded


class Patience:
    """Tries again what fails for want of room, or of an answer from the run directory; for a while in all."""

    def __init__(self, store: Store, seconds: float, console: Console) -> None:
        self.store, self._console, self._told = store, console, False
        self._end = time.monotonic() + seconds

    def __call__(self, act: Callable[[], T]) -> T:
        """What `act` returns. Raises UserError where waiting cannot help, AttemptError where it did not."""
        while True:
            try:
                return act()
            except OSError as error:
                what = f"the run directory {self.store.name} cannot be written to or read ({error})"
                if not may_pass(error):
                    raise UserError(f"{what}: choose another, run=...") from None
                if time.monotonic() > self._end:
                    raise AttemptError(f"{what}: free space or mend the storage, or choose another, run=...") from None
                if not self._told:
                    self._console.event(f"{what}: trying again")
                self._told = True
                time.sleep(1.0)


def _reporter(
    world: World, alarm: Callable[[str], None], store: Store, lease: Lease | None
) -> Callable[[str, str], None]:
    """What the watchdog does with what it found."""
    attempt = world.gather(lease and lease.number)[0]

    def report(sentence: str, stacks: str) -> None:
        name = f"stuck-attempt-{attempt:03d}-rank-{world.rank}.txt"
        alarm(f"rank {world.rank} hangs: {sentence}; all stacks are in {store.name}/{name}")
        store.write(name, f"{sentence}\n{stacks}".encode())

    return report


def check_hardware(
    console: Console, state: Mapping[str, Any], now: Mapping[str, str], hardware: str | None, other_hardware: bool
) -> None:
    """Compare what this hardware computes with what the checkpoint's did.

    Raises:
        UserError: it differs, and nobody said that it may.
    """
    if state["hardware"] == hardware:
        return
    before = state["environment"]
    keys = sorted(before.keys() | now.keys())
    differs = [f"{k} {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]
    what = "; ".join(differs) or "the same names and versions, another result"
    if not other_hardware:
        raise UserError(
            f"this hardware computes other bits than that of the checkpoint ({what}): use the same kind, "
            "or give up the promise with --accept-other-hardware"
        )
    console.event(f"warning: other hardware than before ({what}): bits are no longer promised for this run")


def val_fingerprint(val: Dataset | None) -> str | None:
    """What the best evaluation was measured on."""
    return val.manifest.fingerprint if val else None


def streams_bytes(config: Config, manifest: Manifest, hosted: int) -> int:
    """What a rank's streams want in memory: a shuffled block of each hosted virtual worker, cut at group edges."""
    sizes = [group.end - group.start for shard in manifest.shards for group in shard.groups]
    block = min(config.data.shuffle_rows, -(-manifest.rows // config.virtual_workers))
    return min(sum(sizes), hosted * (block * sum(sizes) // manifest.rows + max(sizes)))


def streamed_bytes(manifest: Manifest, batch: int) -> int:
    """What it takes to read a set in its order: the row groups of a few batches, fetched ahead."""
    sizes = [group.end - group.start for shard in manifest.shards for group in shard.groups]
    return max(sizes) * (2 + -(-_BATCHES_AHEAD * batch * len(sizes) // manifest.rows))


def memory_warning(config: Config, manifest: Manifest, world: World) -> str | None:
    """What to say where the streams do not fit the memory: then rows are read many times over."""
    wanted = streams_bytes(config, manifest, len(world.hosted(config.virtual_workers)))
    if wanted <= int(config.data.memory):
        return None
    return (
        f"warning: data.memory = {int(config.data.memory):,} bytes is less than the {wanted:,} that the streams of the "
        "virtual workers want, so row groups are read many times: raise it, or lower data.shuffle_rows"
    )


def build_model(config: Config, classes: int) -> nn.Module:
    """The network with its first weights.

    Raises:
        UserError: a model that is imported cannot be trained exactly, or a micro-batch has no moments.
    """
    model = build(config.model, classes, config.seed)
    if isinstance(config.model, ImportedModel):
        try_out(model, config.model.name, classes, config.augment.crop)
    if config.micro_batch == 1 and batch_norms(model):
        raise UserError(
            f"{config.model.name} has batch normalisation, and virtual_workers = {config.virtual_workers} leaves one "
            "sample to each, which has no variance: lower virtual_workers, or raise global_batch"
        )
    return model


def build_optimizer(config: Config, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer that the config names."""
    rule = config.optimizer
    if rule.name == "lars":
        return lars(rule, parameters)
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
    memory, patience = int(config.data.memory), config.data.patience
    sets: list[Dataset] = []
    for url in (config.data.train, config.data.val):
        if url is not None:
            store = Store(url)
            manifest = Manifest.load(store, patience)
            check_size(config, store, manifest)
            if sets:  # validation reads one group after another
                memory = min(memory, streamed_bytes(manifest, config.evaluate.batch))
            folder, limit, store = config.data.cache, int(config.data.cache_bytes), store_of(manifest, store)
            cache = DiskCache(folder, limit, store.counts) if folder else None
            sets.append(Dataset(store, manifest, memory=memory, patience=patience, cache=cache))
    train, val = sets[0], sets[1] if len(sets) > 1 else None
    if val is not None and val.manifest.classes != train.manifest.classes:
        raise UserError(
            f"{train.store.name} has {len(train.manifest.classes)} classes and {val.store.name} "
            f"{len(val.manifest.classes)}, or other names: pack both from folders of the same names"
        )
    check_loss(config.loss, len(train.manifest.classes))
    return train, val


def check_size(config: Config, store: Store, manifest: Manifest) -> None:
    """Raises UserError where the crop cannot be cut out of the images."""
    crop, short_side = config.augment.crop, config.augment.short_side
    if short_side is not None:
        return
    if manifest.size is None:
        raise UserError(
            f"the images of {store.name} differ in size: set augment.short_side, to {crop * 256 // 224} as the paper "
            f"does for a crop of {crop}, or pack them with --geometry square:{crop * 256 // 224}"
        )
    if min(manifest.size) < crop:
        raise UserError(
            f"augment.crop = {crop} does not fit the {manifest.size[1]} x {manifest.size[0]} pixel images of "
            f"{store.name}: lower it, set augment.short_side, or pack larger images"
        )


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


def check_result(config: Config, saved: Mapping[str, Any]) -> None:
    """Raises UserError where a field that decides the weights differs from the checkpoint's."""
    own = result_fields(config)
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


def plateau_of(state: Mapping[str, Any] | None) -> Stall:
    """What the plateau schedule had seen when a checkpoint was saved."""
    if state is None:
        return Stall()
    saved = state["plateau"]
    return Stall(saved["best"], saved["epochs"], tuple(saved["drops"]))


def check_plateau(config: Config, val: Dataset | None, state: Mapping[str, Any]) -> None:
    """Raises UserError where the plateau schedule would compare counts of two validation sets."""
    if config.schedule.name == "plateau" and state["val"] != val_fingerprint(val):
        raise UserError(
            f"{config.run} was trained with another validation set, whose counts its plateau schedule follows: "
            "use that one (data.val), or start afresh with run=..."
        )


def restore(world: World, model: nn.Module, optimizer: Optimizer, loaded: Loaded | None) -> None:
    """Take over a checkpoint: the lead has read it, the others get its tensors."""
    if loaded is not None:
        model.load_state_dict(loaded.model)
        optimizer.load(loaded.optimizer)
    for tensor in (*model.state_dict().values(), *optimizer.state().values()):
        world.copy_from_lead(tensor)
