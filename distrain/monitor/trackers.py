"""Experiment trackers: TensorBoard event files and an MLflow server.

They get the same records as the metrics file. Each is fed by a thread of its own, so
that none of them can delay a step or end a run.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.monitor.config import LogConfig
from distrain.monitor.records import MetricsRecord
from distrain.rundir import files

_EXPERIMENT_NAME = "distrain"
# Seconds for which the end of a run waits for a tracker.
_CLOSE_TIMEOUT_SECONDS = 30.0


class Tracker(Protocol):
    """Receiver of the records of a run, in order, on one thread."""

    name: str

    def write_record(self, record: MetricsRecord) -> None:
        """Write a record.

        After an exception of any type, the record comes again with the next one.
        """

    def close(self) -> None:
        """Finish: no record will follow."""


class TensorBoardTracker:
    """Event files in the folder `tensorboard` of a run directory on a local disk."""

    name = "tensorboard"

    def __init__(self, folder: str, attempt: int, step: int) -> None:
        """Open the event file of an attempt.

        Args:
            folder: the run directory.
            attempt: its number.
            step: where this attempt starts; later steps of earlier attempts are hidden.
        """
        from tensorboardX import SummaryWriter

        # Without the suffix, two attempts within a second would share a file.
        self._writer = SummaryWriter(
            f"{folder}/{files.TENSORBOARD_DIR}",
            purge_step=step + 1,
            filename_suffix=f".attempt-{attempt:03d}",
        )

    def write_record(self, record: MetricsRecord) -> None:
        """Append a scalar for each number."""
        for name, value in _iter_scalars(record):
            self._writer.add_scalar(name, value, record.step)
        # Flush, so that TensorBoard shows the record before the next one comes.
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class MLflowTracker:
    """Run on an MLflow tracking server."""

    name = "mlflow"

    def __init__(
        self, server_uri: str, store: Store, run_params: Mapping[str, Any]
    ) -> None:
        """Prepare the tracker; it connects to the server at the first record.

        Args:
            server_uri: URI of the server.
            store: the run directory, which names the MLflow run and keeps its id.
            run_params: parameters to log with the run.

        Raises:
            ModuleNotFoundError: mlflow is not installed.
        """
        import mlflow.tracking

        self._client_class = mlflow.tracking.MlflowClient
        self._server_uri = server_uri
        self._store = store
        self._run_params = run_params
        self._client: Any = None
        self._run_id: str | None = None

    def write_record(self, record: MetricsRecord) -> None:
        """Log a metric for each number, as one request."""
        from mlflow.entities import Metric

        if self._run_id is None:
            self._run_id = self._open_run()
        now = int(1000 * time.time())
        metrics = [
            Metric(name, value, now, record.step)
            for name, value in _iter_scalars(record)
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """End the MLflow run; an attempt that resumes opens it again."""
        if self._run_id is not None:
            self._client.set_terminated(self._run_id)

    def _open_run(self) -> str:
        """Resume the MLflow run of this run directory or create it; return its id."""
        from mlflow.entities import Param

        client = self._client_class(self._server_uri)
        self._client = client
        # Resume the run of an earlier attempt.
        try:
            run_id = self._store.read(files.MLFLOW_FILE).decode()
        except FileNotFoundError:
            pass
        else:
            client.update_run(run_id, status="RUNNING")
            return run_id

        # Or create a run, named after the run directory.
        run_name = self._store.url.rstrip("/").rpartition("/")[2]
        run = client.create_run(_get_experiment_id(client), run_name=run_name)
        run_id = str(run.info.run_id)
        # Keep the id before anything else can fail: a retry must not create a second
        # run.
        self._store.write(files.MLFLOW_FILE, run_id.encode())
        params = [Param(name, str(value)) for name, value in self._run_params.items()]
        client.log_batch(run_id, params=params)
        return run_id


class BackgroundTracker:
    """Thread that passes records to a tracker. Close it."""

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]) -> None:
        """Start the thread.

        Args:
            tracker: gets the records, on that thread.
            warn: gets warnings, on the threads that call `write_record` and `close`.
        """
        self._tracker = tracker
        self._warn = warn
        # None marks the end.
        self._record_queue: queue.SimpleQueue[MetricsRecord | None] = (
            queue.SimpleQueue()
        )
        # Records that the tracker has not accepted yet, in order.
        self._unwritten: list[MetricsRecord] = []
        self._last_error: str | None = None
        self._has_warned = False
        self._thread = threading.Thread(
            target=self._write_loop, name=f"distrain-{tracker.name}", daemon=True
        )
        self._thread.start()

    def write_record(self, record: MetricsRecord) -> None:
        """Pass a record to the thread; it returns at once."""
        self._record_queue.put(record)
        # Warn on the calling thread: consoles are not made for several threads.
        if self._last_error is not None and not self._has_warned:
            self._has_warned = True
            self._warn(
                f"warning: cannot write to {self._tracker.name} ({self._last_error}): "
                "records are kept and sent later"
            )

    def close(self) -> None:
        """Wait up to 30 s for the tracker, and warn about records that it lacks."""
        self._record_queue.put(None)
        self._thread.join(_CLOSE_TIMEOUT_SECONDS)
        # The mark of the end is in the queue too, unless the thread has taken it.
        num_missing = len(self._unwritten) + max(0, self._record_queue.qsize() - 1)
        reason = self._last_error or f"no answer for {_CLOSE_TIMEOUT_SECONDS:.0f} s"
        if num_missing:
            self._warn(
                f"warning: the last {num_missing} record{'s' * (num_missing > 1)} did "
                f"not reach {self._tracker.name}: {reason}"
            )
        elif self._thread.is_alive() or self._last_error is not None:
            self._warn(
                f"warning: {self._tracker.name} has all records, but could not be "
                f"closed: {reason}"
            )

    def _write_loop(self) -> None:
        while (record := self._record_queue.get()) is not None:
            self._unwritten.append(record)
            self._write_unwritten()
        # Retry once more what has failed.
        self._write_unwritten()
        if not self._unwritten:
            self._try_call(self._tracker.close)

    def _write_unwritten(self) -> None:
        # Stop at the first failure, to keep the order.
        while self._unwritten and self._try_call(
            lambda: self._tracker.write_record(self._unwritten[0])
        ):
            del self._unwritten[0]

    def _try_call(self, function: Callable[[], None]) -> bool:
        """Call a function of the tracker, and return whether it succeeded."""
        try:
            function()
        except Exception as error:
            # Libraries of trackers raise errors of many types, and none of them may end
            # the thread.
            text = " ".join(str(error).split())[:200]
            self._last_error = f"{type(error).__name__}: {text}"
            return False
        self._last_error = None
        self._has_warned = False
        return True


def start_trackers(
    config: LogConfig,
    store: Store,
    run_params: Mapping[str, Any],
    attempt: int,
    step: int,
    warn: Callable[[str], None],
) -> list[BackgroundTracker]:
    """Start the trackers that the config names.

    Args:
        config: which trackers.
        store: the run directory.
        run_params: settings that decide the weights of the run.
        attempt: number of the attempt.
        step: where this attempt starts.
        warn: gets warnings.

    Raises:
        UserError: a tracker's package is not installed.
    """
    trackers: list[BackgroundTracker] = []
    # A tracker imports its package when it is created, so a missing one shows here.
    try:
        if config.tensorboard:
            assert store.local_path is not None
            tensorboard = TensorBoardTracker(store.local_path, attempt, step)
            trackers.append(BackgroundTracker(tensorboard, warn))
        if config.mlflow is not None:
            mlflow = MLflowTracker(config.mlflow, store, run_params)
            trackers.append(BackgroundTracker(mlflow, warn))
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install 'distrain[trackers]'"
        ) from None
    return trackers


def _get_experiment_id(client: Any) -> Any:
    """Return the id of distrain's experiment, which the first run creates."""
    experiment = client.get_experiment_by_name(_EXPERIMENT_NAME)
    if experiment:
        return experiment.experiment_id
    return client.create_experiment(_EXPERIMENT_NAME)


def _iter_scalars(record: MetricsRecord) -> Iterator[tuple[str, float]]:
    """Yield the name and value of each finite number of a record."""
    for key, value in asdict(record).items():
        # The step is the position of the numbers; the number of classes never changes.
        if key not in ("step", "classes", "phase_seconds") and math.isfinite(value):
            yield f"{record.split}/{key}", float(value)
