"""Build and check everything that a run needs, and restore the newest checkpoint of its directory."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from torch import nn

from distrain.config import Config, get_result_fields, to_yaml
from distrain.data.storage.store import Store
from distrain.distributed.lane_pool import LanePool, count_lanes
from distrain.distributed.numerics import collect_environment, select_gpu_versions
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.models.layers import find_batch_norms, get_trainable_parameters
from distrain.monitor.health import Watchdog
from distrain.monitor.meters import Meters
from distrain.monitor.prometheus import Metrics
from distrain.monitor.sinks import Console, read_metrics
from distrain.monitor.telemetry import Telemetry
from distrain.optim.accumulate import GradientAccumulator
from distrain.optim.optimizer import Optimizer
from distrain.optim.schedule import PlateauState
from distrain.rundir import files
from distrain.rundir.checkpoint import LoadedCheckpoint, hash_tensors, write_best
from distrain.rundir.lease import Lease, count_restarts_and_resizes, read_attempts
from distrain.training.checkpoint_state import CheckpointState
from distrain.training.hardware_check import (
    check_equal_on_all_ranks,
    hash_sample_computation,
)
from distrain.training.job import ModelEngine, TrainJob, TrainProgress
from distrain.training.quarantine_sync import sync_quarantine
from distrain.training.resume import (
    Retrier,
    check_hardware,
    check_plateau,
    check_result_fields,
    claim_and_load,
    load_and_broadcast,
)
from distrain.training.run_data import (
    RunData,
    build_order,
    explain_memory_shortage,
    get_val_fingerprint,
    open_datasets,
    pin_data_fingerprint,
)
from distrain.training.run_dir_writer import RunDirWriter


@dataclass(frozen=True)
class ClaimedRun:
    """The run directory, as this attempt found it."""

    store: Store
    retrier: Retrier
    lease: Lease | None
    """The right to write there, on the lead."""
    checkpoint: LoadedCheckpoint | None
    """What to resume from, on the lead."""
    state: CheckpointState | None
    """What that checkpoint says beside its tensors, on all ranks; None at the start of a run."""
    step: int
    """Steps that are done."""


def build_job(
    config: Config,
    world: World,
    console: Console,
    warn: Callable[[str], None],
    metrics: Metrics,
    stack: ExitStack,
    *,
    must_resume: bool,
    accept_other_hardware: bool,
) -> TrainJob:
    """Check config, data and run directory, build everything, and restore the newest whole checkpoint.

    `alarm` is told on every rank if it hangs; `metrics` is what the job counts in.

    Raises:
        UserError: something does not fit together, on any rank.
        RunError: there are checkpoints, but none is whole; or too many attempts failed.
    """
    claim = claim_run_dir(config, world, console, stack, must_resume=must_resume)
    watchdog = start_watchdog(config, world, warn, claim, stack)
    metrics.track_watchdog(watchdog)
    config, data, model = open_data_and_model(config, world, claim)
    network = build_engine(config, world, model, stack)
    watchdog.mark_progress("the verdicts on files")
    sync_quarantine(
        config, world, data.all_datasets, claim.store, warn, watchdog.mark_progress
    )
    watchdog.mark_progress("the check of the hardware")
    hardware = check_ranks(config, world, data, network)
    if claim.state is not None:
        watchdog.mark_progress("the restore", waiting=True)
    restore_checkpoint(
        world,
        console,
        claim,
        network,
        hardware,
        accept_other_hardware=accept_other_hardware,
    )
    record, reached = open_run_dir_writer(config, world, console, metrics, claim, stack)
    set_initial_metrics(config, world, metrics, data, claim, record)
    if warning := explain_memory_shortage(config, data.train.manifest, world):
        console.log(warning)
    return TrainJob(
        config=config,
        world=world,
        console=console,
        run_dir=claim.store.redacted_url,
        writer=record,
        telemetry=Telemetry(metrics, watchdog, data.order.steps_per_epoch, reached),
        data=data,
        engine=network,
        hardware_hash=hardware,
        progress=build_progress(claim, data),
    )


def claim_run_dir(
    config: Config,
    world: World,
    console: Console,
    stack: ExitStack,
    *,
    must_resume: bool,
) -> ClaimedRun:
    """Take over the run directory, on the lead, and read its newest whole checkpoint; its state on all ranks.

    Raises:
        UserError: another run is at work there, it cannot be used, or there is nothing to resume.
        RunError: no checkpoint is whole, or too many attempts of this launch have failed.
    """
    assert config.run is not None
    store, lease, loaded = Store(config.run), None, None
    patience = Retrier(store, config.checkpoint.patience, console)
    with world.raise_on_all_ranks():
        if world.is_rank_zero:
            lease, loaded = claim_and_load(
                config, world, console, patience, stack, must_resume=must_resume
            )
    found = world.all_gather_object(loaded and (loaded.step, loaded.state))[0]
    step, tree = found or (0, None)
    return ClaimedRun(
        store,
        patience,
        lease,
        loaded,
        CheckpointState.from_dict(tree) if tree else None,
        step,
    )


def start_watchdog(
    config: Config,
    world: World,
    warn: Callable[[str], None],
    claimed_run: ClaimedRun,
    stack: ExitStack,
) -> Watchdog:
    """Watch this rank from here on: if it makes no progress, its stacks are written down and it is ended."""
    store = claimed_run.store
    attempt = world.all_gather_object(claimed_run.lease and claimed_run.lease.attempt)[
        0
    ]

    def report_hang(sentence: str, stacks: str) -> None:
        name = files.stacks_path(attempt, world.rank)
        warn(
            f"rank {world.rank} hangs: {sentence}; all stacks are in {store.redacted_url}/{name}"
        )
        store.write(name, f"{sentence}\n{stacks}".encode())

    return stack.enter_context(Watchdog(config.cluster.stall, report_hang))


def open_data_and_model(
    config: Config, world: World, claimed_run: ClaimedRun
) -> tuple[Config, RunData, nn.Module]:
    """Open the data and build the model; the config with the fingerprint of the data.

    Raises:
        UserError: data, model and config do not fit each other, or are not those of the checkpoint.
    """
    with world.raise_on_all_ranks():
        train, val = open_datasets(config)
        config = pin_data_fingerprint(config, train.manifest)
        if claimed_run.state is not None:
            check_result_fields(config, claimed_run.state.result)
            check_plateau(config, val, claimed_run.state)
        data = RunData(train, val, build_order(config, train.manifest.rows_per_group))
        model = build_model(config, len(train.manifest.classes)).to(world.device)
    return config, data, model


def build_engine(
    config: Config, world: World, model: nn.Module, stack: ExitStack
) -> ModelEngine:
    """Build what trains a model: accumulator, optimizer, and the threads of its lanes."""
    parameters, norms = get_trainable_parameters(model), find_batch_norms(model)
    accumulator = GradientAccumulator(
        list(parameters.values()),
        num_virtual_workers=config.virtual_workers,
        micro_batch_size=config.micro_batch_size,
        fraction_bits=config.reduction.fraction_bits
        if config.reduction.mode == "exact"
        else None,
        num_batch_stats=sum(2 * layer.num_features for layer in norms),
    )
    side_by_side = count_lanes(world, config.virtual_workers, config.lanes)
    return ModelEngine(
        model=model,
        parameters=parameters,
        batch_norms=norms,
        accumulator=accumulator,
        optimizer=Optimizer(config.optimizer, parameters),
        meters=Meters(world.device, accumulator.loss_shift),
        lanes=stack.enter_context(LanePool(side_by_side, config.threads, world.device)),
    )


def check_ranks(
    config: Config, world: World, data: RunData, engine: ModelEngine
) -> str | None:
    """Check that all ranks have the same config, files and versions, and compute the same bits.

    Returns:
        Hash of what the hardware computes; None where no bits are promised.

    Raises:
        UserError: naming the rank and what differs.
    """
    hardware = None
    with world.raise_on_all_ranks():
        if config.reduction.mode == "exact":
            scale = engine.accumulator.loss_scale
            hardware = hash_sample_computation(
                config, world, data.train, engine.model, scale, engine.lanes
            )
    hosts = collect_environment(world.device)
    whys = select_gpu_versions(hosts)
    names = {name: value for name, value in hosts.items() if name not in whys}
    facts = {
        **get_result_fields(config),
        "validation set": get_val_fingerprint(data.val),
        **names,
        "computed bits": hardware,
    }
    check_equal_on_all_ranks(world, facts, whys)
    return hardware


def restore_checkpoint(
    world: World,
    console: Console,
    claimed_run: ClaimedRun,
    engine: ModelEngine,
    hardware_hash: str | None,
    *,
    accept_other_hardware: bool,
) -> None:
    """Restore weights and moments on all ranks; at the start of a run, see that all have the same.

    Raises:
        UserError: this hardware computes other bits than the checkpoint's, and nobody said that it may.
    """
    model, optimizer = engine.model, engine.optimizer
    if claimed_run.state is not None:
        check_hardware(
            console,
            claimed_run.state,
            collect_environment(world.device),
            hardware_hash,
            accept_other_hardware,
        )
        load_and_broadcast(world, model, optimizer, claimed_run.checkpoint)
        if claimed_run.checkpoint is not None:
            console.log(
                f"resumed from step {claimed_run.step} ({claimed_run.checkpoint.name})"
            )
    if world.world_size > 1:
        check_equal_on_all_ranks(
            world,
            {
                "weights and moments": hash_tensors(
                    {**model.state_dict(), **optimizer.state_dict()}
                )
            },
        )


def open_run_dir_writer(
    config: Config,
    world: World,
    console: Console,
    metrics: Metrics,
    claimed_run: ClaimedRun,
    stack: ExitStack,
) -> tuple[RunDirWriter | None, int]:
    """Start what the lead writes; it, and the highest step that an earlier attempt has logged.

    Raises:
        UserError: a tracker's package is not installed.
    """
    record, reached = None, 0
    store, patience, state, loaded = (
        claimed_run.store,
        claimed_run.retrier,
        claimed_run.state,
        claimed_run.checkpoint,
    )
    with world.raise_on_all_ranks():
        if claimed_run.lease is not None:
            patience(lambda: store.write(files.CONFIG_FILE, to_yaml(config).encode()))
            restarts, resizes = patience(
                lambda: count_restarts_and_resizes(read_attempts(store))
            )
            metrics.set_gauge("restarts", restarts)
            metrics.set_gauge("resizes", resizes)
            reached = max(
                (told.step for told in patience(lambda: read_metrics(store))), default=0
            )
            best = state.best if state else None
            if (
                loaded and best and best.step == loaded.step
            ):  # the run may have been killed just before it did so
                patience(lambda: write_best(store, loaded.name, asdict(best)))
            record = RunDirWriter(
                config,
                store,
                claimed_run.lease,
                console,
                metrics,
                stack,
                step=claimed_run.step,
            )
    return record, reached


def set_initial_metrics(
    config: Config,
    world: World,
    metrics: Metrics,
    data: RunData,
    claimed_run: ClaimedRun,
    writer: RunDirWriter | None,
) -> None:
    """Tell of storage on each rank, of the run's position on the lead, and where all pages are read."""
    for split, found in (("train", data.train), ("val", data.val)):
        if found is not None:
            metrics.track_storage(split, found.store.counters)
    targets = [
        target for target in world.all_gather_object(metrics.scrape_target) if target
    ]
    if writer:
        if targets:
            writer.write_scrape_targets(targets)
        metrics.set_gauge(
            "quarantined_samples",
            sum(len(dataset.bad_samples) for dataset in data.all_datasets),
        )
        metrics.set_gauge("attempt", writer.lease.attempt)
        metrics.set_gauge("steps_planned", config.epochs * data.order.steps_per_epoch)
        metrics.set_gauge("step", claimed_run.step)


def build_progress(claimed_run: ClaimedRun, data: RunData) -> TrainProgress:
    """Where the run stands: at its start, or where the checkpoint was saved."""
    state = claimed_run.state
    bad = dict(state.bad_samples) if state else {}
    data.train.bad_samples.update(bad)
    best = state.best if state else None
    if best is not None and best.val != get_val_fingerprint(data.val):
        best = None  # counts of another validation set say nothing
    return TrainProgress(
        step=claimed_run.step,
        bad_samples=bad,
        reported_bad_samples=set(bad),
        best_eval=best,
        plateau=state.plateau if state else PlateauState(),
        reported_bad_val_samples=set(),
    )


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The network with its first weights.

    Raises:
        UserError: it cannot be trained exactly, or a micro-batch has no moments.
    """
    model = config.model.build(num_classes, config.seed)
    check_model(config, model, num_classes)
    return model


def check_model(config: Config, model: nn.Module, num_classes: int) -> None:
    """Refuse a network that cannot be trained exactly, or whose micro-batches have no moments. Raises UserError."""
    config.model.check_trainable(model, num_classes, config.augment.crop)
    if config.micro_batch_size == 1 and find_batch_norms(model):
        raise UserError(
            f"{config.model.name} has batch normalisation, and virtual_workers = {config.virtual_workers} leaves one "
            "sample to each, which has no variance: lower virtual_workers, or raise global_batch"
        )
