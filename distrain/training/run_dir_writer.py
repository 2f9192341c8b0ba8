"""Write a run directory: config, checkpoints, metrics, bad samples, evidence.

Rank 0 alone has a writer.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from distrain.config import Config
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.monitor.prometheus import Metrics
from distrain.monitor.records import MetricsRecord
from distrain.monitor.sinks import Console, MetricsFile
from distrain.monitor.trackers import start_trackers
from distrain.result_fields import get_result_fields
from distrain.rundir import files
from distrain.rundir.checkpoint import CheckpointManager
from distrain.rundir.lease import Lease
from distrain.rundir.model_info import ModelInfo
from distrain.training.checkpoint_state import CheckpointState


class RunDirWriter:
    """Writer of the run directory for one attempt, which holds its lease."""

    def __init__(
        self,
        config: Config,
        store: Store,
        lease: Lease,
        console: Console,
        metrics: Metrics,
        stack: ExitStack,
        *,
        model_info: ModelInfo,
        step: int,
    ) -> None:
        """Open the metrics file and the trackers; nothing is written yet.

        Args:
            config: the run.
            store: the run directory.
            lease: the right to write there.
            console: where records and warnings are printed.
            metrics: the metrics page.
            stack: closes what is opened here.
            model_info: content of each checkpoint's `model.json`.
            step: steps done before this attempt.

        Raises:
            UserError: the package of a tracker is not installed.
        """
        self.store = store
        self.lease = lease
        self._console = console
        self._live_metrics = metrics

        # Open what records are written to.
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
        for tracker in self._trackers:
            stack.callback(tracker.close)

        # Warnings of its background thread are printed on the training thread.
        self.checkpointer = CheckpointManager(
            store,
            lease,
            keep_latest=config.checkpoint.keep,
            retry_seconds=config.checkpoint.patience,
            model_info=model_info,
            warn=console.log,
            on_saved=metrics.record_checkpoint,
            on_failure=partial(metrics.increment_counter, "checkpoint_failures"),
        )

    def write_scrape_targets(self, targets: Sequence[str]) -> None:
        """Write the metrics addresses for Prometheus's file and HTTP discovery.

        Args:
            targets: host:port of each node; duplicates are dropped.
        """
        groups = [{"targets": sorted(set(targets)), "labels": {}}]
        try:
            self.store.write(files.TARGETS_FILE, json.dumps(groups).encode())
        except OSError as error:
            self._console.log(
                f"warning: {files.TARGETS_FILE} could not be written: {error}"
            )

    def log_metrics(self, record: MetricsRecord) -> None:
        """Write a record to metrics file, metrics page, trackers and console."""
        self._metrics_file.write_record(record)
        for tracker in self._trackers:
            tracker.write_record(record)
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
        """Hand a checkpoint to the background thread, and return its name.

        Raises:
            AttemptError: the previous one could not be written.
        """
        tree = state.to_dict()
        name = self.checkpointer.save(
            step,
            model,
            optimizer,
            tree,
            best=tree["best"] if best else None,
            kept_step=state.scheduled_best.step if state.scheduled_best else None,
        )
        # In a bucket, the metrics file is brought up to date as often as checkpoints.
        self._metrics_file.upload()
        return name

    def write_bad_samples(
        self, dataset: Dataset, bad_samples: Mapping[int, str], new_ids: list[int]
    ) -> None:
        """Print new bad samples, and write the list of all of them.

        The list is a report, which nothing reads back.

        Args:
            dataset: the training set.
            bad_samples: reason by sample id of all bad samples.
            new_ids: those of them that were not reported before.

        Raises:
            AttemptError: a newer attempt has taken over the run directory.
        """
        # List all of them: the file is written anew each time.
        entries = [
            {"id": i, "where": dataset.describe_sample(i), "reason": reason}
            for i, reason in sorted(bad_samples.items())
        ]
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        try:
            # The file is shared by all attempts: one that was cut off leaves it alone.
            self.lease.raise_if_superseded()
            self.store.write(files.BAD_SAMPLES_FILE, text.encode())
        except OSError as error:
            self._console.log(
                f"warning: {files.BAD_SAMPLES_FILE} could not be written: {error}"
            )
        for i in new_ids:
            self._console.log(
                f"bad sample {i} ({dataset.describe_sample(i)}) is skipped: "
                f"{bad_samples[i]}"
            )

    def write_evidence(self, step: int, evidence: Any) -> str:
        """Write the numbers of a failed step; return the file's URL for messages."""
        name = files.not_finite_path(step)
        text = json.dumps(_stringify_non_finite(evidence), indent=1)
        self.store.write(name, text.encode())
        return f"{self.store.redacted_url}/{name}"


def _stringify_non_finite(value: Any) -> Any:
    """Return the same tree, with numbers that JSON lacks (NaN, infinity) as text."""
    if isinstance(value, dict):
        return {k: _stringify_non_finite(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
