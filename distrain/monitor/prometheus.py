"""Prometheus metrics of one rank; `metric_specs` lists all metrics.

Counters count work that was done, recomputed steps included; the gauge `distrain_step`
is the position of the run.
"""

import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from torch import Tensor

from distrain import __version__
from distrain.data.storage.store import StorageCounters
from distrain.data.storage.url import redact_url
from distrain.distributed.world import World
from distrain.monitor.config import MetricsConfig
from distrain.monitor.endpoint import MetricsEndpoint
from distrain.monitor.health import Watchdog
from distrain.monitor.metric_specs import (
    COUNTERS,
    GAUGES,
    HISTOGRAM_BUCKETS,
    HISTOGRAMS,
    MetricSpec,
)
from distrain.monitor.norms import NormTracker
from distrain.monitor.phase_timer import ARRIVAL_SPAN, PhaseTimer
from distrain.monitor.phases import Phase
from distrain.monitor.records import MetricsRecord, TrainRecord
from distrain.monitor.resources import GpuReader, count_open_files, read_resident_bytes

# Timed steps that are needed on a GPU before a rank may be called slow.
_MIN_TIMED_ARRIVALS = 3


class Metrics:
    """Metrics of one rank. Close it.

    Setting, counting and timing take microseconds and never wait for the GPU: the page
    is rendered in a background thread. `record_timings`, `record_norms` and `flush` do
    wait for it, so call them where the loop does so anyway.
    """

    def __init__(
        self,
        config: MetricsConfig,
        run: str,
        world: World,
        log: Callable[[str], None],
    ) -> None:
        """Start to serve the page of the node, or to add to it.

        Args:
            config: where the page is served; port None: it is not.
            run: the run directory, whose name is the label `run` of all metrics.
            world: this rank and the others.
            log: gets the URL of the page, once it is announced, and warnings.

        Raises:
            OSError: the address cannot be listened on.
        """
        self._is_rank_zero = world.is_rank_zero
        self._device = world.device
        self._listen_address = config.address
        self._node_address = world.node_address
        self._linger_seconds = config.linger
        self._run_label = to_run_label(run)
        self._rank_labels = {"rank": str(world.rank), "node": socket.gethostname()}

        # Values. The lock is for the counters, which several threads increment; gauges
        # are only assigned.
        self._lock = threading.Lock()
        self._gauges: dict[tuple[str, tuple[str, ...]], float] = {}
        self._counters: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._arrival_seconds: list[float] = []
        self._phase_seconds: defaultdict[str, float] = defaultdict(float)
        self._phase_timer = PhaseTimer(world.device)

        # Sources that are read when the page is rendered.
        self._storage_counts: dict[str, StorageCounters] = {}
        self._queue_depths: Callable[[], Mapping[str, int]] = dict
        self._watchdog: Watchdog | None = None
        self._norm_tracker = NormTracker()
        is_on_gpu = world.device.type == "cuda"
        self._gpu = GpuReader(world.device, log) if is_on_gpu else None

        registry = CollectorRegistry()
        self._histograms = _create_histograms(registry)
        registry.register(self)
        if self._is_rank_zero:
            self._set_initial_values(world)

        # The endpoint last: its thread collects the numbers from now on.
        self._endpoint = _open_endpoint(config, registry, world, log)

    def _set_initial_values(self, world: World) -> None:
        """Set what is known of the run before its first step, on rank 0."""
        self.set_gauge(
            "build_info",
            1,
            version=__version__,
            torch=torch.__version__,
            device=world.device.type,
        )
        desired_workers = max(world.world_size, world.desired_world_size)
        self.set_gauge("workers", world.world_size)
        self.set_gauge("workers_wanted", desired_workers)
        self.set_gauge("diverged", 0)
        self.set_gauge("finished", 0)
        # Until there is a checkpoint, its age counts from here, for the alert.
        self.set_gauge("checkpoint_timestamp_seconds", time.time())
        # Prometheus sees an increase only if the counter was there before it: a counter
        # that appears with its first event would show none.
        for name in ("steps", "steps_recomputed", "loss_spikes", "checkpoint_failures"):
            self.increment_counter(name, 0)

    def announce_page(self) -> None:
        """Log the URL of the page, on the rank that serves it."""
        if self._endpoint is not None:
            self._endpoint.announce()

    def set_gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge of `GAUGES`."""
        self._gauges[name, _to_label_values(GAUGES[name], labels)] = value

    def increment_counter(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter of `COUNTERS`."""
        key = name, _to_label_values(COUNTERS[name], labels)
        with self._lock:
            self._counters[key] += amount  # type: ignore[assignment]

    def observe_histogram(self, name: str, seconds: float, **labels: str) -> None:
        """Add a duration to a histogram of `HISTOGRAMS`."""
        label_values = _to_label_values(HISTOGRAMS[name], labels)
        histogram = self._histograms[name].labels(self._run_label, *label_values)
        histogram.observe(seconds)

    def track_watchdog(self, watchdog: Watchdog) -> None:
        """Show the time of the watchdog's last progress from now on."""
        self._watchdog = watchdog

    def track_storage(self, split: str, counts: StorageCounters) -> None:
        """Show the counters of a data set's storage from now on."""
        self._storage_counts[split] = counts

    def track_queues(self, queue_depths: Callable[[], Mapping[str, int]]) -> None:
        """Show a loader's queues from now on.

        Args:
            queue_depths: returns their lengths by stage.
        """
        self._queue_depths = queue_depths

    def time_phase(self, name: Phase | str) -> AbstractContextManager[None]:
        """Time the block as a phase of the step; any thread may call it."""
        return self._phase_timer.time_span(name)

    def add_data_wait(self, seconds: float) -> None:
        """Add the seconds for which the lanes waited for the data of a step."""
        self.observe_histogram("phase_seconds", seconds, phase=Phase.DATA_WAIT)
        self._phase_seconds[str(Phase.DATA_WAIT)] += seconds
        self.increment_counter("rank_data_wait_seconds", seconds, **self._rank_labels)

    def time_arrival(self) -> AbstractContextManager[None]:
        """Time the block as this rank's work in a step before the all-reduce."""
        return self._phase_timer.time_span(ARRIVAL_SPAN)

    def pop_mean_arrival_seconds(self) -> float:
        """Return the mean seconds per timed step before its all-reduce, and reset it.

        Returns 0, and keeps what was timed, until enough steps have been.
        """
        min_arrivals = _MIN_TIMED_ARRIVALS if self._device.type == "cuda" else 1
        if len(self._arrival_seconds) < min_arrivals:
            return 0.0
        arrivals = self._arrival_seconds
        self._arrival_seconds = []
        return sum(arrivals) / len(arrivals)

    @property
    def scrape_target(self) -> str | None:
        """Address of the page of this rank's node as host:port; None without a page."""
        port = self._endpoint.served_port if self._endpoint is not None else None
        if not port:
            return None
        # A wildcard is not an address that Prometheus could connect to.
        is_wildcard = self._listen_address in ("0.0.0.0", "::")  # noqa: S104 - compared
        host = self._node_address if is_wildcard else self._listen_address
        # IPv6 addresses go in brackets.
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def count_step(
        self, steps_done: int, steps_per_epoch: int, *, is_recomputed: bool
    ) -> None:
        """Count a step.

        Args:
            steps_done: steps of the run that are done now.
            steps_per_epoch: of the run.
            is_recomputed: an earlier attempt had already done this step.
        """
        self._phase_timer.end_step()
        if self._is_rank_zero:
            self.set_gauge("step", steps_done)
            self.set_gauge("epoch", steps_done / steps_per_epoch)
            self.increment_counter("steps")
            self.increment_counter("steps_recomputed", int(is_recomputed))
        # On a GPU, times are read at log steps, which synchronize anyway.
        if self._device.type == "cpu":
            self.record_timings()

    def record_timings(self) -> None:
        """Add the phases that have been timed to the metrics.

        On a CPU that is after every step; on a GPU at log steps only, because reading
        the times is a sync point there.
        """
        for name, seconds, num_steps in self._phase_timer.pop_times():
            if name == ARRIVAL_SPAN:
                self._arrival_seconds.append(seconds)
                self.increment_counter(
                    "rank_arrival_seconds", num_steps * seconds, **self._rank_labels
                )
                continue
            self._phase_seconds[str(name)] += num_steps * seconds
            # A histogram has no weights: a time that counts for several steps is
            # observed as often.
            for _ in range(num_steps):
                self.observe_histogram("phase_seconds", seconds, phase=name)

    def pop_phase_seconds(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, summed over lanes."""
        phase_seconds = dict(self._phase_seconds)
        self._phase_seconds.clear()
        return phase_seconds

    def update_from_record(self, record: MetricsRecord) -> None:
        """Set the gauges that a metrics record holds."""
        self.set_gauge("loss", record.loss, split=record.split)
        self.set_gauge("top1_ratio", record.top1, split=record.split)
        self.set_gauge("top5_ratio", record.top5, split=record.split)
        if isinstance(record, TrainRecord):
            self.set_gauge("learning_rate", record.lr)
            self.set_gauge("images_per_second", record.images_per_second)
            self.set_gauge("bad_samples", record.bad_samples)

    def snapshot_weights(self, parameters: Sequence[Tensor]) -> None:
        """Prepare to measure the norms of the coming step, if that is due.

        Rank 0 alone does it, and only if a page is served.
        """
        if self._is_rank_zero and self._endpoint is not None:
            self._norm_tracker.snapshot_weights(parameters)

    def record_norms(self, parameters: Sequence[Tensor]) -> None:
        """Set the norms of the step, at a sync point after it, if it was measured."""
        for name, value in self._norm_tracker.compute_norms(parameters).items():
            self.set_gauge(name, value)

    def record_checkpoint(self, seconds: float, size_bytes: int) -> None:
        """Record that a checkpoint is complete. Called on the thread that writes it."""
        self.observe_histogram("checkpoint_write_seconds", seconds)
        # Until there is a checkpoint, its age counts from here, for the alert.
        self.set_gauge("checkpoint_timestamp_seconds", time.time())
        self.set_gauge("checkpoint_bytes", size_bytes)

    def finish_run(self, *, stopped: bool) -> None:
        """Record the end of the run.

        Args:
            stopped: the run was interrupted: `close` does not wait for a last scrape.
        """
        if stopped:
            self._linger_seconds = 0.0
        elif self._is_rank_zero:
            self.set_gauge("finished", 1)

    def close(self, *, final: bool) -> None:
        """Stop serving.

        Args:
            final: no other attempt of this launch will add to these counters.
        """
        if self._endpoint is not None:
            linger_seconds = self._linger_seconds if final else 0.0
            self._endpoint.close(linger_seconds=linger_seconds, final=final)

    def flush(self) -> None:
        """Bring this rank's page up to date at once, after a sync point."""
        self.record_timings()
        if self._endpoint is not None:
            self._endpoint.flush()

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges and counters as they are now.

        prometheus_client calls it, off the training thread.
        """
        self._poll_sources()
        # Copies, because other threads change the originals meanwhile.
        with self._lock:
            gauges = list(self._gauges.items())
            counters = list(self._counters.items())
        for family_type, specs, values in (
            (GaugeMetricFamily, GAUGES, gauges),
            (CounterMetricFamily, COUNTERS, counters),
        ):
            families = {
                name: family_type(
                    f"distrain_{name}",
                    spec.help_text,
                    labels=("run", *spec.label_names),
                )
                for name, spec in specs.items()
            }
            for (name, labels), value in values:
                families[name].add_metric((self._run_label, *labels), value)
            # Leave out metrics without a value: this rank does not set them.
            yield from (family for family in families.values() if family.samples)

    def _poll_sources(self) -> None:
        """Read the sources that do not report by themselves."""
        for split, counts in self._storage_counts.items():
            self._poll_storage(split, counts)
        for stage, depth in self._queue_depths().items():
            self.set_gauge("queue_depth", depth, stage=stage)
        self.set_gauge("memory_bytes", read_resident_bytes())
        self.set_gauge("open_files", count_open_files())
        if self._watchdog is not None:
            last_progress = time.time() - self._watchdog.idle_seconds
            self.set_gauge("last_progress_timestamp_seconds", last_progress)
        if self._gpu is not None:
            uuid = self._gpu.read_uuid()
            for name, value in self._gpu.read_gauges().items():
                self.set_gauge(name, value, gpu=uuid)

    def _poll_storage(self, split: str, counts: StorageCounters) -> None:
        totals = {
            "store_requests": counts.num_requests,
            "store_bytes": counts.bytes_read,
            "store_seconds": counts.request_seconds,
            "store_retries": counts.num_retries,
            "cache_hits": counts.cache_hits,
            "cache_evictions": counts.cache_evictions,
        }
        # Set, not added: these are totals already.
        for name, total in totals.items():
            self._counters[name, (split,)] = total  # type: ignore[assignment]
        # A copy, because the loader's threads add kinds of errors meanwhile.
        for kind, num_errors in list(counts.errors_by_kind.items()):
            self._counters["store_errors", (split, kind)] = num_errors


def to_run_label(run: str) -> str:
    """Return the label `run` of a run directory: its name, without a URL's secrets."""
    return redact_url(run).rstrip("/").rpartition("/")[2]


def _create_histograms(registry: CollectorRegistry) -> dict[str, Histogram]:
    return {
        name: Histogram(
            f"distrain_{name}",
            spec.help_text,
            ("run", *spec.label_names),
            buckets=HISTOGRAM_BUCKETS,
            registry=registry,
        )
        for name, spec in HISTOGRAMS.items()
    }


def _open_endpoint(
    config: MetricsConfig,
    registry: CollectorRegistry,
    world: World,
    log: Callable[[str], None],
) -> MetricsEndpoint | None:
    if config.port is None:
        return None
    return MetricsEndpoint(
        registry,
        {f"distrain_{name}": spec.merge_mode for name, spec in GAUGES.items()},
        launch_id=world.launch_id,
        address=config.address,
        port=config.port,
        log=log,
    )


def _to_label_values(spec: MetricSpec, labels: Mapping[str, str]) -> tuple[str, ...]:
    """Return the values of a metric's labels, in the order of its names."""
    assert labels.keys() == set(spec.label_names), (spec, labels)
    return tuple(labels[name] for name in spec.label_names)
