"""What a run is made of: `setup` checks everything, makes it once, and takes over a checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from distrain.config import Config, result_fields, to_yaml
from distrain.data.loader import Loader, Request
from distrain.data.order import Order
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.distributed.lanes import Lanes, lanes_for
from distrain.distributed.numerics import environment, explaining
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.models.layers import BatchNorm, batch_norms, trained
from distrain.monitor.health import Spikes, Stragglers, Watchdog
from distrain.monitor.meters import Meters
from distrain.monitor.prometheus import Metrics
from distrain.monitor.sinks import Console, read_metrics
from distrain.optim.accumulate import Accumulator
from distrain.optim.optimizer import Optimizer
from distrain.optim.schedule import Stall
from distrain.rundir import files
from distrain.rundir.checkpoint import digest, write_best
from distrain.rundir.lease import Lease, attempts, restarts_and_resizes
from distrain.training.datasets import memory_warning, open_data, open_loader, order_of, pin_data, val_fingerprint
from distrain.training.hardware_check import agree, fingerprint
from distrain.training.quarantined import recall
from distrain.training.record import Record
from distrain.training.resume import (
    Patience,
    check_hardware,
    check_plateau,
    check_result,
    plateau_of,
    restore,
    take_over,
)


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
    stragglers: Stragglers = field(default_factory=Stragglers)
    spikes: Spikes = field(default_factory=Spikes)
    logged: float = 0.0
    """Clock at the last log step."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.order.steps

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.config.schedule.rate(step, self.order.steps, self.steps, self.plateau.drops)

    def loader(self, dataset: Dataset, requests: Iterator[Request], *, evaluation: bool = False) -> Loader:
        """A loader on the rank's device, normalising with the training set's statistics."""
        statistics = self.dataset.manifest.statistics
        return open_loader(self.config, self.world, dataset, statistics, requests, evaluation=evaluation)

    def tell(self, record: Mapping[str, Any]) -> None:
        """Write a record to all that follows the run: see `Record.tell`."""
        self.last[record["kind"]] = record
        if self.record:
            self.record.tell(record)


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
    optimizer = Optimizer(config.optimizer, parameters)
    accumulator = Accumulator(
        list(parameters.values()),
        virtual_workers=config.virtual_workers,
        micro_batch=config.micro_batch,
        fraction_bits=config.reduction.fraction_bits if config.reduction.mode == "exact" else None,
        moments=sum(2 * layer.features for layer in norms),
    )
    side_by_side = lanes_for(world, config.virtual_workers, config.lanes)
    lanes = stack.enter_context(Lanes(side_by_side, config.threads, world.device))
    watchdog.at("the verdicts on files")
    recall(config, world, [dataset, *([val] if val else [])], store, alarm, watchdog.at)
    if world.lead:
        metrics.set("quarantined_samples", len(dataset.bad) + (len(val.bad) if val else 0))
    watchdog.at("the check of the hardware")
    hardware = None
    with world.together():
        if config.reduction.mode == "exact":
            hardware = fingerprint(config, world, dataset, model, accumulator.scale, lanes)
    hosts = environment(world.device)
    whys = explaining(hosts)
    names = {name: value for name, value in hosts.items() if name not in whys}
    facts = {**result_fields(config), "validation set": val_fingerprint(val), **names, "computed bits": hardware}
    agree(world, facts, whys)
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
            patience(lambda: store.write(files.CONFIG, to_yaml(config).encode()))
            restarts, resizes = patience(lambda: restarts_and_resizes(attempts(store)))
            metrics.set("restarts", restarts)
            metrics.set("resizes", resizes)
            reached = max((r["step"] for r in patience(lambda: read_metrics(store))), default=0)
            if loaded and best.get("step") == loaded.step:  # the run may have been killed just before it did so
                patience(lambda: write_best(store, loaded.name, best))
            record = Record(config, store, lease, console, metrics, stack, step=loaded.step if loaded else 0)
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


def _reporter(
    world: World, alarm: Callable[[str], None], store: Store, lease: Lease | None
) -> Callable[[str, str], None]:
    """What the watchdog does with what it found."""
    attempt = world.gather(lease and lease.number)[0]

    def report(sentence: str, stacks: str) -> None:
        name = files.stuck(attempt, world.rank)
        alarm(f"rank {world.rank} hangs: {sentence}; all stacks are in {store.name}/{name}")
        store.write(name, f"{sentence}\n{stacks}".encode())

    return report


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
