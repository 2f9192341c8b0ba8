"""A run on one rank: what is built once, and what changes while it trains."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

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
from distrain.optim.early_stopping import StopState
from distrain.optim.optimizer import Optimizer
from distrain.optim.schedule import PlateauState
from distrain.training.checkpoint_state import BestEval
from distrain.training.run_data import RunData, open_loader
from distrain.training.run_dir_writer import RunDirWriter


@dataclass(frozen=True)
class ModelEngine:
    """Model, and everything that trains it."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    """Parameters that are trained, by name."""
    batch_norms: list[BatchNorm]
    accumulator: GradientAccumulator
    optimizer: Optimizer
    meters: Meters
    lanes: LanePool
    class_weights: Tensor | None
    """Factor on the losses of each class, float32 of shape (classes,); None: all alike.
    """


@dataclass
class TrainProgress:
    """State that the training loop changes.

    A checkpoint holds `step`, `bad_samples`, the best evaluations, `plateau` and `stop`
    of it.
    """

    step: int
    """Steps done, which is also the number, from 0, of the next step."""
    bad_samples: dict[int, str]
    """Reason by sample id, of all training samples met so far that do not decode.

    Between log steps, each rank knows only those that it has met itself.
    """
    reported_bad_samples: set[int]
    """Bad samples that were reported already."""
    best_eval: BestEval | None
    """Best of all evaluations so far."""
    scheduled_best_eval: BestEval | None
    """Best without an evaluation that was made only because the run ends there."""
    plateau: PlateauState
    """Validation history of a schedule that follows validation."""
    stop: StopState
    """Validation history of early stopping."""
    reported_bad_val_samples: set[int]
    """Validation samples that do not decode, all of them reported."""
    last_train_record: TrainRecord | None = None
    """Record of this attempt's last log step."""
    last_eval_record: EvalRecord | None = None
    """Record of this attempt's last evaluation."""
    pending_checkpoint: tuple[int, str | None] | None = None
    """Step, and on rank 0 name, of the checkpoint last given to the background thread.
    """


@dataclass(frozen=True)
class TrainJob:
    """Everything that a step touches, built once by `build_job`.

    Only `progress` changes while the run trains.
    """

    config: Config
    world: World
    console: Console
    run_dir: str
    """Run directory without credentials, for messages."""
    writer: RunDirWriter | None
    """Writer of the run directory, on rank 0."""
    telemetry: Telemetry
    data: RunData
    engine: ModelEngine
    hardware_hash: str | None
    """Hash of a sample computation on this hardware; None if bits are not promised."""
    progress: TrainProgress

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.data.order.steps_per_epoch

    @property
    def is_stopped_early(self) -> bool:
        """Whether `stop.patience` is over before the last step."""
        is_over = self.progress.stop.is_over(self.config.stop)
        return is_over and self.progress.step < self.total_steps

    @property
    def is_finished(self) -> bool:
        """Whether no step is left."""
        return self.progress.step == self.total_steps or self.is_stopped_early

    def get_lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0.

        It depends on the validations so far if the schedule follows validation.
        """
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
        """Start a loader on the rank's device.

        Images are always normalized with the statistics of the training set.
        """
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
        """Remember a record, and write it wherever `RunDirWriter.log_metrics` does."""
        # The summary of the run has the last record of each kind.
        if isinstance(record, TrainRecord):
            self.progress.last_train_record = record
        else:
            self.progress.last_eval_record = record
        if self.writer:
            self.writer.log_metrics(record)

    def flush_metrics(self) -> None:
        """Flush this rank's metrics, and wait until all ranks have flushed theirs.

        So the last page has them all, whichever rank of a node serves it.
        """
        self.telemetry.metrics.flush()
        # A gather of nothing is a barrier that raises if a rank is lost.
        self.world.all_gather_object(None)
