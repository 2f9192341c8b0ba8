"""Build and check everything that a run needs, restored from its newest checkpoint.

All functions here are called on every rank, in the order of `build_job`. Whatever can
fail on one rank alone stands in a `world.raise_on_all_ranks()` block: otherwise the
other ranks would wait for that rank in their next collective.
"""

from collections.abc import Callable
from contextlib import ExitStack

from torch import Tensor, nn

from distrain.config import Config, to_yaml
from distrain.distributed.lane_pool import LanePool, count_lanes
from distrain.distributed.numerics import collect_environment, select_gpu_versions
from distrain.distributed.world import World
from distrain.models.layers import find_batch_norms, get_trainable_parameters
from distrain.monitor.health import Watchdog
from distrain.monitor.meters import Meters
from distrain.monitor.prometheus import Metrics
from distrain.monitor.sinks import Console, read_metrics
from distrain.monitor.telemetry import Telemetry
from distrain.optim.accumulate import GradientAccumulator
from distrain.optim.optimizer import Optimizer
from distrain.result_fields import check_result_fields, get_result_fields
from distrain.rundir import files
from distrain.rundir.lease import count_restarts_and_resizes, read_attempts
from distrain.training.checkpoint_state import BestEval
from distrain.training.class_weights import open_class_weights
from distrain.training.hardware_check import (
    check_equal_on_all_ranks,
    hash_sample_computation,
)
from distrain.training.initial_weights import (
    explain_unread_init,
    keep_initial_hash,
    load_initial_weights,
    share_initial_weights,
)
from distrain.training.job import ModelEngine, TrainJob
from distrain.training.model_setup import build_model
from distrain.training.quarantine_sync import sync_quarantine
from distrain.training.resume import (
    ClaimedRun,
    build_progress,
    check_plateau,
    claim_run_dir,
    restore_best_name,
    restore_checkpoint,
)
from distrain.training.run_data import (
    RunData,
    build_order,
    describe_model,
    explain_memory_excess,
    explain_memory_shortage,
    get_val_fingerprint,
    open_datasets,
    pin_data_fingerprint,
)
from distrain.training.run_dir_writer import RunDirWriter


def build_job(
    config: Config,
    world: World,
    console: Console,
    log_local: Callable[[str], None],
    metrics: Metrics,
    stack: ExitStack,
    *,
    must_resume: bool,
    accept_other_hardware: bool,
) -> TrainJob:
    """Check and build everything, and restore the newest complete checkpoint.

    Args:
        config: the run.
        world: this rank and the others.
        console: where rank 0 prints progress.
        log_local: logs a line on any rank: that it hangs, or that files may have
            crashed its decoder.
        metrics: this rank's Prometheus metrics.
        stack: closes everything that is opened here.
        must_resume: fail if there is no checkpoint.
        accept_other_hardware: resume even if this hardware does not reproduce the
            checkpoint's bits.

    Raises:
        UserError: something does not fit together, on any rank.
        RunError: every complete checkpoint is damaged, the newest undamaged one has
            another format, or too many attempts failed.
    """
    # Claim the run directory. From here on, a rank that hangs is ended.
    claimed_run = claim_run_dir(config, world, console, stack, must_resume=must_resume)
    watchdog = start_watchdog(config, world, log_local, claimed_run, stack)
    metrics.track_watchdog(watchdog)

    # Open the data, and build the model and what trains it.
    config, data, model = open_data_and_model(config, world, claimed_run)
    initial_weights = None
    if claimed_run.state is None:
        config, initial_weights = share_initial_weights(
            config, world, model, data.train.manifest.classes
        )
    class_weights = open_class_weights(config, world, data.train)
    engine = build_engine(config, world, model, class_weights, stack)

    # Check files and hardware, while all ranks still have the initial weights.
    watchdog.mark_progress("checking files that may have crashed the decoder")
    store = claimed_run.store
    sync_quarantine(
        config, world, data.all_datasets, store, log_local, watchdog.mark_progress
    )
    watchdog.mark_progress("the hardware check")
    hardware_hash = check_ranks(config, world, data, engine)

    # Load the weights of `model.init_from`, or restore the checkpoint: rank 0 has read
    # them, the others wait for the tensors.
    if claimed_run.state is not None:
        watchdog.mark_progress("restoring the checkpoint", waiting=True)
    elif config.model.init_from is not None:
        watchdog.mark_progress("loading the initial weights", waiting=True)
        load_initial_weights(world, model, initial_weights)
        for line in initial_weights.lines if initial_weights else ():
            console.log(line)
    restore_checkpoint(
        world,
        console,
        claimed_run,
        engine,
        hardware_hash,
        accept_other_hardware=accept_other_hardware,
    )

    # Open what the run writes, and report where it stands.
    steps_per_epoch = data.order.steps_per_epoch
    progress = build_progress(claimed_run, data.val, config.epochs * steps_per_epoch)
    writer, last_logged_step = open_run_dir_writer(
        config, world, console, metrics, claimed_run, data, progress.best_eval, stack
    )
    set_initial_metrics(config, world, metrics, data, claimed_run, writer)
    if warning := explain_memory_shortage(config, data.train.manifest, world):
        console.log(warning)
    if warning := explain_memory_excess(config, data.train.manifest, world):
        console.log(warning)
    # Only now: the gauge of quarantined samples, set above, does not count these.
    data.train.bad_samples.update(progress.bad_samples)
    job = TrainJob(
        config=config,
        world=world,
        console=console,
        run_dir=store.redacted_url,
        writer=writer,
        telemetry=Telemetry(metrics, watchdog, steps_per_epoch, last_logged_step),
        data=data,
        engine=engine,
        hardware_hash=hardware_hash,
        progress=progress,
    )

    # Of a run that is already finished, neither the page nor the checkpoint matters.
    if not job.is_finished:
        metrics.announce_page()
        if claimed_run.checkpoint is not None:
            name = claimed_run.checkpoint.name
            console.log(f"resumed from step {claimed_run.step} ({name})")
        saved_epochs = claimed_run.state and claimed_run.state.result["epochs"]
        if saved_epochs not in (None, config.epochs):
            console.log(f"epochs is raised from {saved_epochs} to {config.epochs}")
        if claimed_run.state is not None:
            unread = explain_unread_init(config, claimed_run.state)
            if unread is not None:
                console.log(unread)
    return job


def start_watchdog(
    config: Config,
    world: World,
    log_local: Callable[[str], None],
    claimed_run: ClaimedRun,
    stack: ExitStack,
) -> Watchdog:
    """Watch this rank until `stack` closes.

    If it makes no progress for `cluster.stall` seconds, the stacks of its threads are
    written to the run directory, and its process is ended.
    """
    store = claimed_run.store
    # Only rank 0 has the lease, and with it the number of the attempt.
    local_attempt = claimed_run.lease and claimed_run.lease.attempt
    attempt = world.all_gather_object(local_attempt)[0]

    def report_hang(sentence: str, stacks: str) -> None:
        name = files.stacks_path(attempt, world.rank)
        # The line first: the storage may be what hangs.
        log_local(
            f"rank {world.rank} hangs: {sentence}; the stacks of all its threads are "
            f"in {store.redacted_url}/{name}"
        )
        store.write(name, f"{sentence}\n{stacks}".encode())

    return stack.enter_context(Watchdog(config.cluster.stall, report_hang))


def open_data_and_model(
    config: Config, world: World, claimed_run: ClaimedRun
) -> tuple[Config, RunData, nn.Module]:
    """Open the data sets, and build the model on this rank's device.

    Returns:
        The config with the fingerprint of the data, the data, and the model with its
        initial weights.

    Raises:
        UserError: data, model and config do not fit each other or the checkpoint.
    """
    with world.raise_on_all_ranks():
        train, val = open_datasets(config)
        config = pin_data_fingerprint(config, train.manifest)
        if claimed_run.state is not None:
            config = keep_initial_hash(config, claimed_run.state)
            check_result_fields(config, claimed_run.state.result)
            check_plateau(config, val, claimed_run.state)
        data = RunData(train, val, build_order(config, train.manifest.rows_per_group))
        model = build_model(config, len(train.manifest.classes)).to(world.device)
    return config, data, model


def build_engine(
    config: Config,
    world: World,
    model: nn.Module,
    class_weights: Tensor | None,
    stack: ExitStack,
) -> ModelEngine:
    """Build what trains a model: accumulator, optimizer, meters, and lanes."""
    parameters = get_trainable_parameters(model)
    batch_norms = find_batch_norms(model)
    exact = config.reduction.mode == "exact"
    accumulator = GradientAccumulator(
        list(parameters.values()),
        num_virtual_workers=config.virtual_workers,
        micro_batch_size=config.micro_batch_size,
        fraction_bits=config.reduction.fraction_bits if exact else None,
        # A mean and a mean square per feature.
        num_batch_stats=sum(2 * layer.num_features for layer in batch_norms),
    )
    num_lanes = count_lanes(world, config.virtual_workers, config.lanes)
    lanes = LanePool(num_lanes, config.threads, world.device)
    return ModelEngine(
        model=model,
        parameters=parameters,
        batch_norms=batch_norms,
        accumulator=accumulator,
        optimizer=Optimizer(config.optimizer, parameters),
        meters=Meters(world.device, accumulator.loss_shift),
        lanes=stack.enter_context(lanes),
        class_weights=class_weights,
    )


def check_ranks(
    config: Config, world: World, data: RunData, engine: ModelEngine
) -> str | None:
    """Check that all ranks have the same config, files and versions, and the same bits.

    Returns:
        Hash of a sample computation; None if bits are not promised (fast reduction).

    Raises:
        UserError: names the rank and what differs.
    """
    # Hash what this rank computes.
    hardware_hash = None
    with world.raise_on_all_ranks():
        if config.reduction.mode == "exact":
            hardware_hash = hash_sample_computation(
                config,
                world,
                data.train,
                engine.model,
                engine.class_weights,
                engine.accumulator.loss_scale,
                engine.lanes,
            )

    # Compare it, and everything else that decides the weights. Versions of a GPU's
    # libraries need not be equal: in exact mode the computed bits are compared instead,
    # and fast mode promises none. They are listed only to explain a difference.
    environment = collect_environment(world.device)
    hints = select_gpu_versions(environment)
    versions = {name: v for name, v in environment.items() if name not in hints}
    facts = {
        **get_result_fields(config),
        "validation set": get_val_fingerprint(data.val),
        **versions,
        "computed bits": hardware_hash,
    }
    check_equal_on_all_ranks(world, facts, hints)
    return hardware_hash


def open_run_dir_writer(
    config: Config,
    world: World,
    console: Console,
    metrics: Metrics,
    claimed_run: ClaimedRun,
    data: RunData,
    best: BestEval | None,
    stack: ExitStack,
) -> tuple[RunDirWriter | None, int]:
    """Open the writer of the run directory, on rank 0.

    `best.json` is rewritten if it does not name the checkpoint of `best`, the best
    evaluation so far.

    Returns:
        The writer (None on other ranks), and the highest step that an earlier attempt
        has logged.

    Raises:
        UserError: the package of a tracker is not installed.
    """
    writer = None
    last_logged_step = 0
    store = claimed_run.store
    retrier = claimed_run.retrier
    with world.raise_on_all_ranks():
        if claimed_run.lease is not None:
            config_yaml = to_yaml(config).encode()
            retrier(lambda: store.write(files.CONFIG_FILE, config_yaml))
            model_info = describe_model(config, data.train.manifest)
            model_json = model_info.to_json().encode()
            retrier(lambda: store.write(files.MODEL_FILE, model_json))

            # Take the history of the run from its earlier attempts.
            attempts = retrier(lambda: read_attempts(store))
            restarts, resizes = count_restarts_and_resizes(attempts)
            metrics.set_gauge("restarts", restarts)
            metrics.set_gauge("resizes", resizes)
            records = retrier(lambda: read_metrics(store))
            last_logged_step = max((record.step for record in records), default=0)
            retrier(lambda: restore_best_name(store, best))

            writer = RunDirWriter(
                config,
                store,
                claimed_run.lease,
                console,
                metrics,
                stack,
                model_info=model_info,
                step=claimed_run.step,
            )
    return writer, last_logged_step


def set_initial_metrics(
    config: Config,
    world: World,
    metrics: Metrics,
    data: RunData,
    claimed_run: ClaimedRun,
    writer: RunDirWriter | None,
) -> None:
    """Register this rank's storage counters; on rank 0, publish the state of the run.

    That is the list of the nodes' metrics pages, and gauges for the step, the attempt
    and the quarantined samples.
    """
    for split, dataset in (("train", data.train), ("val", data.val)):
        if dataset is not None:
            metrics.track_storage(split, dataset.store.counters)
    scrape_targets = world.all_gather_object(metrics.scrape_target)
    if writer is None:
        return
    # Ranks without a page of their own have no target.
    targets = [target for target in scrape_targets if target]
    if targets:
        writer.write_scrape_targets(targets)
    num_quarantined = sum(len(dataset.bad_samples) for dataset in data.all_datasets)
    metrics.set_gauge("quarantined_samples", num_quarantined)
    metrics.set_gauge("attempt", writer.lease.attempt)
    metrics.set_gauge("steps_planned", config.epochs * data.order.steps_per_epoch)
    metrics.set_gauge("step", claimed_run.step)
