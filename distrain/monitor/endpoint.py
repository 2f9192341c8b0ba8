"""Metrics page of a node, for Prometheus, with the numbers of all its ranks.

Each rank writes its numbers to a file in one folder, and one of the ranks serves them.
Counters and histograms are summed over all pages of the launch, those of dead ranks
included, so that they count the work that was done. Gauges are of living ranks only.

The multiprocess mode of prometheus_client is not used: it needs an environment
variable before its first import and keeps the files of a process forever, which mixes
two runs of one process. Here a rank's page is a file of its own, written once per
second, off the training thread.
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
"""Seconds between two renderings of a page."""
_MAX_PORTS_TRIED = 100
# Age from which the folder of a launch without living processes is removed.
_ABANDONED_AFTER_SECONDS = 600.0
_MAX_DEAD_PAGES = 16
# File in the folder that holds the port of the served page.
_PORT_FILE = "serving.json"
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
    """Share of this process in its node's page. Close it.

    The rank that holds the lock of the folder serves the page. If it dies, the system
    releases the lock, and within a second another rank of the node takes over the lock
    and the port.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        gauge_merges: Mapping[str, str],
        *,
        session: str,
        address: str,
        port: int,
        log: Callable[[str], None],
    ) -> None:
        """Start to write this rank's page, and to serve the node's if no rank does.

        Args:
            registry: this rank's metrics.
            gauge_merges: how the gauges of several ranks are merged, by name: sum, min
                or max.
            session: name of the launch, whose ranks share a page.
            address: to listen on.
            port: to listen on; if it is in use, the next free one.
            log: gets the URL of the page, on the rank that serves it, and warnings.

        Raises:
            OSError: the address cannot be listened on, or the folder for the pages
                cannot be used.
        """
        self._registry = registry
        self._gauge_merges = gauge_merges
        self._address = address
        self._first_port = port
        self._log = log
        self._process_identity = get_process_identity(os.getpid()) or str(os.getpid())

        self._folder = _open_folder(session, self._process_identity)
        _remove_abandoned_folders(self._folder)
        # The clock keeps apart two endpoints of one process.
        self._page_path = self._folder / f"{os.getpid()}-{time.monotonic_ns()}.json"
        self._lock_file = (self._folder / "serve.lock").open("w")

        self._server: PageServer | None = None
        self._logged_no_port = False
        self._logged_stale_page = False
        self._page_lock = threading.Lock()
        self._closing = threading.Event()
        # Publish once on this thread, so that an address that cannot be listened on is
        # an error of the caller.
        try:
            self._publish_once()
        except OSError:
            self._lock_file.close()
            shutil.rmtree(self._folder, ignore_errors=True)
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

    def flush(self) -> None:
        """Write this rank's page now."""
        self._write_page()

    def close(self, *, linger_seconds: float = 0.0, final: bool = False) -> None:
        """Stop.

        Args:
            linger_seconds: seconds to wait for one more read of the page, if it has
                been read before.
            final: the launch is over; otherwise this rank's counters stay for the
                attempts that follow.
        """
        self._closing.set()
        self._thread.join()
        # Gauges of an attempt that failed say nothing about the next one.
        self._write_page(with_gauges=final)
        if self._server is not None:
            self._render_page()
            self._server.wait_until_read(linger_seconds)
            self._server.close()
            if final:
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
        """Write this rank's page; become the server if there is none; render."""
        self._write_page()
        if self._server is None:
            # The lock is busy while another rank serves.
            with suppress(BlockingIOError):
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._start_server()
        if self._server is not None:
            self._render_page()

    def _write_page(self, *, with_gauges: bool = True) -> None:
        # `flush` writes on the training thread. Collect inside the lock, so that the
        # page that is written last has the newer numbers.
        with self._page_lock:
            families = [
                family
                for family in _to_families(self._registry.collect())
                if with_gauges or family["type"] != "gauge"
            ]
            page = {"process": self._process_identity, "families": families}
            _try_write_json(self._page_path, page)

    def _render_page(self) -> None:
        assert self._server is not None
        pages = dict(_read_pages(self._folder))
        merged = _MergedCollector(list(pages.values()), self._gauge_merges)
        self._server.page = generate_latest(merged)
        dead_pages = {
            path: page
            for path, page in pages.items()
            if is_dead_local_process(page["process"])
        }
        # Each page costs time at every rendering.
        if len(dead_pages) > _MAX_DEAD_PAGES:
            self._merge_dead_pages(dead_pages)

    def _merge_dead_pages(self, dead_pages: Mapping[Path, dict[str, Any]]) -> None:
        """Replace the pages of dead ranks by one page with their sums."""
        merged = _MergedCollector(list(dead_pages.values()), self._gauge_merges)
        page = {
            # Any of the dead processes, so that this page counts as dead too.
            "process": next(iter(dead_pages.values()))["process"],
            "families": _to_families(merged.collect()),
            # If this rank is killed before it has removed the old pages, readers skip
            # them because of this list, so that they do not count twice.
            "replaces": [path.name for path in dead_pages],
        }
        if _try_write_json(self._folder / f"dead-{time.monotonic_ns()}.json", page):
            for path in dead_pages:
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
        if server.port != previous_port:
            host = f"[{self._address}]" if ":" in self._address else self._address
            self._log(f"metrics at http://{host}:{server.port}/metrics")

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
    """Collector of the sums and merges of several pages."""

    def __init__(
        self, pages: Sequence[dict[str, Any]], gauge_merges: Mapping[str, str]
    ) -> None:
        self._pages = pages
        self._gauge_merges = gauge_merges

    def collect(self) -> Iterator[Metric]:
        """Yield each metric family once, with the merged values of all pages."""
        # Group the values of all pages by family and sample.
        families: dict[str, Metric] = {}
        values: dict[str, dict[_SampleKey, list[float]]] = {}
        for page in self._pages:
            is_dead = is_dead_local_process(page["process"])
            for family in page["families"]:
                if is_dead and family["type"] == "gauge":
                    continue
                name = family["name"]
                families.setdefault(name, Metric(name, family["help"], family["type"]))
                for sample_name, labels, value in family["samples"]:
                    key = sample_name, tuple(sorted(labels.items()))
                    values.setdefault(name, {}).setdefault(key, []).append(value)

        # Merge them: gauges as their spec says, counters and histograms by their sum.
        for name, metric in families.items():
            merge_mode = self._gauge_merges[name] if metric.type == "gauge" else "sum"
            merge = _MERGE_FUNCTIONS[merge_mode]
            for (sample_name, labels), sample_values in values.get(name, {}).items():
                metric.add_sample(sample_name, dict(labels), merge(sample_values))
            yield metric


def _open_folder(session: str, process_identity: str) -> Path:
    """Return the folder of the pages of a launch on this node, and create it."""
    # Hosts may share a folder for temporary files, so the name holds the node: the boot
    # of a kernel, and a PID namespace of it.
    boot_and_namespace = " ".join(process_identity.split()[:2])
    node = hashlib.sha256(boot_and_namespace.encode()).hexdigest()[:8]
    name = f"distrain-metrics-{os.getuid()}-{session}-{node}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    # Another user may have created a folder of that name, and could read the pages.
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "belongs to another user", str(folder))
    return folder


def _try_write_json(path: Path, page: Mapping[str, Any]) -> bool:
    """Write a page, and return whether that succeeded.

    A full disk must not end a run; the page is stale meanwhile.
    """
    # Replace the file in one go: the server may read it at any time.
    partial_path = path.with_suffix(f".{threading.get_ident()}")
    try:
        partial_path.write_text(json.dumps(page), encoding="utf-8")
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


def _read_pages(folder: Path) -> Iterable[tuple[Path, dict[str, Any]]]:
    """Return the pages of a folder by path, without those that others replace."""
    pages: dict[Path, dict[str, Any]] = {}
    replaced_names = set[str]()
    for path in sorted(folder.glob("*.json")):
        if path.name == _PORT_FILE:
            continue
        # A page may be removed between the listing and here.
        with suppress(OSError, ValueError):
            pages[path] = json.loads(path.read_text(encoding="utf-8"))
            replaced_names.update(pages[path].get("replaces", ()))
    return [
        (path, page) for path, page in pages.items() if path.name not in replaced_names
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
            pages = _read_pages(folder)
            if all(is_dead_local_process(page["process"]) for _, page in pages):
                shutil.rmtree(folder, ignore_errors=True)
