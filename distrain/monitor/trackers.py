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
from distrain.monitor.config import Log
from distrain.monitor.records import MetricsRecord
from distrain.rundir import files

_EXPERIMENT = "distrain"
# Seconds for which the end of a run waits for a tracker.
_LAST = 30.0


class Tracker(Protocol):
    """Takes the records of a run, in order. Called on one thread."""

    name: str

    def write(self, record: MetricsRecord) -> None:
        """Take a record; any exception means that it was not taken, and comes again with the next one."""

    def close(self) -> None:
        """No more will come."""


class TensorBoard:
    """Event files in the folder `tensorboard` of a run directory on a disk."""

    name = "tensorboard"

    def __init__(self, folder: str, attempt: int, step: int) -> None:
        """`step`: where this attempt goes on from; what earlier ones told of later steps is not shown any more."""
        from tensorboardX import SummaryWriter

        suffix = f".attempt-{attempt:03d}"  # else two attempts within a second would have one file
        self._writer = SummaryWriter(
            f"{folder}/{files.TENSORBOARD}", purge_step=step + 1, filename_suffix=suffix
        )

    def write(self, record: MetricsRecord) -> None:
        """Append a scalar for each number."""
        for name, value in _scalars(record):
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class MLflow:
    """A run on an MLflow tracking server."""

    name = "mlflow"

    def __init__(
        self, server: str, store: Store, parameters: Mapping[str, Any]
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

        self._make_client = mlflow.tracking.MlflowClient
        self._server, self._store, self._parameters = server, store, parameters
        self._client: Any = None
        self._run: str | None = None

    def write(self, record: MetricsRecord) -> None:
        """Log a metric for each number, as one request."""
        from mlflow.entities import Metric

        if self._run is None:
            self._run = self._open()
        now = int(1000 * time.time())
        self._client.log_batch(
            self._run,
            metrics=[Metric(k, v, now, record.step) for k, v in _scalars(record)],
        )

    def close(self) -> None:
        """The run at the server is ended as far as this attempt goes; a resume opens it again."""
        if self._run is not None:
            self._client.set_terminated(self._run)

    def _open(self) -> str:
        """The id of the run at the server."""
        from mlflow.entities import Param

        client = self._client = self._make_client(self._server)
        try:
            run = self._store.read(files.MLFLOW).decode()
        except FileNotFoundError:
            pass
        else:
            client.update_run(run, status="RUNNING")
            return run
        found = client.get_experiment_by_name(_EXPERIMENT)
        experiment = (
            found.experiment_id if found else client.create_experiment(_EXPERIMENT)
        )
        name = self._store.url.rstrip("/").rpartition("/")[2]
        run = str(client.create_run(experiment, run_name=name).info.run_id)
        self._store.write(
            files.MLFLOW, run.encode()
        )  # first: what fails from here on must not begin another run
        client.log_batch(
            run, params=[Param(k, str(v)) for k, v in self._parameters.items()]
        )
        return run


class Follower:
    """Hands records to a tracker, on a thread of its own. Close it."""

    def __init__(self, tracker: Tracker, tell: Callable[[str], None]) -> None:
        """`tell` gets warnings, on the thread that writes and closes."""
        self._tracker, self._tell = tracker, tell
        self._records: queue.SimpleQueue[MetricsRecord | None] = queue.SimpleQueue()
        self._waiting: list[MetricsRecord] = []
        self._error: str | None = None
        self._told = False
        self._thread = threading.Thread(
            target=self._run, name=f"distrain-{tracker.name}", daemon=True
        )
        self._thread.start()

    def write(self, record: MetricsRecord) -> None:
        """Pass a record on; returns at once."""
        self._records.put(record)
        if self._error is not None and not self._told:
            self._told = True
            self._tell(
                f"warning: {self._tracker.name} takes no records for now: {self._error}"
            )

    def close(self) -> None:
        """Wait for what is on its way, but not for long, and say what did not arrive."""
        self._records.put(None)
        self._thread.join(_LAST)
        missing = len(self._waiting) + max(0, self._records.qsize() - 1)
        if missing or self._thread.is_alive():
            why = self._error or f"no answer for {_LAST:.0f} s"
            self._tell(
                f"warning: the last {missing} records did not reach {self._tracker.name}: {why}"
            )

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            self._waiting.append(record)
            self._pass_on()
        self._pass_on()
        if not self._waiting:
            self._attempt(self._tracker.close)

    def _pass_on(self) -> None:
        while self._waiting and self._attempt(
            lambda: self._tracker.write(self._waiting[0])
        ):
            del self._waiting[0]

    def _attempt(self, act: Callable[[], None]) -> bool:
        """Whether it went well; libraries of trackers raise errors of many kinds."""
        try:
            act()
        except Exception as error:
            self._error = (
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
            return False
        self._error, self._told = None, False
        return True


def followers(
    log: Log,
    store: Store,
    parameters: Mapping[str, Any],
    attempt: int,
    step: int,
    tell: Callable[[str], None],
) -> list[Follower]:
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
    found: list[Follower] = []
    try:
        if log.tensorboard:
            assert store.local is not None
            found.append(Follower(TensorBoard(store.local, attempt, step), tell))
        if log.mlflow is not None:
            found.append(Follower(MLflow(log.mlflow, store, parameters), tell))
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install 'distrain[trackers]'"
        ) from None
    return found


def _scalars(record: MetricsRecord) -> Iterator[tuple[str, float]]:
    """Name and value of each number of a record that is finite."""
    for key, value in asdict(record).items():
        if key not in ("step", "classes") and math.isfinite(value):
            yield f"{record.split}/{key}", float(value)
