"""Build and check everything that a run needs, and restore the newest checkpoint of its directory."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from torch import nn

from distrain.config import Config, result_fields, to_yaml
from distrain.data.storage.store import Store
from distrain.distributed.lanes import Lanes, lanes_for
from distrain.distributed.numerics import environment, explaining
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.models.layers import batch_norms, trained
from distrain.monitor.health import Watchdog
from distrain.monitor.meters import Meters
from distrain.monitor.prometheus import Metrics
from distrain.monitor.sinks import Console, read_metrics
from distrain.monitor.telemetry import Telemetry
from distrain.optim.accumulate import Accumulator
from distrain.optim.optimizer import Optimizer
from distrain.optim.schedule import Stall
from distrain.rundir import files
from distrain.rundir.checkpoint import Loaded, digest, write_best
from distrain.rundir.lease import Lease, attempts, restarts_and_resizes
from distrain.training.datasets import (
    Data,
    memory_warning,
    open_sets,
    order_of,
    pin_data,
    val_fingerprint,
)
from distrain.training.hardware_check import agree, fingerprint
from distrain.training.job import Job, Network, Progress
from distrain.training.quarantined import recall
from distrain.training.record import Record
from distrain.training.resume import (
    Patience,
    check_hardware,
    check_plateau,
    check_result,
    restore,
    take_over,
)
from distrain.training.state import State


@dataclass(frozen=True)
class Claim:
    """The run directory, as this attempt found it."""

    store: Store
    patience: Patience
    lease: Lease | None
    """The right to write there, on the lead."""
    checkpoint: Loaded | None
    """What to resume from, on the lead."""
    state: State | None
    """What that checkpoint says beside its tensors, on all ranks; None at the start of a run."""
    step: int
    """Steps that are done."""


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
    claim = claim_run(config, world, console, stack, must_resume=must_resume)
    watchdog = start_watchdog(config, world, alarm, claim, stack)
    metrics.watch(watchdog)
    config, data, model = open_and_check(config, world, claim)
    network = build_network(config, world, model, stack)
    watchdog.at("the verdicts on files")
    recall(config, world, data.sets, claim.store, alarm, watchdog.at)
    watchdog.at("the check of the hardware")
    hardware = check_ranks(config, world, data, network)
    if claim.state is not None:
        watchdog.at("the restore", waiting=True)
    restore_checkpoint(
        world, console, claim, network, hardware, other_hardware=other_hardware
    )
    record, reached = start_record(config, world, console, metrics, claim, stack)
    start_metrics(config, world, metrics, data, claim, record)
    if warning := memory_warning(config, data.train.manifest, world):
        console.event(warning)
    return Job(
        config=config,
        world=world,
        console=console,
        run=claim.store.name,
        record=record,
        telemetry=Telemetry(metrics, watchdog, data.order.steps, reached),
        data=data,
        network=network,
        hardware=hardware,
        progress=progress_of(claim, data),
    )


def claim_run(
    config: Config,
    world: World,
    console: Console,
    stack: ExitStack,
    *,
    must_resume: bool,
) -> Claim:
    """Take over the run directory, on the lead, and read its newest whole checkpoint; its state on all ranks.

    Raises:
        UserError: another run is at work there, it cannot be used, or there is nothing to resume.
        RunError: no checkpoint is whole, or too many attempts of this launch have failed.
    """
    assert config.run is not None
    store, lease, loaded = Store(config.run), None, None
    patience = Patience(store, config.checkpoint.patience, console)
    with world.together():
        if world.lead:
            lease, loaded = take_over(
                config, world, console, patience, stack, must_resume=must_resume
            )
    found = world.gather(loaded and (loaded.step, loaded.state))[0]
    step, tree = found or (0, None)
    return Claim(
        store, patience, lease, loaded, State.from_tree(tree) if tree else None, step
    )


def start_watchdog(
    config: Config,
    world: World,
    alarm: Callable[[str], None],
    claim: Claim,
    stack: ExitStack,
) -> Watchdog:
    """Watch this rank from here on: if it makes no progress, its stacks are written down and it is ended."""
    store = claim.store
    attempt = world.gather(claim.lease and claim.lease.number)[0]

    def report_hang(sentence: str, stacks: str) -> None:
        name = files.stuck(attempt, world.rank)
        alarm(
            f"rank {world.rank} hangs: {sentence}; all stacks are in {store.name}/{name}"
        )
        store.write(name, f"{sentence}\n{stacks}".encode())

    return stack.enter_context(Watchdog(config.cluster.stall, report_hang))


def open_and_check(
    config: Config, world: World, claim: Claim
) -> tuple[Config, Data, nn.Module]:
    """Open the data and build the model; the config with the fingerprint of the data.

    Raises:
        UserError: data, model and config do not fit each other, or are not those of the checkpoint.
    """
    with world.together():
        train, val = open_sets(config)
        config = pin_data(config, train.manifest)
        if claim.state is not None:
            check_result(config, claim.state.result)
            check_plateau(config, val, claim.state)
        data = Data(train, val, order_of(config, train.manifest.group_rows))
        model = build_model(config, len(train.manifest.classes)).to(world.device)
    return config, data, model


def build_network(
    config: Config, world: World, model: nn.Module, stack: ExitStack
) -> Network:
    """Build what trains a model: accumulator, optimizer, and the threads of its lanes."""
    parameters, norms = trained(model), batch_norms(model)
    accumulator = Accumulator(
        list(parameters.values()),
        virtual_workers=config.virtual_workers,
        micro_batch=config.micro_batch,
        fraction_bits=config.reduction.fraction_bits
        if config.reduction.mode == "exact"
        else None,
        moments=sum(2 * layer.features for layer in norms),
    )
    side_by_side = lanes_for(world, config.virtual_workers, config.lanes)
    return Network(
        model=model,
        parameters=parameters,
        batch_norms=norms,
        accumulator=accumulator,
        optimizer=Optimizer(config.optimizer, parameters),
        meters=Meters(world.device, accumulator.loss_shift),
        lanes=stack.enter_context(Lanes(side_by_side, config.threads, world.device)),
    )


def check_ranks(
    config: Config, world: World, data: Data, network: Network
) -> str | None:
    """Check that all ranks have the same config, files and versions, and compute the same bits.

    Returns:
        Hash of what the hardware computes; None where no bits are promised.

    Raises:
        UserError: naming the rank and what differs.
    """
    hardware = None
    with world.together():
        if config.reduction.mode == "exact":
            scale = network.accumulator.scale
            hardware = fingerprint(
                config, world, data.train, network.model, scale, network.lanes
            )
    hosts = environment(world.device)
    whys = explaining(hosts)
    names = {name: value for name, value in hosts.items() if name not in whys}
    facts = {
        **result_fields(config),
        "validation set": val_fingerprint(data.val),
        **names,
        "computed bits": hardware,
    }
    agree(world, facts, whys)
    return hardware


def restore_checkpoint(
    world: World,
    console: Console,
    claim: Claim,
    network: Network,
    hardware: str | None,
    *,
    other_hardware: bool,
) -> None:
    """Restore weights and moments on all ranks; at the start of a run, see that all have the same.

    Raises:
        UserError: this hardware computes other bits than the checkpoint's, and nobody said that it may.
    """
    model, optimizer = network.model, network.optimizer
    if claim.state is not None:
        check_hardware(
            console, claim.state, environment(world.device), hardware, other_hardware
        )
        restore(world, model, optimizer, claim.checkpoint)
        if claim.checkpoint is not None:
            console.event(f"resumed from step {claim.step} ({claim.checkpoint.name})")
    if world.ranks > 1:
        agree(
            world,
            {
                "weights and moments": digest(
                    {**model.state_dict(), **optimizer.state()}
                )
            },
        )


def start_record(
    config: Config,
    world: World,
    console: Console,
    metrics: Metrics,
    claim: Claim,
    stack: ExitStack,
) -> tuple[Record | None, int]:
    """Start what the lead writes; it, and the highest step that an earlier attempt has logged.

    Raises:
        UserError: a tracker's package is not installed.
    """
    record, reached = None, 0
    store, patience, state, loaded = (
        claim.store,
        claim.patience,
        claim.state,
        claim.checkpoint,
    )
    with world.together():
        if claim.lease is not None:
            patience(lambda: store.write(files.CONFIG, to_yaml(config).encode()))
            restarts, resizes = patience(lambda: restarts_and_resizes(attempts(store)))
            metrics.set("restarts", restarts)
            metrics.set("resizes", resizes)
            reached = max(
                (told.step for told in patience(lambda: read_metrics(store))), default=0
            )
            best = state.best if state else None
            if (
                loaded and best and best.step == loaded.step
            ):  # the run may have been killed just before it did so
                patience(lambda: write_best(store, loaded.name, asdict(best)))
            record = Record(
                config, store, claim.lease, console, metrics, stack, step=claim.step
            )
    return record, reached


def start_metrics(
    config: Config,
    world: World,
    metrics: Metrics,
    data: Data,
    claim: Claim,
    record: Record | None,
) -> None:
    """Tell of storage on each rank, of the run's position on the lead, and where all pages are read."""
    for split, found in (("train", data.train), ("val", data.val)):
        if found is not None:
            metrics.store(split, found.store.counts)
    targets = [target for target in world.gather(metrics.target) if target]
    if record:
        if targets:
            record.targets(targets)
        metrics.set(
            "quarantined_samples", sum(len(dataset.bad) for dataset in data.sets)
        )
        metrics.set("attempt", record.lease.number)
        metrics.set("steps_planned", config.epochs * data.order.steps)
        metrics.set("step", claim.step)


def progress_of(claim: Claim, data: Data) -> Progress:
    """Where the run stands: at its start, or where the checkpoint was saved."""
    state = claim.state
    bad = dict(state.bad_samples) if state else {}
    data.train.bad.update(bad)
    best = state.best if state else None
    if best is not None and best.val != val_fingerprint(data.val):
        best = None  # counts of another validation set say nothing
    return Progress(
        step=claim.step,
        bad=bad,
        bad_told=set(bad),
        best=best,
        plateau=state.plateau if state else Stall(),
        val_bad_told=set(),
    )


def build_model(config: Config, classes: int) -> nn.Module:
    """The network with its first weights.

    Raises:
        UserError: it cannot be trained exactly, or a micro-batch has no moments.
    """
    model = config.model.build(classes, config.seed)
    check_model(config, model, classes)
    return model


def check_model(config: Config, model: nn.Module, classes: int) -> None:
    """Refuse a network that cannot be trained exactly, or whose micro-batches have no moments. Raises UserError."""
    config.model.check(model, classes, config.augment.crop)
    if config.micro_batch == 1 and batch_norms(model):
        raise UserError(
            f"{config.model.name} has batch normalisation, and virtual_workers = {config.virtual_workers} leaves one "
            "sample to each, which has no variance: lower virtual_workers, or raise global_batch"
        )
