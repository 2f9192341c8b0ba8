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
from distrain.data.storage.store import Counts
from distrain.data.storage.url import redacted
from distrain.distributed.world import World
from distrain.monitor import config as settings
from distrain.monitor.endpoint import Node
from distrain.monitor.health import Watchdog
from distrain.monitor.norms import Norms
from distrain.monitor.phases import Phase
from distrain.monitor.records import MetricsRecord, TrainRecord

_ARRIVAL = "arrival"
"""From the begin of a step until this rank comes to its reduction: no phase of its own, it spans several."""
# What a GPU does behind the back of the thread that asks for it.
_ON_DEVICE = (
    Phase.TRANSFER,
    Phase.FORWARD,
    Phase.BACKWARD,
    Phase.REDUCTION,
    Phase.OPTIMIZER,
    _ARRIVAL,
)
# On a GPU one step of so many is timed, and counts for all: events cost the thread that launches kernels. Few log steps
# are as far apart: a step after one finds the GPU without work, and takes longer.
_TIMED_EVERY, _FIRST_TIMED = 11, 5
# Timed steps on a GPU after which a rank may be called slow.
_ARRIVALS = 3
_STEP = ""
"""In place of a phase's name: the end of a step, with the number of steps that its times on a GPU count for."""
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Family(NamedTuple):
    """A metric: what it counts, its labels beside `run`, and for gauges of several ranks how they become a node's."""

    text: str
    labels: tuple[str, ...] = ()
    merged: Literal["sum", "min", "max"] = "max"


GAUGES = {
    "build_info": Family(
        "1; the labels say what runs.", ("version", "torch", "device")
    ),
    "step": Family("Steps of the run that are done: its position."),
    "steps_planned": Family("Steps of the whole run."),
    "epoch": Family("Epochs of the run that are done, with a fraction."),
    "loss": Family(
        "Mean loss over the samples since the last log step, or of the last evaluation.",
        ("split",),
    ),
    "top1_ratio": Family(
        "Share of samples whose highest logit is their label's.", ("split",)
    ),
    "top5_ratio": Family(
        "Share of samples with their label among the five highest logits.", ("split",)
    ),
    "learning_rate": Family("Of the last step."),
    "images_per_second": Family(
        "Training images a second since the last log step, of all ranks."
    ),
    "gradient_norm": Family(
        "Norm of the mean gradient, unclipped, at a log step, every quarter of a minute at most."
    ),
    "weight_norm": Family("Norm of all trained parameters at that step."),
    "update_ratio": Family(
        "Norm of what that step changed over the norm of the weights."
    ),
    "bad_samples": Family("Distinct training samples that do not decode."),
    "quarantined_samples": Family(
        "Of the samples of all sets, those whose files have killed a decoder."
    ),
    "bad_samples_limit": Family("How many of them there may be."),
    "diverged": Family(
        "1 when the run has ended with a loss or gradient that is not finite, 0 before."
    ),
    "checkpoint_timestamp_seconds": Family(
        "Unix time at which the newest whole checkpoint was ready, or else this attempt began."
    ),
    "checkpoint_bytes": Family("Size of the newest checkpoint."),
    "attempt": Family("Number of this attempt in its run directory."),
    "restarts": Family(
        "Attempts at this run, of any launch, that followed one that had failed."
    ),
    "resizes": Family(
        "Attempts at this run that had another number of workers than the one before."
    ),
    "workers": Family("Ranks at work."),
    "workers_wanted": Family("Ranks that the run would like to have."),
    "stall_limit_seconds": Family(
        "Seconds without progress after which a rank is taken to hang."
    ),
    "last_progress_timestamp_seconds": Family(
        "Unix time of the last progress of the slowest rank.", (), "min"
    ),
    "queue_depth": Family(
        "Micro-batches on their way: fetching, decoding, ready.", ("stage",), "sum"
    ),
    "memory_bytes": Family("Resident memory of the ranks of this node.", (), "sum"),
    "open_files": Family("Open files of the ranks of this node.", (), "sum"),
    "gpu_memory_bytes": Family("Memory that torch has reserved on a GPU.", ("gpu",)),
    "gpu_busy_ratio": Family(
        "Share of the last moments in which a kernel ran on a GPU (NVML).", ("gpu",)
    ),
    "gpu_power_watts": Family("Power that a GPU draws (NVML).", ("gpu",)),
    "finished": Family("1 when the run has ended well, 0 before."),
}
TOTALS = {
    "steps": Family("Optimizer steps that were done, for the first time or again."),
    "steps_recomputed": Family("Of these, steps that an earlier attempt had done."),
    "samples": Family(
        "Training samples that were computed, by the outcome of decoding: good or bad.",
        ("outcome",),
    ),
    "rank_data_wait_seconds": Family(
        "Seconds for which a rank waited for data.", ("rank", "node")
    ),
    "rank_arrival_seconds": Family(
        "Seconds until a rank came to the reduction of a step.", ("rank", "node")
    ),
    "store_requests": Family("Requests to the storage of a data set.", ("split",)),
    "store_bytes": Family("Bytes read from there.", ("split",)),
    "store_seconds": Family(
        "Seconds that requests took, all together; several run at once.", ("split",)
    ),
    "store_retries": Family("Requests that were tried again.", ("split",)),
    "store_errors": Family("Requests that failed, by kind.", ("split", "kind")),
    "cache_hits": Family("Ranges that the disk cache had.", ("split",)),
    "cache_evictions": Family("Ranges that the disk cache let go.", ("split",)),
    "straggler_log_steps": Family(
        "Log steps at which a rank was named as the slow one.", ("slow_rank",)
    ),
    "loss_spikes": Family("Log steps at which the loss was twice its usual value."),
    "checkpoint_failures": Family("Saves that failed and were tried again."),
}
HISTOGRAMS = {
    "phase_seconds": Family(
        "Seconds of a step by phase, of all lanes of a rank together; on a GPU one step of eleven is timed, for all.",
        ("phase",),
    ),
    "checkpoint_write_seconds": Family("Seconds in which a checkpoint was written."),
}


class Metrics:
    """The metrics of one rank. Close it.

    What the training thread calls costs microseconds and waits for nothing: pages are made on a thread of their own.
    """

    def __init__(
        self,
        page: settings.Metrics,
        run: str,
        world: World,
        tell: Callable[[str], None],
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
        self._lead, self._device = world.lead, world.device
        self._steps = 0
        self._arrivals: list[float] = []
        self._address, self._node_address = page.address, world.address
        self._run = run_label(run)
        self._rank = {"rank": str(world.rank), "node": socket.gethostname()}
        self._lock = threading.Lock()
        self._gauges: dict[tuple[str, tuple[str, ...]], float] = {}
        self._totals: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._spans: list[tuple[str, Any, Any]] = []
        self._stores: dict[str, Counts] = {}
        self._depths: Callable[[], Mapping[str, int]] = dict
        self._watchdog: Watchdog | None = None
        self._norms = Norms()
        self._nvml, self._tell = True, tell
        registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(
                f"distrain_{name}",
                family.text,
                ("run", *family.labels),
                buckets=_SECONDS,
                registry=registry,
            )
            for name, family in HISTOGRAMS.items()
        }
        registry.register(self)
        if self._lead:
            self.set(
                "build_info",
                1,
                version=__version__,
                torch=torch.__version__,
                device=world.device.type,
            )
            self.set("workers", world.ranks)
            self.set("workers_wanted", max(world.ranks, world.wanted))
            self.set("diverged", 0)
            self.set("finished", 0)
            self.set("checkpoint_timestamp_seconds", time.time())
            for name in (
                "steps",
                "steps_recomputed",
                "loss_spikes",
                "checkpoint_failures",
            ):
                self.add(name, 0)  # else nobody sees the first one as an increase
        merged = {f"distrain_{name}": family.merged for name, family in GAUGES.items()}
        self._linger, self._node = page.linger, None
        if page.port is not None:
            self._node = Node(
                registry,
                merged,
                session=world.session,
                address=page.address,
                port=page.port,
                tell=tell,
            )

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._gauges[name, _values(GAUGES[name], labels)] = value

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = name, _values(TOTALS[name], labels)
        with self._lock:
            self._totals[key] += amount  # type: ignore[assignment]

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add a duration to a histogram."""
        self._histograms[name].labels(
            self._run, *_values(HISTOGRAMS[name], labels)
        ).observe(seconds)

    def watch(self, watchdog: Watchdog) -> None:
        """Tell of the watchdog's last sign of progress from now on."""
        self._watchdog = watchdog

    def store(self, split: str, counts: Counts) -> None:
        """Tell of the storage of a data set from now on."""
        self._stores[split] = counts

    def queues(self, depths: Callable[[], Mapping[str, int]]) -> None:
        """Tell of a loader's queues from now on; `depths` gives their lengths by stage."""
        self._depths = depths

    @contextmanager
    def phase(self, name: Phase | str) -> Iterator[None]:
        """What is done inside belongs to a phase of the step, on whichever thread.

        On a GPU its time is taken there, in one step of eleven, by events that are read at the next log step.
        """
        on_device = self._device.type == "cuda" and name in _ON_DEVICE
        if on_device and self._steps % _TIMED_EVERY != _FIRST_TIMED:
            yield
            return
        clock = self._event if on_device else time.perf_counter
        began = clock()
        try:
            yield
        finally:
            ended = clock()
            with self._lock:
                self._spans.append((name, began, ended))

    def waited(self, seconds: float) -> None:
        """Seconds for which the lanes waited for the data of a step."""
        self.observe("phase_seconds", seconds, phase=Phase.DATA_WAIT)
        self.add("rank_data_wait_seconds", seconds, **self._rank)

    def arriving(self) -> AbstractContextManager[None]:
        """What is done inside is what this rank does in a step until it comes to the reduction."""
        return self.phase(_ARRIVAL)

    def arrived(self) -> float:
        """Mean seconds of a step until this rank came to its reduction, since the last; 0 if too few were timed."""
        if len(self._arrivals) < (_ARRIVALS if self._device.type == "cuda" else 1):
            return 0.0
        found, self._arrivals = self._arrivals, []
        return sum(found) / len(found)

    @property
    def target(self) -> str | None:
        """Where the page of this rank's node is read, as host:port; None where there is none."""
        port = self._node.port if self._node is not None else None
        is_wildcard = self._address in ("0.0.0.0", "::")  # noqa: S104 - compared
        host = self._node_address if is_wildcard else self._address
        return f"{f'[{host}]' if ':' in host else host}:{port}" if port else None

    def step(self, done: int, steps_per_epoch: int, *, again: bool) -> None:
        """So many steps are done; `again`: an earlier attempt had done this one."""
        with self._lock:
            self._spans.append(
                (_STEP, _TIMED_EVERY if self._device.type == "cuda" else 1, None)
            )
        self._steps += 1
        if self._lead:
            self.set("step", done)
            self.set("epoch", done / steps_per_epoch)
            self.add("steps")
            self.add("steps_recomputed", int(again))
        if self._device.type == "cpu":
            self.read()

    def read(self) -> None:
        """Take in the phases that have been timed: after every step on a CPU, at log steps, a sync point, on a GPU."""
        with self._lock:
            spans, self._spans = self._spans, []
        seconds: Counter[str] = Counter()
        for name, began, ended in (*spans, (_STEP, 1, None)):
            if name == _STEP:
                self._take(seconds, began)
                seconds.clear()
            else:
                seconds[name] += (
                    ended - began
                    if isinstance(began, float)
                    else began.elapsed_time(ended) / 1000
                )

    def _take(self, seconds: Mapping[str, float], steps: int) -> None:
        """Take in the phases of a step; what was timed on a GPU counts for so many steps."""
        for name, of_a_step in seconds.items():
            times = steps if name in _ON_DEVICE else 1
            if name == _ARRIVAL:
                self._arrivals.append(of_a_step)
                self.add("rank_arrival_seconds", times * of_a_step, **self._rank)
                continue
            for _ in range(times):
                self.observe("phase_seconds", of_a_step, phase=name)

    def record(self, record: MetricsRecord) -> None:
        """The numbers of a record of the run."""
        self.set("loss", record.loss, split=record.split)
        self.set("top1_ratio", record.top1, split=record.split)
        self.set("top5_ratio", record.top5, split=record.split)
        if isinstance(record, TrainRecord):
            self.set("learning_rate", record.lr)
            self.set("images_per_second", record.images_per_second)
            self.set("bad_samples", record.bad_samples)

    def keep(self, parameters: Sequence[Tensor]) -> None:
        """Before a step: measure its norms, on the lead, if anybody can read them."""
        if self._lead and self._node is not None:
            self._norms.before_step(parameters)

    def norms(self, parameters: Sequence[Tensor]) -> None:
        """At a sync point after the step: set its norms, if they were measured."""
        for name, value in self._norms.after_step(parameters).items():
            self.set(name, value)

    def saved(self, seconds: float, size: int) -> None:
        """A checkpoint is whole. Called in the background."""
        self.observe("checkpoint_write_seconds", seconds)
        self.set("checkpoint_timestamp_seconds", time.time())
        self.set("checkpoint_bytes", size)

    def ends(self, *, stopped: bool) -> None:
        """The run has come to its end; `stopped`: for now, and whoever waits for it should not wait for the page."""
        self._linger = 0.0 if stopped else self._linger
        if self._lead and not stopped:
            self.set("finished", 1)

    def close(self, *, over: bool) -> None:
        """Stop; `over`: no other attempt of this launch adds to these counters."""
        if self._node is not None:
            self._node.close(linger=self._linger if over else 0.0, final=over)

    def flush(self) -> None:
        """Bring this rank's page up to date at once, after a sync point."""
        self.read()
        if self._node is not None:
            self._node.flush()

    def collect(self) -> Iterator[Metric]:
        """What the numbers are now; called off the training thread."""
        self._measure()
        with self._lock:
            gauges, totals = list(self._gauges.items()), list(self._totals.items())
        for kind, table, numbers in (
            (GaugeMetricFamily, GAUGES, gauges),
            (CounterMetricFamily, TOTALS, totals),
        ):
            families = {
                name: kind(
                    f"distrain_{name}", family.text, labels=("run", *family.labels)
                )
                for name, family in table.items()
            }
            for (name, labels), value in numbers:
                families[name].add_metric((self._run, *labels), value)
            yield from (family for family in families.values() if family.samples)

    def _measure(self) -> None:
        """Look at what is not told: storage, queues, this process."""
        for split, counts in self._stores.items():
            numbers = {
                "store_requests": counts.requests,
                "store_bytes": counts.bytes,
                "store_seconds": counts.seconds,
                "store_retries": counts.retries,
                "cache_hits": counts.hits,
                "cache_evictions": counts.evictions,
            }
            for name, number in numbers.items():
                self._totals[name, (split,)] = number  # type: ignore[assignment]
            for kind, number in list(counts.errors.items()):
                self._totals["store_errors", (split, kind)] = number
        for stage, depth in self._depths().items():
            self.set("queue_depth", depth, stage=stage)
        self.set("memory_bytes", _resident())
        self.set(
            "open_files",
            len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
        )
        if self._watchdog is not None:
            self.set(
                "last_progress_timestamp_seconds", time.time() - self._watchdog.idle
            )
        if self._device.type == "cuda":
            self._measure_gpu()

    def _measure_gpu(self) -> None:
        """What torch knows of its memory, and NVML of the GPU where nvidia-ml-py is installed; no kernel is run."""
        gpu = str(torch.cuda.get_device_properties(self._device).uuid)
        self.set("gpu_memory_bytes", torch.cuda.memory_reserved(self._device), gpu=gpu)
        if not self._nvml:
            return
        try:
            self.set(
                "gpu_busy_ratio", torch.cuda.utilization(self._device) / 100, gpu=gpu
            )
            self.set(
                "gpu_power_watts", torch.cuda.power_draw(self._device) / 1000, gpu=gpu
            )
        except Exception as error:  # of many kinds: not installed, no driver, not of a part of a GPU (MIG)
            self._nvml = False
            self._tell(
                f"the GPU's load is not told: {' '.join(str(error).split())} (pip install 'distrain[gpu]')"
            )

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(
            torch.cuda.current_stream(self._device)
        )  # of this rank's GPU, whatever this thread's is
        return event


def run_label(run: str) -> str:
    """The label `run` of a run directory: its name, without what may be secret in a URL."""
    return redacted(run).rstrip("/").rpartition("/")[2]


def _values(family: Family, labels: Mapping[str, str]) -> tuple[str, ...]:
    assert labels.keys() == set(family.labels), (family, labels)
    return tuple(labels[name] for name in family.labels)


def _resident() -> int:
    """Bytes of this process's resident memory; its highest so far where the system does not tell."""
    try:
        return (
            int(Path("/proc/self/statm").read_text().split()[1])
            * resource.getpagesize()
        )
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
