"""What a run leaves behind, written by the lead alone: config, checkpoints, metrics, bad samples, evidence."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from distrain.config import Config, get_result_fields
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.monitor.prometheus import Metrics
from distrain.monitor.records import MetricsRecord
from distrain.monitor.sinks import Console, MetricsFile
from distrain.monitor.trackers import start_trackers
from distrain.rundir import files
from distrain.rundir.checkpoint import CheckpointManager
from distrain.rundir.lease import Lease
from distrain.training.checkpoint_state import CheckpointState


class RunDirWriter:
    """The run directory of one attempt."""

    def __init__(
        self,
        config: Config,
        store: Store,
        lease: Lease,
        console: Console,
        metrics: Metrics,
        stack: ExitStack,
        *,
        step: int,
    ) -> None:
        """Nothing is written yet; `step` is where this attempt goes on from.

        Raises:
            UserError: a tracker's package is not installed.
        """
        self.store, self.lease, self._console, self._live_metrics = (
            store,
            lease,
            console,
            metrics,
        )
        self._metrics_file = MetricsFile(store, lease.attempt, console.log)
        stack.callback(self._metrics_file.close)
        self._trackers = start_trackers(
            config.log,
            store,
            get_result_fields(config),
            lease.attempt,
            step,
            console.log,
        )
        for follower in self._trackers:
            stack.callback(follower.close)
        self.checkpointer = CheckpointManager(
            store,
            lease,
            keep_latest=config.checkpoint.keep,
            retry_seconds=config.checkpoint.patience,
            warn=console.log,
            on_saved=metrics.record_checkpoint,
            on_failure=partial(metrics.increment_counter, "checkpoint_failures"),
        )

    def write_scrape_targets(self, targets: Sequence[str]) -> None:
        """Write down where the metrics of each node are read, as Prometheus's file and HTTP discovery have it."""
        try:
            self.store.write(
                files.TARGETS_FILE,
                json.dumps([{"targets": sorted(set(targets)), "labels": {}}]).encode(),
            )
        except OSError as error:
            self._console.log(
                f"warning: {files.TARGETS_FILE} could not be written: {error}"
            )

    def log_metrics(self, record: MetricsRecord) -> None:
        """Write a metrics record to the file, the metrics page, the trackers and the console."""
        self._metrics_file.write_record(record)
        for follower in self._trackers:
            follower.write_record(record)
        self._live_metrics.update_from_record(record)
        self._console.log_metrics(record)

    def save_checkpoint(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: CheckpointState,
        *,
        best: bool,
    ) -> str:
        """Hand a checkpoint to the background; its name. Raises AttemptError if the one before failed."""
        tree = state.to_dict()
        name = self.checkpointer.save(
            step, model, optimizer, tree, best=tree["best"] if best else None
        )
        self._metrics_file.upload()
        return name

    def write_bad_samples(
        self, dataset: Dataset, bad_samples: Mapping[int, str], new_ids: list[int]
    ) -> None:
        """Name new bad samples, and write the list of all: a report, which nothing reads back."""
        entries = (
            {"id": k, "where": dataset.describe_sample(k), "reason": v}
            for k, v in sorted(bad_samples.items())
        )
        try:
            self.lease.raise_if_superseded()
            self.store.write(
                files.BAD_SAMPLES_FILE,
                "".join(json.dumps(entry) + "\n" for entry in entries).encode(),
            )
        except OSError as error:
            self._console.log(
                f"warning: {files.BAD_SAMPLES_FILE} could not be written: {error}"
            )
        for k in new_ids:
            self._console.log(
                f"bad sample {k} ({dataset.describe_sample(k)}) counts for nothing: {bad_samples[k]}"
            )

    def write_evidence(self, step: int, evidence: Any) -> str:
        """Write down what a step that failed looked like; the file's name for a person."""
        name = files.not_finite_path(step)
        self.store.write(
            name, json.dumps(_stringify_non_finite(evidence), indent=1).encode()
        )
        return f"{self.store.redacted_url}/{name}"


def _stringify_non_finite(value: Any) -> Any:
    """The same tree with the numbers that JSON lacks (NaN, infinity) as text."""
    if isinstance(value, dict):
        return {k: _stringify_non_finite(v) for k, v in value.items()}
    return (
        str(value) if isinstance(value, float) and not math.isfinite(value) else value
    )
