"""A run on one rank: what is built once, by `setup`, and what changes while it trains."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from distrain.config import Config
from distrain.data.loader import Loader, Request
from distrain.data.shards.dataset import Dataset
from distrain.distributed.lanes import Lanes
from distrain.distributed.world import World
from distrain.models.layers import BatchNorm
from distrain.monitor.meters import Meters
from distrain.monitor.records import EvalRecord, MetricsRecord, TrainRecord
from distrain.monitor.sinks import Console
from distrain.monitor.telemetry import Telemetry
from distrain.optim.accumulate import Accumulator
from distrain.optim.optimizer import Optimizer
from distrain.optim.schedule import Stall
from distrain.training.datasets import Data, open_loader
from distrain.training.record import Record
from distrain.training.state import Best


@dataclass(frozen=True)
class Network:
    """The model, and what trains it."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    """Those that are trained."""
    batch_norms: list[BatchNorm]
    accumulator: Accumulator
    optimizer: Optimizer
    meters: Meters
    lanes: Lanes


@dataclass
class Progress:
    """State that the training loop changes; a checkpoint holds `step`, `bad`, `best` and `plateau` of it."""

    step: int
    """Steps that are done: the number, from 0, of the one that comes next."""
    bad: dict[int, str]
    """Reason by sample id, of all training samples met so far that do not decode."""
    bad_told: set[int]
    """Those of them that were named already."""
    best: Best | None
    plateau: Stall
    """Validation history of a schedule that follows validation."""
    val_bad_told: set[int]
    """The validation samples that do not decode, all of them named."""
    train: TrainRecord | None = None
    """The last one of this attempt."""
    eval: EvalRecord | None = None
    saving: tuple[int, str | None] | None = None
    """Step of the checkpoint that was handed to the background last, and its name on the lead."""


@dataclass(frozen=True)
class Job:
    """All that a step touches: built once, by `setup`. What the loop itself counts is in `progress`."""

    config: Config
    world: World
    console: Console
    run: str
    """The run directory without credentials, for messages."""
    record: Record | None
    """What is written there, on the lead."""
    telemetry: Telemetry
    data: Data
    network: Network
    hardware: str | None
    """Hash of what the hardware computes, which the weights depend on; None where no bits are promised."""
    progress: Progress

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.data.order.steps

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.config.schedule.rate(
            step, self.data.order.steps, self.steps, self.progress.plateau.drops
        )

    def loader(
        self, dataset: Dataset, requests: Iterable[Request], *, evaluation: bool = False
    ) -> Loader:
        """A loader on the rank's device, normalising with the training set's statistics."""
        statistics = self.data.train.manifest.statistics
        return open_loader(
            self.config,
            self.world,
            dataset,
            statistics,
            requests,
            evaluation=evaluation,
        )

    def tell(self, record: MetricsRecord) -> None:
        """Write a record to all that follows the run: see `record.Record.tell`."""
        if isinstance(record, TrainRecord):
            self.progress.train = record
        else:
            self.progress.eval = record
        if self.record:
            self.record.tell(record)

    def flush_pages(self) -> None:
        """Bring the pages of all ranks up to date before one of them, which serves them, renders for the last time."""
        self.telemetry.metrics.flush()
        self.world.gather(None)
