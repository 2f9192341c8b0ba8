"""Metrics page of a node, for Prometheus, with the numbers of all its ranks.

Each rank writes its numbers to a file in one folder, and one of the ranks serves them.
Counters and histograms are summed over all files of the launch, those of dead ranks
included, so that they count the work that was done. Gauges are of living ranks only.

The multiprocess mode of prometheus_client is not used: it needs an environment
variable before its first import and keeps the files of a process forever, which mixes
two runs of one process. Here each rank has a file of its own, its *snapshot*, which a
background thread writes once per second, and `flush` at once.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest

from distrain.distributed.process import get_process_identity, is_dead_local_process
from distrain.monitor.pageserver import PageServer

RENDER_INTERVAL_SECONDS = 1.0
"""Seconds between two rounds of a rank: write its snapshot, take over the page if
nobody serves it, render."""
_MAX_PORTS_TRIED = 100
# Age from which the folder of a launch without living processes is removed.
_ABANDONED_AFTER_SECONDS = 600.0
_MAX_DEAD_SNAPSHOTS = 16
# File in the folder that holds the port of the served page.
_PORT_FILE = "serving.json"
# File in the folder that holds the URL that a rank of the launch has logged last.
_URL_FILE = "logged.txt"
_MERGE_FUNCTIONS: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "min": min,
    "max": max,
}

FamilyDict = dict[str, Any]
"""Metric family for JSON: name, help, type, and samples as (name, labels, value)."""
# Name and sorted labels of a sample.
_SampleKey = tuple[str, tuple[tuple[str, str], ...]]


class MetricsEndpoint:
    """This rank's part in its node's metrics page: it writes, and may serve. Close it.

    The rank that holds the lock of the folder serves the page. If it dies, the system
    releases the lock, and within a second another rank of the node takes over the lock
    and the port.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        gauge_merges: Mapping[str, str],
        *,
        launch_id: str,
        address: str,
        port: int,
        log: Callable[[str], None],
    ) -> None:
        """Start to write this rank's snapshot, and to serve the page if no rank does.

        Args:
            registry: this rank's metrics.
            gauge_merges: how the gauges of several ranks are merged, by name: sum, min
                or max.
            launch_id: id of the launch, whose ranks share a page.
            address: to listen on.
            port: to listen on; if it is in use, the next free one.
            log: gets warnings, and, once `announce` has been called, the URL of the
                page on the rank that serves it.

        Raises:
            OSError: the address cannot be listened on, or the folder for the
                snapshots cannot be used.
        """
        self._registry = registry
        self._gauge_merges = gauge_merges
        self._address = address
        self._first_port = port
        self._log = log
        self._process_identity = get_process_identity(os.getpid()) or str(os.getpid())

        self._folder = _open_folder(launch_id, self._process_identity)
        _remove_abandoned_folders(self._folder)
        # The clock keeps apart two endpoints of one process.
        self._snapshot_path = self._folder / f"{os.getpid()}-{time.monotonic_ns()}.json"
        self._lock_file = (self._folder / "serve.lock").open("w")

        self._server: PageServer | None = None
        self._is_announced = False
        self._url_lock = threading.Lock()
        self._logged_no_port = False
        self._logged_stale_page = False
        self._snapshot_lock = threading.Lock()
        self._closing = threading.Event()
        # Publish once on this thread, so that an address that cannot be listened on is
        # an error of the caller.
        try:
            self._publish_once()
        except OSError:
            # The folder stays: the other ranks of the launch may use it.
            self._snapshot_path.unlink(missing_ok=True)
            self._lock_file.close()
            raise
        self._thread = threading.Thread(
            target=self._publish_loop, name="distrain-metrics", daemon=True
        )
        self._thread.start()

    @property
    def served_port(self) -> int | None:
        """Port of the node's page, whichever rank serves it; None before one does."""
        try:
            return int(json.loads((self._folder / _PORT_FILE).read_text())["port"])
        except (OSError, ValueError):
            return None

    def announce(self) -> None:
        """Log the URL of the page, now or when this rank becomes the one that serves.

        A launch logs the same URL only once.
        """
        self._is_announced = True
        self._log_new_url()

    def flush(self) -> None:
        """Write this rank's snapshot now, on the calling thread."""
        self._write_snapshot()

    def close(self, *, linger_seconds: float = 0.0, final: bool = False) -> None:
        """Stop publishing, and let another rank serve.

        Args:
            linger_seconds: seconds to wait for one more scrape of the page, if it has
                been read before.
            final: the launch is over; otherwise this rank's counters stay for the
                attempts that follow.
        """
        self._closing.set()
        self._thread.join()
        # Gauges of an attempt that failed say nothing about the next one.
        self._write_snapshot(with_gauges=final)
        if self._server is not None:
            self._render_page()
            self._server.wait_until_read(linger_seconds)
            self._server.close()
        # Whoever has the lock removes the folder. That need not be the server: it may
        # have ended before, while this rank wrote a snapshot.
        if final and (self._server is not None or self._try_lock()):
            shutil.rmtree(self._folder, ignore_errors=True)
        # Last, because it releases the lock: another rank serves from then on.
        self._lock_file.close()

    def _publish_loop(self) -> None:
        while not self._closing.wait(RENDER_INTERVAL_SECONDS):
            try:
                self._publish_once()
            except Exception as error:
                # Metrics must not end a run. If no file can be opened, for example, the
                # page is stale until that is over.
                if not self._logged_stale_page:
                    self._log(f"warning: the metrics page is not updated: {error!r}")
                self._logged_stale_page = True

    def _publish_once(self) -> None:
        """Write this rank's snapshot; become the server if there is none; render."""
        self._write_snapshot()
        if self._server is None and self._try_lock():
            self._start_server()
        if self._server is not None:
            self._render_page()

    def _try_lock(self) -> bool:
        """Take the lock of the folder; False while another rank serves."""
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _write_snapshot(self, *, with_gauges: bool = True) -> None:
        # `flush` writes on another thread. Collect inside the lock, so that the
        # snapshot that is written last has the newer numbers.
        with self._snapshot_lock:
            families = [
                family
                for family in _to_families(self._registry.collect())
                if with_gauges or family["type"] != "gauge"
            ]
            snapshot = {"process": self._process_identity, "families": families}
            _try_write_json(self._snapshot_path, snapshot)

    def _render_page(self) -> None:
        """Render the page from the snapshots of all ranks of the node."""
        assert self._server is not None
        snapshots = dict(_read_snapshots(self._folder))
        merged = _MergedCollector(list(snapshots.values()), self._gauge_merges)
        self._server.page = generate_latest(merged)
        dead_snapshots = {
            path: snapshot
            for path, snapshot in snapshots.items()
            if is_dead_local_process(snapshot["process"])
        }
        # Each snapshot costs time at every rendering.
        if len(dead_snapshots) > _MAX_DEAD_SNAPSHOTS:
            self._merge_dead_snapshots(dead_snapshots)

    def _merge_dead_snapshots(
        self, dead_snapshots: Mapping[Path, dict[str, Any]]
    ) -> None:
        """Replace the snapshots of dead ranks by one with their sums."""
        merged = _MergedCollector(list(dead_snapshots.values()), self._gauge_merges)
        snapshot = {
            # Any of the dead processes, so that this snapshot counts as dead too.
            "process": next(iter(dead_snapshots.values()))["process"],
            "families": _to_families(merged.collect()),
            # If this rank is killed before it has removed the old ones, readers skip
            # them because of this list, so that they do not count twice.
            "replaces": [path.name for path in dead_snapshots],
        }
        if _try_write_json(self._folder / f"dead-{time.monotonic_ns()}.json", snapshot):
            for path in dead_snapshots:
                path.unlink(missing_ok=True)

    def _start_server(self) -> None:
        """Serve the node's page, on the port of the server before, if it is free."""
        previous_port = self.served_port
        server = self._open_server(previous_port or self._first_port)
        if server is None:
            return
        # Write down the port, which the next server should take over.
        try:
            (self._folder / _PORT_FILE).write_text(
                json.dumps({"port": server.port}), encoding="utf-8"
            )
        except OSError:
            # The folder is gone because the launch is over, or the disk is full. In the
            # latter case the next round retries.
            server.close()
            return
        self._server = server
        server.start()
        self._log_new_url()

    def _log_new_url(self) -> None:
        """Log the URL if this rank serves, unless the launch has already logged it."""
        # The training thread and the publishing thread both come here.
        with self._url_lock:
            if self._server is None or not self._is_announced:
                return
            host = f"[{self._address}]" if ":" in self._address else self._address
            url = f"http://{host}:{self._server.port}/metrics"
            path = self._folder / _URL_FILE
            # If the file cannot be read or written, the URL is logged once more.
            with suppress(OSError):
                if path.read_text(encoding="utf-8") == url:
                    return
            with suppress(OSError):
                path.write_text(url, encoding="utf-8")
            self._log(f"metrics at {url}")

    def _open_server(self, preferred_port: int) -> PageServer | None:
        """Listen on a port, or on the next free one; None if none is free."""
        last_port = min(65535, self._first_port + _MAX_PORTS_TRIED - 1)
        for port in (preferred_port, *range(self._first_port, last_port + 1)):
            try:
                return PageServer(self._address, port)
            except OSError as error:
                # Ports below 1024 may be forbidden; a later one may be free.
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
        # The next round retries, so report it once only.
        if not self._logged_no_port:
            self._log(
                f"warning: no port from {self._first_port} to {last_port} can be used, "
                "and metrics are not served until one can: change metrics.port"
            )
        self._logged_no_port = True
        return None


class _MergedCollector:
    """Collector of the sums and merges of several snapshots."""

    def __init__(
        self, snapshots: Sequence[dict[str, Any]], gauge_merges: Mapping[str, str]
    ) -> None:
        self._snapshots = snapshots
        self._gauge_merges = gauge_merges

    def collect(self) -> Iterator[Metric]:
        """Yield each metric family once, with the merged values of all snapshots."""
        # Group the values of all snapshots by family and sample.
        families: dict[str, Metric] = {}
        values: dict[str, dict[_SampleKey, list[float]]] = {}
        for snapshot in self._snapshots:
            is_dead = is_dead_local_process(snapshot["process"])
            for family in snapshot["families"]:
                if is_dead and family["type"] == "gauge":
                    continue
                name = family["name"]
                families.setdefault(name, Metric(name, family["help"], family["type"]))
                for sample_name, labels, value in family["samples"]:
                    key = sample_name, tuple(sorted(labels.items()))
                    values.setdefault(name, {}).setdefault(key, []).append(value)

        # Merge them: each gauge by its own sum, min or max; counters and histograms by
        # their sum.
        for name, metric in families.items():
            merge_mode = self._gauge_merges[name] if metric.type == "gauge" else "sum"
            merge = _MERGE_FUNCTIONS[merge_mode]
            for (sample_name, labels), sample_values in values.get(name, {}).items():
                metric.add_sample(sample_name, dict(labels), merge(sample_values))
            yield metric


def _open_folder(launch_id: str, process_identity: str) -> Path:
    """Return the folder of a launch's snapshots on this node, and create it."""
    # Hosts may share a folder for temporary files, so the name includes a hash of the
    # kernel's boot id and the PID namespace.
    boot_and_namespace = " ".join(process_identity.split()[:2])
    node = hashlib.sha256(boot_and_namespace.encode()).hexdigest()[:8]
    name = f"distrain-metrics-{os.getuid()}-{launch_id}-{node}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    # Another user may have created a folder of that name, and could read the snapshots.
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "belongs to another user", str(folder))
    return folder


def _try_write_json(path: Path, snapshot: Mapping[str, Any]) -> bool:
    """Write a snapshot, and return whether that succeeded.

    A full disk must not end a run; the snapshot is stale meanwhile.
    """
    # Replace the file in one go: the server may read it at any time.
    partial_path = path.with_suffix(f".{threading.get_ident()}")
    try:
        partial_path.write_text(json.dumps(snapshot), encoding="utf-8")
        partial_path.replace(path)
    except OSError:
        return False
    return True


def _to_families(metrics: Iterable[Metric]) -> list[FamilyDict]:
    return [
        {
            "name": metric.name,
            "help": metric.documentation,
            "type": metric.type,
            # Times of creation cannot be summed.
            "samples": [
                (sample.name, sample.labels, sample.value)
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ],
        }
        for metric in metrics
    ]


def _read_snapshots(folder: Path) -> Iterable[tuple[Path, dict[str, Any]]]:
    """Return the snapshots of a folder by path, without those that others replace."""
    snapshots: dict[Path, dict[str, Any]] = {}
    replaced_names = set[str]()
    for path in sorted(folder.glob("*.json")):
        if path.name == _PORT_FILE:
            continue
        # A snapshot may be removed between the listing and here.
        with suppress(OSError, ValueError):
            snapshots[path] = json.loads(path.read_text(encoding="utf-8"))
            replaced_names.update(snapshots[path].get("replaces", ()))
    return [
        (path, snapshot)
        for path, snapshot in snapshots.items()
        if path.name not in replaced_names
    ]


def _remove_abandoned_folders(own_folder: Path) -> None:
    """Remove the folders of earlier launches whose processes are all dead.

    They were killed, or ended for a resize after which no attempt followed.
    """
    for folder in own_folder.parent.glob(f"distrain-metrics-{os.getuid()}-*"):
        # Another process may remove the same folder now.
        with suppress(OSError):
            age_seconds = time.time() - folder.stat().st_mtime
            if folder == own_folder or age_seconds < _ABANDONED_AFTER_SECONDS:
                continue
            snapshots = _read_snapshots(folder)
            if all(
                is_dead_local_process(snapshot["process"]) for _, snapshot in snapshots
            ):
                shutil.rmtree(folder, ignore_errors=True)
