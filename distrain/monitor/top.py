"""A live view of a run in the terminal, from its metrics pages and the files of its run directory."""

import json
import math
import time
import urllib.request
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.monitor.phases import Phase
from distrain.monitor.prometheus import to_run_label
from distrain.monitor.records import MetricsRecord, TrainRecord
from distrain.monitor.sinks import read_metrics
from distrain.rundir import files

_SPARK_BLOCKS = "▁▂▃▄▅▆▇█"
_MAX_POINTS = 512

LabelPairs = tuple[tuple[str, str], ...]


@dataclass
class RunView:
    """What is known of a run: its pages as they were last, and its history."""

    run: str
    samples: dict[tuple[str, LabelPairs], float] = field(default_factory=dict)
    previous_samples: dict[tuple[str, LabelPairs], float] = field(default_factory=dict)
    """The samples of the look before."""
    history: dict[str, deque[tuple[int, float]]] = field(
        default_factory=lambda: defaultdict(_create_history)
    )
    """Values by step: loss, images_per_second, top1."""
    silent_pages: list[str] = field(default_factory=list)
    """Pages that do not answer."""

    def get_value(self, name: str, **labels: str) -> float | None:
        """A sample, whatever other labels it has."""
        wanted = set(labels.items())
        for (found, with_labels), value in self.samples.items():
            if found == f"distrain_{name}" and wanted <= set(with_labels):
                return value
        return None

    def compute_increase(self, name: str, label: str) -> dict[str, float]:
        """What a counter or sum has grown by since the look before, or altogether on the first look."""
        found: dict[str, float] = defaultdict(float)
        for key, value in self.samples.items():
            if key[0] == f"distrain_{name}":
                before = self.previous_samples.get(key, 0.0)
                found[dict(key[1])[label]] += value - (
                    before if before <= value else 0.0
                )  # less: it began anew
        return dict(found)


def _create_history() -> deque[tuple[int, float]]:
    return deque(maxlen=_MAX_POINTS)


class RunWatcher:
    """Looks at a run again and again."""

    def __init__(self, location: str) -> None:
        """`place`: a run directory (path or URL), or the URL of a metrics page.

        Raises:
            UserError: there is no run.
        """
        self._store: Store | None = None
        if location.startswith(("http://", "https://")):
            self._page_urls = [
                location
                if location.endswith("/metrics")
                else f"{location.rstrip('/')}/metrics"
            ]
            self.view = RunView(location)
            return
        self._store, self._page_urls = Store(location), []
        if not self._store.exists(files.CONFIG_FILE):
            raise UserError(
                f"no run at {self._store.redacted_url}: name a run directory, or the URL of a metrics page"
            )
        self.view = RunView(self._store.redacted_url)

    def refresh_view(self) -> RunView:
        """Read pages and files once more."""
        view = self.view
        if self._store is not None:
            self._page_urls = _read_targets(self._store)
            for record in read_metrics(self._store)[-_MAX_POINTS:]:
                self._append_history(record)
        view.previous_samples, view.samples, view.silent_pages = view.samples, {}, []
        for url in self._page_urls:
            try:
                with urllib.request.urlopen(url, timeout=2.0) as answer:  # noqa: S310 - a page that the user named
                    _add_page_samples(
                        view.samples,
                        answer.read().decode(),
                        to_run_label(self._store.url) if self._store else None,
                    )
            except (OSError, ValueError):
                view.silent_pages.append(url)
        if self._store is None:
            step = int(view.get_value("step") or 0)
            for name, found in (
                ("loss", view.get_value("loss", split="train")),
                ("images_per_second", view.get_value("images_per_second")),
                ("top1", view.get_value("top1_ratio", split="val")),
            ):
                if found is not None:
                    _append_point(view.history[name], step, found)
        return view

    def _append_history(self, record: MetricsRecord) -> None:
        if isinstance(record, TrainRecord):
            values = {
                "loss": record.loss,
                "images_per_second": record.images_per_second,
            }
        else:
            values = {"top1": record.top1}
        for name, value in values.items():
            if math.isfinite(value):
                _append_point(self.view.history[name], record.step, value)


def _append_point(points: deque[tuple[int, float]], step: int, value: float) -> None:
    """Append, unless that step is there already."""
    if not points or step > points[-1][0]:
        points.append((step, value))


def _read_targets(store: Store) -> list[str]:
    try:
        groups = json.loads(store.read(files.TARGETS_FILE))
    except (OSError, ValueError):
        return []
    return [
        f"http://{target}/metrics" for group in groups for target in group["targets"]
    ]


def _add_page_samples(
    samples: dict[tuple[str, LabelPairs], float], page: str, run: str | None
) -> None:
    """Take in a page; of one run alone, where it is known: a port may be that of another by now."""
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if run is not None and sample.labels.get("run") != run:
                continue
            key = (
                sample.name,
                tuple(sorted((k, v) for k, v in sample.labels.items() if k != "run")),
            )
            samples[key] = (
                samples.get(key, 0.0) + sample.value
                if family.type != "gauge"
                else sample.value
            )


def draw_sparkline(values: Sequence[float], width: int) -> str:
    """The values as a row of blocks, averaged to at most `width` of them; none for what is not finite."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    per = math.ceil(len(finite) / width)
    means = [
        sum(part) / len(part)
        for part in (finite[i : i + per] for i in range(0, len(finite), per))
    ]
    low, high = min(means), max(means)
    return "".join(
        _SPARK_BLOCKS[
            round(
                (len(_SPARK_BLOCKS) - 1)
                * ((v - low) / (high - low) if high > low else 0.5)
            )
        ]
        for v in means
    )


def find_problems(view: RunView, now: float) -> list[str]:
    """What is wrong, a sentence each."""
    found = [f"{url} does not answer" for url in view.silent_pages]
    last, finished = (
        view.get_value("last_progress_timestamp_seconds"),
        view.get_value("finished"),
    )
    if last is not None and not finished and now - last > 60:
        found.append(f"no progress for {now - last:.0f} s")
    if view.get_value("diverged"):
        found.append("it has diverged: see not-finite-step-*.json in the run directory")
    if bad := view.get_value("bad_samples"):
        found.append(
            f"{bad:.0f} bad samples of at most {view.get_value('bad_samples_limit') or 0:.0f}"
        )
    have, want = view.get_value("workers") or 0, view.get_value("workers_wanted") or 0
    if have < want:
        found.append(f"{have:.0f} of {want:.0f} workers")
    waits, arrivals = (
        view.compute_increase(f"rank_{what}_seconds_total", "rank")
        for what in ("data_wait", "arrival")
    )
    for rank, arrival in arrivals.items():
        if arrival and waits.get(rank, 0.0) > 0.3 * arrival:
            found.append(
                f"rank {rank} waits for data {waits[rank] / arrival:.0%} of its time"
            )
    if len(arrivals) > 1:
        slowest = max(arrivals, key=lambda rank: arrivals[rank])
        middle = sorted(arrivals.values())[
            len(arrivals) // 2 - (len(arrivals) % 2 == 0)
        ]
        if middle and arrivals[slowest] > 1.25 * middle:
            found.append(
                f"rank {slowest} comes {arrivals[slowest] / middle - 1:.0%} later to each step than the middle one"
            )
    return found


def render_lines(view: RunView, width: int, now: float | None = None) -> Iterable[str]:
    """The view as text of at most `width` columns."""
    step, steps = view.get_value("step"), view.get_value("steps_planned")
    if step is None and view.history["loss"]:
        step = view.history["loss"][-1][0]
    done = f" of {steps:.0f} ({step / steps:.0%})" if step is not None and steps else ""
    yield f"{view.run}  step {step or 0:.0f}{done}"
    speed = view.get_value("images_per_second")
    rate = view.get_value("learning_rate")
    parts = [f"{speed:,.0f} images/s"] if speed is not None else []
    if workers := view.get_value("workers"):
        parts.append(f"{workers:.0f} worker{'s' * (workers > 1)}")
    if restarts := view.get_value("restarts"):
        parts.append(f"{restarts:.0f} restart{'s' * (restarts > 1)}")
    parts += [f"rate {rate:.3g}"] if rate is not None else []
    if (saved := view.get_value("checkpoint_timestamp_seconds")) is not None:
        parts.append(f"saved {(now or time.time()) - saved:.0f} s ago")
    yield "  ".join(parts) if parts else "no page answers: from the files alone"
    yield ""
    room = max(10, width - 30)
    for name, title, form in (
        ("loss", "loss", ".4f"),
        ("images_per_second", "images/s", ",.0f"),
        ("top1", "validation top-1", ".2%"),
    ):
        points = [value for _, value in view.history[name]]
        if points:
            yield f"{title:<16} {format(points[-1], form):>10}  {draw_sparkline(points, room)}"
    spent = view.compute_increase("phase_seconds_sum", "phase")
    if whole := sum(spent.values()):
        yield ""
        for phase in Phase:
            if phase in spent:
                share = spent[phase] / whole
                yield f"{phase:<16} {share:>10.1%}  {'█' * round(share * room)}".rstrip()
    if problems := find_problems(view, now or time.time()):
        yield ""
        yield from (f"! {problem}"[:width] for problem in problems)
