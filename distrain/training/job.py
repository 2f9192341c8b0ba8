"""A run on one rank: what is built once, by `setup`, and what changes while it trains."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from distrain.config import Config
from distrain.data.batch import BatchRequest
from distrain.data.loader import Loader
from distrain.data.shards.dataset import Dataset
from distrain.distributed.lane_pool import LanePool
from distrain.distributed.world import World
from distrain.models.layers import BatchNorm
from distrain.monitor.meters import Meters
from distrain.monitor.records import EvalRecord, MetricsRecord, TrainRecord
from distrain.monitor.sinks import Console
from distrain.monitor.telemetry import Telemetry
from distrain.optim.accumulate import GradientAccumulator
from distrain.optim.optimizer import Optimizer
from distrain.optim.schedule import PlateauState
from distrain.training.checkpoint_state import BestEval
from distrain.training.run_data import RunData, open_loader
from distrain.training.run_dir_writer import RunDirWriter


@dataclass(frozen=True)
class ModelEngine:
    """The model, and what trains it."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    """Those that are trained."""
    batch_norms: list[BatchNorm]
    accumulator: GradientAccumulator
    optimizer: Optimizer
    meters: Meters
    lanes: LanePool


@dataclass
class TrainProgress:
    """State that the training loop changes; a checkpoint holds `step`, `bad`, `best` and `plateau` of it."""

    step: int
    """Steps that are done: the number, from 0, of the one that comes next."""
    bad_samples: dict[int, str]
    """Reason by sample id, of all training samples met so far that do not decode."""
    reported_bad_samples: set[int]
    """Those of them that were named already."""
    best_eval: BestEval | None
    plateau: PlateauState
    """Validation history of a schedule that follows validation."""
    reported_bad_val_samples: set[int]
    """The validation samples that do not decode, all of them named."""
    last_train_record: TrainRecord | None = None
    """The last one of this attempt."""
    last_eval_record: EvalRecord | None = None
    pending_checkpoint: tuple[int, str | None] | None = None
    """Step of the checkpoint that was handed to the background last, and its name on the lead."""


@dataclass(frozen=True)
class TrainJob:
    """All that a step touches: built once, by `setup`. What the loop itself counts is in `progress`."""

    config: Config
    world: World
    console: Console
    run_dir: str
    """The run directory without credentials, for messages."""
    writer: RunDirWriter | None
    """What is written there, on the lead."""
    telemetry: Telemetry
    data: RunData
    engine: ModelEngine
    hardware_hash: str | None
    """Hash of what the hardware computes, which the weights depend on; None where no bits are promised."""
    progress: TrainProgress

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.data.order.steps_per_epoch

    def get_lr(self, step: int) -> float:
        """The learning rate of a step."""
        return self.config.schedule.get_lr(
            step,
            self.data.order.steps_per_epoch,
            self.total_steps,
            self.progress.plateau.drops,
        )

    def open_loader(
        self,
        dataset: Dataset,
        requests: Iterable[BatchRequest],
        *,
        evaluation: bool = False,
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

    def log_metrics(self, record: MetricsRecord) -> None:
        """Write a record to all that follows the run: see `record.Record.tell`."""
        if isinstance(record, TrainRecord):
            self.progress.last_train_record = record
        else:
            self.progress.last_eval_record = record
        if self.writer:
            self.writer.log_metrics(record)

    def flush_metrics(self) -> None:
        """Bring the pages of all ranks up to date before one of them, which serves them, renders for the last time."""
        self.telemetry.metrics.flush()
        self.world.all_gather_object(None)
