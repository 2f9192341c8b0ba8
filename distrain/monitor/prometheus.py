"""What Prometheus reads of a run: the names, units and labels of all metrics, and the numbers behind them.

Counters count work that was done, recomputed steps included; `distrain_step` is the position. Every series has the
label `run`, the name of the run directory; `rank` and `node` stand only where they name a straggler.
"""

import os
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from torch import Tensor

from distrain import __version__
from distrain.data.storage.store import StorageCounters
from distrain.data.storage.url import redact_url
from distrain.distributed.world import World
from distrain.monitor import config as settings
from distrain.monitor.endpoint import MetricsEndpoint
from distrain.monitor.health import Watchdog
from distrain.monitor.norms import NormTracker
from distrain.monitor.phases import Phase
from distrain.monitor.records import MetricsRecord, TrainRecord

_ARRIVAL_SPAN = "arrival"
"""From the begin of a step until this rank comes to its reduction: no phase of its own, it spans several."""
# What a GPU does behind the back of the thread that asks for it.
_DEVICE_PHASES = (
    Phase.TRANSFER,
    Phase.FORWARD,
    Phase.BACKWARD,
    Phase.REDUCTION,
    Phase.OPTIMIZER,
    _ARRIVAL_SPAN,
)
# On a GPU one step of so many is timed, and counts for all: events cost the thread that launches kernels. Few log steps
# are as far apart: a step after one finds the GPU without work, and takes longer.
_TIMED_STEP_INTERVAL, _FIRST_TIMED_STEP = 11, 5
# Timed steps on a GPU after which a rank may be called slow.
_MIN_TIMED_ARRIVALS = 3
_STEP_END = ""
"""In place of a phase's name: the end of a step, with the number of steps that its times on a GPU count for."""
_HISTOGRAM_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class MetricSpec(NamedTuple):
    """A metric: what it counts, its labels beside `run`, and for gauges of several ranks how they become a node's."""

    help_text: str
    label_names: tuple[str, ...] = ()
    merge_mode: Literal["sum", "min", "max"] = "max"


GAUGES = {
    "build_info": MetricSpec(
        "1; the labels say what runs.", ("version", "torch", "device")
    ),
    "step": MetricSpec("Steps of the run that are done: its position."),
    "steps_planned": MetricSpec("Steps of the whole run."),
    "epoch": MetricSpec("Epochs of the run that are done, with a fraction."),
    "loss": MetricSpec(
        "Mean loss over the samples since the last log step, or of the last evaluation.",
        ("split",),
    ),
    "top1_ratio": MetricSpec(
        "Share of samples whose highest logit is their label's.", ("split",)
    ),
    "top5_ratio": MetricSpec(
        "Share of samples with their label among the five highest logits.", ("split",)
    ),
    "learning_rate": MetricSpec("Of the last step."),
    "images_per_second": MetricSpec(
        "Training images a second since the last log step, of all ranks."
    ),
    "gradient_norm": MetricSpec(
        "Norm of the mean gradient, unclipped, at a log step, every quarter of a minute at most."
    ),
    "weight_norm": MetricSpec("Norm of all trained parameters at that step."),
    "update_ratio": MetricSpec(
        "Norm of what that step changed over the norm of the weights."
    ),
    "bad_samples": MetricSpec("Distinct training samples that do not decode."),
    "quarantined_samples": MetricSpec(
        "Of the samples of all sets, those whose files have killed a decoder."
    ),
    "bad_samples_limit": MetricSpec("How many of them there may be."),
    "diverged": MetricSpec(
        "1 when the run has ended with a loss or gradient that is not finite, 0 before."
    ),
    "checkpoint_timestamp_seconds": MetricSpec(
        "Unix time at which the newest whole checkpoint was ready, or else this attempt began."
    ),
    "checkpoint_bytes": MetricSpec("Size of the newest checkpoint."),
    "attempt": MetricSpec("Number of this attempt in its run directory."),
    "restarts": MetricSpec(
        "Attempts at this run, of any launch, that followed one that had failed."
    ),
    "resizes": MetricSpec(
        "Attempts at this run that had another number of workers than the one before."
    ),
    "workers": MetricSpec("Ranks at work."),
    "workers_wanted": MetricSpec("Ranks that the run would like to have."),
    "stall_limit_seconds": MetricSpec(
        "Seconds without progress after which a rank is taken to hang."
    ),
    "last_progress_timestamp_seconds": MetricSpec(
        "Unix time of the last progress of the slowest rank.", (), "min"
    ),
    "queue_depth": MetricSpec(
        "Micro-batches on their way: fetching, decoding, ready.", ("stage",), "sum"
    ),
    "memory_bytes": MetricSpec("Resident memory of the ranks of this node.", (), "sum"),
    "open_files": MetricSpec("Open files of the ranks of this node.", (), "sum"),
    "gpu_memory_bytes": MetricSpec(
        "Memory that torch has reserved on a GPU.", ("gpu",)
    ),
    "gpu_busy_ratio": MetricSpec(
        "Share of the last moments in which a kernel ran on a GPU (NVML).", ("gpu",)
    ),
    "gpu_power_watts": MetricSpec("Power that a GPU draws (NVML).", ("gpu",)),
    "finished": MetricSpec("1 when the run has ended well, 0 before."),
}
COUNTERS = {
    "steps": MetricSpec("Optimizer steps that were done, for the first time or again."),
    "steps_recomputed": MetricSpec("Of these, steps that an earlier attempt had done."),
    "samples": MetricSpec(
        "Training samples that were computed, by the outcome of decoding: good or bad.",
        ("outcome",),
    ),
    "rank_data_wait_seconds": MetricSpec(
        "Seconds for which a rank waited for data.", ("rank", "node")
    ),
    "rank_arrival_seconds": MetricSpec(
        "Seconds until a rank came to the reduction of a step.", ("rank", "node")
    ),
    "store_requests": MetricSpec("Requests to the storage of a data set.", ("split",)),
    "store_bytes": MetricSpec("Bytes read from there.", ("split",)),
    "store_seconds": MetricSpec(
        "Seconds that requests took, all together; several run at once.", ("split",)
    ),
    "store_retries": MetricSpec("Requests that were tried again.", ("split",)),
    "store_errors": MetricSpec("Requests that failed, by kind.", ("split", "kind")),
    "cache_hits": MetricSpec("Ranges that the disk cache had.", ("split",)),
    "cache_evictions": MetricSpec("Ranges that the disk cache let go.", ("split",)),
    "straggler_log_steps": MetricSpec(
        "Log steps at which a rank was named as the slow one.", ("slow_rank",)
    ),
    "loss_spikes": MetricSpec("Log steps at which the loss was twice its usual value."),
    "checkpoint_failures": MetricSpec("Saves that failed and were tried again."),
}
HISTOGRAMS = {
    "phase_seconds": MetricSpec(
        "Seconds of a step by phase, of all lanes of a rank together; on a GPU one step of eleven is timed, for all.",
        ("phase",),
    ),
    "checkpoint_write_seconds": MetricSpec(
        "Seconds in which a checkpoint was written."
    ),
}


class Metrics:
    """The metrics of one rank. Close it.

    What the training thread calls costs microseconds and waits for nothing: pages are made on a thread of their own.
    """

    def __init__(
        self,
        config: settings.MetricsConfig,
        run: str,
        world: World,
        log: Callable[[str], None],
    ) -> None:
        """Start.

        Args:
            page: where the page of the node is served.
            run: the run directory, which labels everything.
            world: this rank and the others.
            tell: gets the URL of the node's page from whoever serves it.

        Raises:
            OSError: the address cannot be listened on.
        """
        self._is_rank_zero, self._device = world.is_rank_zero, world.device
        self._num_steps = 0
        self._arrival_seconds: list[float] = []
        self._listen_address, self._node_address = config.address, world.node_address
        self._run_label = to_run_label(run)
        self._rank_labels = {"rank": str(world.rank), "node": socket.gethostname()}
        self._lock = threading.Lock()
        self._gauges: dict[tuple[str, tuple[str, ...]], float] = {}
        self._counters: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._spans: list[tuple[str, Any, Any]] = []
        self._storage_counts: dict[str, StorageCounters] = {}
        self._queue_depths: Callable[[], Mapping[str, int]] = dict
        self._watchdog: Watchdog | None = None
        self._norm_tracker = NormTracker()
        self._has_nvml, self._log = True, log
        registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(
                f"distrain_{name}",
                family.help_text,
                ("run", *family.label_names),
                buckets=_HISTOGRAM_BUCKETS,
                registry=registry,
            )
            for name, family in HISTOGRAMS.items()
        }
        registry.register(self)
        if self._is_rank_zero:
            self.set_gauge(
                "build_info",
                1,
                version=__version__,
                torch=torch.__version__,
                device=world.device.type,
            )
            self.set_gauge("workers", world.world_size)
            self.set_gauge(
                "workers_wanted", max(world.world_size, world.desired_world_size)
            )
            self.set_gauge("diverged", 0)
            self.set_gauge("finished", 0)
            self.set_gauge("checkpoint_timestamp_seconds", time.time())
            for name in (
                "steps",
                "steps_recomputed",
                "loss_spikes",
                "checkpoint_failures",
            ):
                self.increment_counter(
                    name, 0
                )  # else nobody sees the first one as an increase
        merged = {
            f"distrain_{name}": family.merge_mode for name, family in GAUGES.items()
        }
        self._linger_seconds, self._endpoint = config.linger, None
        if config.port is not None:
            self._endpoint = MetricsEndpoint(
                registry,
                merged,
                session=world.session,
                address=config.address,
                port=config.port,
                log=log,
            )

    def set_gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._gauges[name, _to_label_values(GAUGES[name], labels)] = value

    def increment_counter(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = name, _to_label_values(COUNTERS[name], labels)
        with self._lock:
            self._counters[key] += amount  # type: ignore[assignment]

    def observe_histogram(self, name: str, seconds: float, **labels: str) -> None:
        """Add a duration to a histogram."""
        self._histograms[name].labels(
            self._run_label, *_to_label_values(HISTOGRAMS[name], labels)
        ).observe(seconds)

    def track_watchdog(self, watchdog: Watchdog) -> None:
        """Tell of the watchdog's last sign of progress from now on."""
        self._watchdog = watchdog

    def track_storage(self, split: str, counts: StorageCounters) -> None:
        """Tell of the storage of a data set from now on."""
        self._storage_counts[split] = counts

    def track_queues(self, queue_depths: Callable[[], Mapping[str, int]]) -> None:
        """Tell of a loader's queues from now on; `depths` gives their lengths by stage."""
        self._queue_depths = queue_depths

    @contextmanager
    def time_phase(self, name: Phase | str) -> Iterator[None]:
        """What is done inside belongs to a phase of the step, on whichever thread.

        On a GPU its time is taken there, in one step of eleven, by events that are read at the next log step.
        """
        on_device = self._device.type == "cuda" and name in _DEVICE_PHASES
        if on_device and self._num_steps % _TIMED_STEP_INTERVAL != _FIRST_TIMED_STEP:
            yield
            return
        clock = self._record_cuda_event if on_device else time.perf_counter
        began = clock()
        try:
            yield
        finally:
            ended = clock()
            with self._lock:
                self._spans.append((name, began, ended))

    def add_data_wait(self, seconds: float) -> None:
        """Seconds for which the lanes waited for the data of a step."""
        self.observe_histogram("phase_seconds", seconds, phase=Phase.DATA_WAIT)
        self.increment_counter("rank_data_wait_seconds", seconds, **self._rank_labels)

    def time_arrival(self) -> AbstractContextManager[None]:
        """What is done inside is what this rank does in a step until it comes to the reduction."""
        return self.time_phase(_ARRIVAL_SPAN)

    def pop_mean_arrival_seconds(self) -> float:
        """Mean seconds of a step until this rank came to its reduction, since the last; 0 if too few were timed."""
        if len(self._arrival_seconds) < (
            _MIN_TIMED_ARRIVALS if self._device.type == "cuda" else 1
        ):
            return 0.0
        found, self._arrival_seconds = self._arrival_seconds, []
        return sum(found) / len(found)

    @property
    def scrape_target(self) -> str | None:
        """Where the page of this rank's node is read, as host:port; None where there is none."""
        port = self._endpoint.served_port if self._endpoint is not None else None
        is_wildcard = self._listen_address in ("0.0.0.0", "::")  # noqa: S104 - compared
        host = self._node_address if is_wildcard else self._listen_address
        return f"{f'[{host}]' if ':' in host else host}:{port}" if port else None

    def count_step(
        self, steps_done: int, steps_per_epoch: int, *, is_recomputed: bool
    ) -> None:
        """So many steps are done; `again`: an earlier attempt had done this one."""
        with self._lock:
            self._spans.append(
                (
                    _STEP_END,
                    _TIMED_STEP_INTERVAL if self._device.type == "cuda" else 1,
                    None,
                )
            )
        self._num_steps += 1
        if self._is_rank_zero:
            self.set_gauge("step", steps_done)
            self.set_gauge("epoch", steps_done / steps_per_epoch)
            self.increment_counter("steps")
            self.increment_counter("steps_recomputed", int(is_recomputed))
        if self._device.type == "cpu":
            self.record_timings()

    def record_timings(self) -> None:
        """Take in the phases that have been timed: after every step on a CPU, at log steps, a sync point, on a GPU."""
        with self._lock:
            spans, self._spans = self._spans, []
        seconds: Counter[str] = Counter()
        for name, began, ended in (*spans, (_STEP_END, 1, None)):
            if name == _STEP_END:
                self._record_step_timings(seconds, began)
                seconds.clear()
            else:
                seconds[name] += (
                    ended - began
                    if isinstance(began, float)
                    else began.elapsed_time(ended) / 1000
                )

    def _record_step_timings(self, seconds: Mapping[str, float], steps: int) -> None:
        """Take in the phases of a step; what was timed on a GPU counts for so many steps."""
        for name, of_a_step in seconds.items():
            times = steps if name in _DEVICE_PHASES else 1
            if name == _ARRIVAL_SPAN:
                self._arrival_seconds.append(of_a_step)
                self.increment_counter(
                    "rank_arrival_seconds", times * of_a_step, **self._rank_labels
                )
                continue
            for _ in range(times):
                self.observe_histogram("phase_seconds", of_a_step, phase=name)

    def update_from_record(self, record: MetricsRecord) -> None:
        """The numbers of a record of the run."""
        self.set_gauge("loss", record.loss, split=record.split)
        self.set_gauge("top1_ratio", record.top1, split=record.split)
        self.set_gauge("top5_ratio", record.top5, split=record.split)
        if isinstance(record, TrainRecord):
            self.set_gauge("learning_rate", record.lr)
            self.set_gauge("images_per_second", record.images_per_second)
            self.set_gauge("bad_samples", record.bad_samples)

    def snapshot_weights(self, parameters: Sequence[Tensor]) -> None:
        """Before a step: measure its norms, on the lead, if anybody can read them."""
        if self._is_rank_zero and self._endpoint is not None:
            self._norm_tracker.snapshot_weights(parameters)

    def record_norms(self, parameters: Sequence[Tensor]) -> None:
        """At a sync point after the step: set its norms, if they were measured."""
        for name, value in self._norm_tracker.compute_norms(parameters).items():
            self.set_gauge(name, value)

    def record_checkpoint(self, seconds: float, size_bytes: int) -> None:
        """A checkpoint is whole. Called in the background."""
        self.observe_histogram("checkpoint_write_seconds", seconds)
        self.set_gauge("checkpoint_timestamp_seconds", time.time())
        self.set_gauge("checkpoint_bytes", size_bytes)

    def finish_run(self, *, stopped: bool) -> None:
        """The run has come to its end; `stopped`: for now, and whoever waits for it should not wait for the page."""
        self._linger_seconds = 0.0 if stopped else self._linger_seconds
        if self._is_rank_zero and not stopped:
            self.set_gauge("finished", 1)

    def close(self, *, final: bool) -> None:
        """Stop; `over`: no other attempt of this launch adds to these counters."""
        if self._endpoint is not None:
            self._endpoint.close(
                linger_seconds=self._linger_seconds if final else 0.0, final=final
            )

    def flush(self) -> None:
        """Bring this rank's page up to date at once, after a sync point."""
        self.record_timings()
        if self._endpoint is not None:
            self._endpoint.flush()

    def collect(self) -> Iterator[Metric]:
        """What the numbers are now; called off the training thread."""
        self._poll_sources()
        with self._lock:
            gauges, totals = list(self._gauges.items()), list(self._counters.items())
        for kind, table, numbers in (
            (GaugeMetricFamily, GAUGES, gauges),
            (CounterMetricFamily, COUNTERS, totals),
        ):
            families = {
                name: kind(
                    f"distrain_{name}",
                    family.help_text,
                    labels=("run", *family.label_names),
                )
                for name, family in table.items()
            }
            for (name, labels), value in numbers:
                families[name].add_metric((self._run_label, *labels), value)
            yield from (family for family in families.values() if family.samples)

    def _poll_sources(self) -> None:
        """Look at what is not told: storage, queues, this process."""
        for split, counts in self._storage_counts.items():
            numbers = {
                "store_requests": counts.num_requests,
                "store_bytes": counts.bytes_read,
                "store_seconds": counts.request_seconds,
                "store_retries": counts.num_retries,
                "cache_hits": counts.cache_hits,
                "cache_evictions": counts.cache_evictions,
            }
            for name, number in numbers.items():
                self._counters[name, (split,)] = number  # type: ignore[assignment]
            for kind, number in list(counts.errors_by_kind.items()):
                self._counters["store_errors", (split, kind)] = number
        for stage, depth in self._queue_depths().items():
            self.set_gauge("queue_depth", depth, stage=stage)
        self.set_gauge("memory_bytes", _read_resident_bytes())
        self.set_gauge(
            "open_files",
            len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
        )
        if self._watchdog is not None:
            self.set_gauge(
                "last_progress_timestamp_seconds",
                time.time() - self._watchdog.idle_seconds,
            )
        if self._device.type == "cuda":
            self._poll_gpu()

    def _poll_gpu(self) -> None:
        """What torch knows of its memory, and NVML of the GPU where nvidia-ml-py is installed; no kernel is run."""
        gpu = str(torch.cuda.get_device_properties(self._device).uuid)
        self.set_gauge(
            "gpu_memory_bytes", torch.cuda.memory_reserved(self._device), gpu=gpu
        )
        if not self._has_nvml:
            return
        try:
            self.set_gauge(
                "gpu_busy_ratio", torch.cuda.utilization(self._device) / 100, gpu=gpu
            )
            self.set_gauge(
                "gpu_power_watts", torch.cuda.power_draw(self._device) / 1000, gpu=gpu
            )
        except Exception as error:  # of many kinds: not installed, no driver, not of a part of a GPU (MIG)
            self._has_nvml = False
            self._log(
                f"the GPU's load is not told: {' '.join(str(error).split())} (pip install 'distrain[gpu]')"
            )

    def _record_cuda_event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(
            torch.cuda.current_stream(self._device)
        )  # of this rank's GPU, whatever this thread's is
        return event


def to_run_label(run: str) -> str:
    """The label `run` of a run directory: its name, without what may be secret in a URL."""
    return redact_url(run).rstrip("/").rpartition("/")[2]


def _to_label_values(family: MetricSpec, labels: Mapping[str, str]) -> tuple[str, ...]:
    assert labels.keys() == set(family.label_names), (family, labels)
    return tuple(labels[name] for name in family.label_names)


def _read_resident_bytes() -> int:
    """Bytes of this process's resident memory; its highest so far where the system does not tell."""
    try:
        return (
            int(Path("/proc/self/statm").read_text().split()[1])
            * resource.getpagesize()
        )
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
