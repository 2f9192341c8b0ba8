"""One page of metrics a node, for Prometheus: each rank leaves its numbers in a folder, one of them serves all.

prometheus_client's own multiprocess mode is not used: it wants an environment variable before its first import, keeps
the files of a process for good, and so mixes two runs of one process. Here a rank's page is a file of its own, written
once a second, off the training thread. Counters and histograms are added up over all pages of the launch, those of
ranks that died included, so that they count the work that was done; gauges are of living ranks.
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
_ABANDONED_AFTER_SECONDS = 600.0
_MAX_DEAD_PAGES = 16
_MERGE_FUNCTIONS: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "min": min,
    "max": max,
}

FamilyDict = dict[str, Any]


class MetricsEndpoint:
    """This process's part in its node's page. Close it.

    Whoever holds the lock of the folder serves. The system takes the lock from a process that dies, and another rank of
    the node takes it within a second, and the same port.
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
        """Start.

        Args:
            registry: this rank's metrics.
            gauges: how gauges of several ranks become one, by name: sum, min or max.
            session: names the launch, whose ranks share a page.
            address: to listen on.
            port: to listen on; if it is taken, the next that is free.
            tell: is told the URL of the page by whoever serves it.
        """
        (
            self._registry,
            self._gauge_merges,
            self._address,
            self._first_port,
            self._log,
        ) = (
            registry,
            gauge_merges,
            address,
            port,
            log,
        )
        self._process_identity = get_process_identity(os.getpid()) or str(os.getpid())
        # Hosts may share a folder for temporary files: a node is a kernel's boot and a PID namespace of it.
        node = hashlib.sha256(
            " ".join(self._process_identity.split()[:2]).encode()
        ).hexdigest()[:8]
        self._folder = (
            Path(tempfile.gettempdir())
            / f"distrain-metrics-{os.getuid()}-{session}-{node}"
        )
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if self._folder.stat().st_uid != os.getuid():
            raise PermissionError(
                errno.EPERM, "belongs to somebody else", str(self._folder)
            )
        _remove_abandoned_folders(self._folder)
        self._page_path = self._folder / f"{os.getpid()}-{time.monotonic_ns()}.json"
        self._lock_file = (self._folder / "serve.lock").open("w")
        self._server: PageServer | None = None
        self._logged_no_port = self._logged_stale_page = False
        self._page_lock = threading.Lock()
        self._closing = threading.Event()
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
        """Of the node's page, whoever serves it; None as long as nobody does."""
        try:
            return int(json.loads((self._folder / "serving.json").read_text())["port"])
        except (OSError, ValueError):
            return None

    def flush(self) -> None:
        """Leave this rank's numbers now."""
        self._write_page()

    def close(self, *, linger_seconds: float = 0.0, final: bool = False) -> None:
        """Stop.

        Args:
            linger: seconds to wait for one more read of the page, if it has been read at all.
            final: the launch is over; if not, this rank's counters stay for the attempts that follow.
        """
        self._closing.set()
        self._thread.join()
        self._write_page(with_gauges=final)
        if self._server is not None:
            self._render_page()
            self._server.wait_until_read(linger_seconds)
            self._server.close()
            if final:
                shutil.rmtree(self._folder, ignore_errors=True)
        self._lock_file.close()

    def _publish_loop(self) -> None:
        while not self._closing.wait(RENDER_INTERVAL_SECONDS):
            try:
                self._publish_once()
            except (
                Exception
            ) as error:  # no open file left, say: the page is stale until that is over
                if not self._logged_stale_page:
                    self._log(
                        f"warning: the metrics page is not brought up to date: {error!r}"
                    )
                self._logged_stale_page = True

    def _publish_once(self) -> None:
        """Leave this rank's numbers; serve, if nobody does; render what is served."""
        self._write_page()
        if self._server is None:
            with suppress(BlockingIOError):  # another rank serves
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._start_server()
        if self._server is not None:
            self._render_page()

    def _write_page(self, *, with_gauges: bool = True) -> None:
        """Write this rank's page."""
        with self._page_lock:  # the newer of two writes stays
            families = [
                f
                for f in _collect_families(self._registry)
                if with_gauges or f["type"] != "gauge"
            ]
            _try_write_json(
                self._page_path,
                {"process": self._process_identity, "families": families},
            )

    def _render_page(self) -> None:
        assert self._server is not None
        pages = dict(_read_pages(self._folder))
        self._server.page = generate_latest(
            _MergedCollector(list(pages.values()), self._gauge_merges)
        )
        self._merge_dead_pages(
            {
                path: page
                for path, page in pages.items()
                if is_dead_local_process(page["process"])
            }
        )

    def _merge_dead_pages(self, dead_pages: Mapping[Path, dict[str, Any]]) -> None:
        """Make one page of those of the dead, when they are many: each costs time at every rendering."""
        if len(dead_pages) <= _MAX_DEAD_PAGES:
            return
        families = _to_families(
            _MergedCollector(list(dead_pages.values()), self._gauge_merges).collect()
        )
        replaced = [path.name for path in dead_pages]
        process = next(iter(dead_pages.values()))["process"]
        page = {"process": process, "families": families, "replaces": replaced}
        # Killed from here on, the old pages are told from new ones by that list, and do not count twice.
        if _try_write_json(self._folder / f"dead-{time.monotonic_ns()}.json", page):
            for path in dead_pages:
                path.unlink(missing_ok=True)

    def _start_server(self) -> None:
        taken = self.served_port
        for port in (
            taken or self._first_port,
            *range(self._first_port, min(65536, self._first_port + _MAX_PORTS_TRIED)),
        ):
            try:
                self._server = PageServer(self._address, port)
                break
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
        else:
            if not self._logged_no_port:
                self._log(
                    f"no port from {self._first_port} on is free: metrics are not served until one is (metrics.port)"
                )
            self._logged_no_port = True
            return
        port = self._server.port
        try:
            (self._folder / "serving.json").write_text(
                json.dumps({"port": port}), encoding="utf-8"
            )
        except OSError:  # the folder is gone, for the launch is over; or there is no room: the next turn tries again
            self._server.close()
            self._server = None
            return
        self._server.start()
        if port != taken:
            host = f"[{self._address}]" if ":" in self._address else self._address
            self._log(f"metrics at http://{host}:{port}/metrics")


class _MergedCollector:
    """A collector of what all pages have together."""

    def __init__(
        self, pages: Sequence[dict[str, Any]], gauge_merges: Mapping[str, str]
    ) -> None:
        self._pages, self._gauge_merges = pages, gauge_merges

    def collect(self) -> Iterator[Metric]:
        """Each family once."""
        families: dict[str, Metric] = {}
        values: dict[
            str, dict[tuple[str, tuple[tuple[str, str], ...]], list[float]]
        ] = {}
        for page in self._pages:
            dead = is_dead_local_process(page["process"])
            for family in page["families"]:
                if dead and family["type"] == "gauge":
                    continue
                name = family["name"]
                families.setdefault(name, Metric(name, family["help"], family["type"]))
                for sample, labels, value in family["samples"]:
                    key = sample, tuple(sorted(labels.items()))
                    values.setdefault(name, {}).setdefault(key, []).append(value)
        for name, metric in families.items():
            merge = _MERGE_FUNCTIONS[
                self._gauge_merges[name] if metric.type == "gauge" else "sum"
            ]
            for (sample, labels), found in values.get(name, {}).items():
                metric.add_sample(sample, dict(labels), merge(found))
            yield metric


def _collect_families(registry: CollectorRegistry) -> list[FamilyDict]:
    return _to_families(registry.collect())


def _try_write_json(path: Path, page: Mapping[str, Any]) -> bool:
    """Whether a page could be written: a full disk must not end a run, and the page is stale meanwhile."""
    partial = path.with_suffix(f".{threading.get_ident()}")
    try:
        partial.write_text(json.dumps(page), encoding="utf-8")
        partial.replace(path)
    except OSError:
        return False
    return True


def _to_families(metrics: Iterable[Metric]) -> list[FamilyDict]:
    return [
        {
            "name": metric.name,
            "help": metric.documentation,
            "type": metric.type,
            "samples": [
                (s.name, s.labels, s.value)
                for s in metric.samples
                if not s.name.endswith("_created")
            ],
        }
        for metric in metrics
    ]


def _read_pages(folder: Path) -> Iterable[tuple[Path, dict[str, Any]]]:
    pages, replaced = {}, set[str]()
    for path in sorted(folder.glob("*.json")):
        if path.name == "serving.json":
            continue
        with suppress(OSError, ValueError):  # gone meanwhile
            pages[path] = json.loads(path.read_text(encoding="utf-8"))
            replaced.update(pages[path].get("replaces", ()))
    return [(path, page) for path, page in pages.items() if path.name not in replaced]


def _remove_abandoned_folders(own_folder: Path) -> None:
    """Take away what launches left behind that were killed, or end with a resize that nobody followed up."""
    for folder in own_folder.parent.glob(f"distrain-metrics-{os.getuid()}-*"):
        with suppress(OSError):
            if (
                folder == own_folder
                or time.time() - folder.stat().st_mtime < _ABANDONED_AFTER_SECONDS
            ):
                continue
            if all(
                is_dead_local_process(page["process"])
                for _, page in _read_pages(folder)
            ):
                shutil.rmtree(folder, ignore_errors=True)
