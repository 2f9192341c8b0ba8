"""What a run leaves behind, written by the lead alone: config, checkpoints, metrics, bad samples, evidence."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from distrain.config import Config, result_fields
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.monitor.prometheus import Metrics
from distrain.monitor.records import MetricsRecord
from distrain.monitor.sinks import Console, MetricsFile
from distrain.monitor.trackers import followers
from distrain.rundir import files
from distrain.rundir.checkpoint import Checkpoints
from distrain.rundir.lease import Lease
from distrain.training.state import State


class Record:
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
        self.store, self.lease, self._console, self._live = (
            store,
            lease,
            console,
            metrics,
        )
        self._metrics = MetricsFile(store, lease.number, console.event)
        stack.callback(self._metrics.close)
        self._followers = followers(
            config.log, store, result_fields(config), lease.number, step, console.event
        )
        for follower in self._followers:
            stack.callback(follower.close)
        self.checkpoints = Checkpoints(
            store,
            lease,
            keep=config.checkpoint.keep,
            patience=config.checkpoint.patience,
            tell=console.event,
            saved=metrics.saved,
            failed=partial(metrics.add, "checkpoint_failures"),
        )

    def targets(self, found: Sequence[str]) -> None:
        """Write down where the metrics of each node are read, as Prometheus's file and HTTP discovery have it."""
        try:
            self.store.write(
                files.TARGETS,
                json.dumps([{"targets": sorted(set(found)), "labels": {}}]).encode(),
            )
        except OSError as error:
            self._console.event(
                f"warning: {files.TARGETS} could not be written: {error}"
            )

    def tell(self, record: MetricsRecord) -> None:
        """Write a metrics record to the file, the metrics page, the trackers and the console."""
        self._metrics.record(record)
        for follower in self._followers:
            follower.write(record)
        self._live.record(record)
        self._console.record(record)

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: State,
        *,
        best: bool,
    ) -> str:
        """Hand a checkpoint to the background; its name. Raises AttemptError if the one before failed."""
        tree = state.to_tree()
        name = self.checkpoints.save(
            step, model, optimizer, tree, best=tree["best"] if best else None
        )
        self._metrics.upload()
        return name

    def bad_samples(
        self, dataset: Dataset, bad: Mapping[int, str], new: list[int]
    ) -> None:
        """Name new bad samples, and write the list of all: a report, which nothing reads back."""
        entries = (
            {"id": k, "where": dataset.describe(k), "reason": v}
            for k, v in sorted(bad.items())
        )
        try:
            self.lease.check()
            self.store.write(
                files.BAD_SAMPLES,
                "".join(json.dumps(entry) + "\n" for entry in entries).encode(),
            )
        except OSError as error:
            self._console.event(
                f"warning: {files.BAD_SAMPLES} could not be written: {error}"
            )
        for k in new:
            self._console.event(
                f"bad sample {k} ({dataset.describe(k)}) counts for nothing: {bad[k]}"
            )

    def evidence(self, step: int, found: Any) -> str:
        """Write down what a step that failed looked like; the file's name for a person."""
        name = files.not_finite(step)
        self.store.write(name, json.dumps(_plain(found), indent=1).encode())
        return f"{self.store.name}/{name}"


def _plain(value: Any) -> Any:
    """The same tree with the numbers that JSON lacks (NaN, infinity) as text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return (
        str(value) if isinstance(value, float) and not math.isfinite(value) else value
    )
