"""Experiment trackers beside the metrics file: TensorBoard's event files in the run directory, an MLflow server.

Each is fed by a thread of its own: none of them can hold up a step, or end a run.
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
    """Takes the records of a run, in order. Called on one thread."""

    name: str

    def write_record(self, record: MetricsRecord) -> None:
        """Take a record; any exception means that it was not taken, and comes again with the next one."""

    def close(self) -> None:
        """No more will come."""


class TensorBoardTracker:
    """Event files in the folder `tensorboard` of a run directory on a disk."""

    name = "tensorboard"

    def __init__(self, folder: str, attempt: int, step: int) -> None:
        """`step`: where this attempt goes on from; what earlier ones told of later steps is not shown any more."""
        from tensorboardX import SummaryWriter

        suffix = f".attempt-{attempt:03d}"  # else two attempts within a second would have one file
        self._writer = SummaryWriter(
            f"{folder}/{files.TENSORBOARD_DIR}",
            purge_step=step + 1,
            filename_suffix=suffix,
        )

    def write_record(self, record: MetricsRecord) -> None:
        """Append a scalar for each number."""
        for name, value in _iter_scalars(record):
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class MLflowTracker:
    """A run on an MLflow tracking server."""

    name = "mlflow"

    def __init__(
        self, server_uri: str, store: Store, run_params: Mapping[str, Any]
    ) -> None:
        """Nothing is asked of the server before the first record.

        Args:
            server: its URI.
            store: the run directory, which names the run there and keeps its id.
            parameters: what the run is logged with.

        Raises:
            ModuleNotFoundError: mlflow is not installed.
        """
        import mlflow.tracking

        self._client_class = mlflow.tracking.MlflowClient
        self._server_uri, self._store, self._run_params = server_uri, store, run_params
        self._client: Any = None
        self._run_id: str | None = None

    def write_record(self, record: MetricsRecord) -> None:
        """Log a metric for each number, as one request."""
        from mlflow.entities import Metric

        if self._run_id is None:
            self._run_id = self._open_run()
        now = int(1000 * time.time())
        self._client.log_batch(
            self._run_id,
            metrics=[Metric(k, v, now, record.step) for k, v in _iter_scalars(record)],
        )

    def close(self) -> None:
        """The run at the server is ended as far as this attempt goes; a resume opens it again."""
        if self._run_id is not None:
            self._client.set_terminated(self._run_id)

    def _open_run(self) -> str:
        """The id of the run at the server."""
        from mlflow.entities import Param

        client = self._client = self._client_class(self._server_uri)
        try:
            run = self._store.read(files.MLFLOW_FILE).decode()
        except FileNotFoundError:
            pass
        else:
            client.update_run(run, status="RUNNING")
            return run
        found = client.get_experiment_by_name(_EXPERIMENT_NAME)
        experiment = (
            found.experiment_id if found else client.create_experiment(_EXPERIMENT_NAME)
        )
        name = self._store.url.rstrip("/").rpartition("/")[2]
        run = str(client.create_run(experiment, run_name=name).info.run_id)
        self._store.write(
            files.MLFLOW_FILE, run.encode()
        )  # first: what fails from here on must not begin another run
        client.log_batch(
            run, params=[Param(k, str(v)) for k, v in self._run_params.items()]
        )
        return run


class BackgroundTracker:
    """Hands records to a tracker, on a thread of its own. Close it."""

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]) -> None:
        """`tell` gets warnings, on the thread that writes and closes."""
        self._tracker, self._warn = tracker, warn
        self._record_queue: queue.SimpleQueue[MetricsRecord | None] = (
            queue.SimpleQueue()
        )
        self._unwritten: list[MetricsRecord] = []
        self._last_error: str | None = None
        self._has_warned = False
        self._thread = threading.Thread(
            target=self._write_loop, name=f"distrain-{tracker.name}", daemon=True
        )
        self._thread.start()

    def write_record(self, record: MetricsRecord) -> None:
        """Pass a record on; returns at once."""
        self._record_queue.put(record)
        if self._last_error is not None and not self._has_warned:
            self._has_warned = True
            self._warn(
                f"warning: {self._tracker.name} takes no records for now: {self._last_error}"
            )

    def close(self) -> None:
        """Wait for what is on its way, but not for long, and say what did not arrive."""
        self._record_queue.put(None)
        self._thread.join(_CLOSE_TIMEOUT_SECONDS)
        missing = len(self._unwritten) + max(0, self._record_queue.qsize() - 1)
        if missing or self._thread.is_alive():
            why = self._last_error or f"no answer for {_CLOSE_TIMEOUT_SECONDS:.0f} s"
            self._warn(
                f"warning: the last {missing} records did not reach {self._tracker.name}: {why}"
            )

    def _write_loop(self) -> None:
        while (record := self._record_queue.get()) is not None:
            self._unwritten.append(record)
            self._write_unwritten()
        self._write_unwritten()
        if not self._unwritten:
            self._try_call(self._tracker.close)

    def _write_unwritten(self) -> None:
        while self._unwritten and self._try_call(
            lambda: self._tracker.write_record(self._unwritten[0])
        ):
            del self._unwritten[0]

    def _try_call(self, function: Callable[[], None]) -> bool:
        """Whether it went well; libraries of trackers raise errors of many kinds."""
        try:
            function()
        except Exception as error:
            self._last_error = (
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
            return False
        self._last_error, self._has_warned = None, False
        return True


def start_trackers(
    config: LogConfig,
    store: Store,
    run_params: Mapping[str, Any],
    attempt: int,
    step: int,
    warn: Callable[[str], None],
) -> list[BackgroundTracker]:
    """One for each tracker that `log` names.

    Args:
        log: which trackers.
        store: the run directory.
        parameters: what decides the run's weights.
        attempt: its number.
        step: where this attempt goes on from.
        tell: gets warnings.

    Raises:
        UserError: its package is not installed.
    """
    found: list[BackgroundTracker] = []
    try:
        if config.tensorboard:
            assert store.local_path is not None
            found.append(
                BackgroundTracker(
                    TensorBoardTracker(store.local_path, attempt, step), warn
                )
            )
        if config.mlflow is not None:
            found.append(
                BackgroundTracker(MLflowTracker(config.mlflow, store, run_params), warn)
            )
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install 'distrain[trackers]'"
        ) from None
    return found


def _iter_scalars(record: MetricsRecord) -> Iterator[tuple[str, float]]:
    """Name and value of each number of a record that is finite."""
    for key, value in asdict(record).items():
        if key not in ("step", "classes") and math.isfinite(value):
            yield f"{record.split}/{key}", float(value)
