"""Live view of a run in the terminal, from its metrics pages and its run directory."""

import json
import math
import textwrap
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from distrain.data.storage.proxies import read_url
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.monitor.phases import Phase
from distrain.monitor.prometheus import to_run_label
from distrain.monitor.records import MetricsRecord, TrainRecord
from distrain.monitor.run_state import RunState, read_run_state
from distrain.monitor.sinks import read_metrics
from distrain.rundir import files

_SPARK_BLOCKS = "▁▂▃▄▅▆▇█"
# Points of a curve that are kept.
_MAX_POINTS = 512
# Limits from which a problem is reported.
_MAX_IDLE_SECONDS = 60.0
_MAX_WAITING_RATIO = 0.3
_STRAGGLER_RATIO = 1.25

LabelPairs = tuple[tuple[str, str], ...]


@dataclass
class RunView:
    """Snapshot of a run: the last samples of its pages, and its history."""

    run: str
    """Run directory without credentials, or URL of a page."""
    samples: dict[tuple[str, LabelPairs], float] = field(default_factory=dict)
    """Values by name and labels, without the label `run`."""
    previous_samples: dict[tuple[str, LabelPairs], float] = field(default_factory=dict)
    """Samples of the refresh before."""
    history: dict[str, deque[tuple[int, float]]] = field(
        default_factory=lambda: defaultdict(_create_history)
    )
    """Points (step, value) by name: loss, images_per_second, top1."""
    silent_pages: list[str] = field(default_factory=list)
    """URLs of the pages that do not answer."""
    state: RunState | None = None
    """As the run directory shows it; None without one."""

    def get_value(self, name: str, **labels: str) -> float | None:
        """Return a sample that has these labels, whatever its others; None without one.

        Args:
            name: of the metric, without the prefix `distrain_`.
            **labels: that it must have.
        """
        required_labels = set(labels.items())
        for (sample_name, sample_labels), value in self.samples.items():
            has_labels = required_labels <= set(sample_labels)
            if sample_name == f"distrain_{name}" and has_labels:
                return value
        return None

    def compute_increase(self, name: str, label: str) -> dict[str, float]:
        """Return the increase of a counter or sum since the refresh before.

        At the first refresh it is the whole value.

        Args:
            name: of the sample, without the prefix `distrain_`.
            label: whose values are the keys of the result.
        """
        increases: dict[str, float] = defaultdict(float)
        for key, value in self.samples.items():
            sample_name, sample_labels = key
            if sample_name != f"distrain_{name}":
                continue
            previous_value = self.previous_samples.get(key, 0.0)
            # A counter that is lower than before has started again from 0.
            if previous_value > value:
                previous_value = 0.0
            increases[dict(sample_labels)[label]] += value - previous_value
        return dict(increases)


def _create_history() -> deque[tuple[int, float]]:
    return deque(maxlen=_MAX_POINTS)


def top(run: str | Path, *, width: int = 80) -> list[str]:
    """Return the lines that `distrain top` prints.

    They show loss, speed, phases and warnings of a run.

    Args:
        run: run directory (path or URL), or URL of a metrics page.
        width: columns that curves and bars fill.

    Raises:
        UserError: there is no run, or no metrics page answers at the URL.
    """
    view = RunWatcher(str(run)).refresh_view()
    # Without a run directory, the page is all that there is.
    if view.state is None and view.silent_pages:
        raise UserError(f"no metrics page answers at {view.silent_pages[0]}")
    return list(render_lines(view, width))


class RunWatcher:
    """Reader of a run's pages and files, again and again."""

    def __init__(self, location: str) -> None:
        """Find the run.

        Args:
            location: a run directory (path or URL), or the URL of a metrics page.

        Raises:
            UserError: there is no run.
        """
        self._store: Store | None = None
        self._page_urls: list[str] = []
        if location.startswith(("http://", "https://")):
            has_path = location.endswith("/metrics")
            url = location if has_path else f"{location.rstrip('/')}/metrics"
            self._page_urls = [url]
            self.view = RunView(location)
            return
        self._store = Store(location)
        if not self._store.exists(files.CONFIG_FILE):
            raise UserError(
                f"{self._store.redacted_url} is not a run directory: give one, "
                "or the URL of a metrics page"
            )
        self.view = RunView(self._store.redacted_url)

    def refresh_view(self) -> RunView:
        """Read the pages and files again, and return the updated view."""
        view = self.view
        # The run directory first: the addresses of the pages change with the nodes.
        if self._store is not None:
            view.state = read_run_state(self._store)
            self._page_urls = _read_targets(self._store)
            for record in read_metrics(self._store)[-_MAX_POINTS:]:
                self._append_record(record)

        # Read the pages.
        run = to_run_label(self._store.url) if self._store else None
        view.previous_samples = view.samples
        view.samples = {}
        view.silent_pages = []
        for url in self._page_urls:
            try:
                page = read_url(url, timeout_seconds=2.0).decode()
                _add_page_samples(view.samples, page, run)
            except (OSError, ValueError):
                view.silent_pages.append(url)

        # Without a run directory, the history is what the pages have shown.
        if self._store is None:
            self._append_gauges()
        return view

    def _append_record(self, record: MetricsRecord) -> None:
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

    def _append_gauges(self) -> None:
        view = self.view
        step = int(view.get_value("step") or 0)
        values = {
            "loss": view.get_value("loss", split="train"),
            "images_per_second": view.get_value("images_per_second"),
            "top1": view.get_value("top1_ratio", split="val"),
        }
        for name, value in values.items():
            if value is not None:
                _append_point(view.history[name], step, value)


def _append_point(points: deque[tuple[int, float]], step: int, value: float) -> None:
    """Append a point, unless there is one of that step or a later one."""
    if not points or step > points[-1][0]:
        points.append((step, value))


def _read_targets(store: Store) -> list[str]:
    """Return the URLs of a run's pages; none if its file is missing or invalid."""
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
    """Add the samples of a page to those of other pages, or of one run only.

    Args:
        samples: changed in place; gauges replace earlier ones, the rest is summed.
        page: its text.
        run: label of the run, if it is known: by now, the port may be that of another
            run.
    """
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if run is not None and sample.labels.get("run") != run:
                continue
            labels = {k: v for k, v in sample.labels.items() if k != "run"}
            key = sample.name, tuple(sorted(labels.items()))
            if family.type == "gauge":
                samples[key] = sample.value
            else:
                samples[key] = samples.get(key, 0.0) + sample.value


def draw_sparkline(values: Sequence[float], width: int) -> str:
    """Return values as a row of at most `width` blocks, each the mean of some values.

    Values that are not finite are left out.
    """
    finite_values = [value for value in values if math.isfinite(value)]
    if not finite_values:
        return ""
    # Average equal runs of values, one per block.
    values_per_block = math.ceil(len(finite_values) / width)
    means = []
    for start in range(0, len(finite_values), values_per_block):
        block_values = finite_values[start : start + values_per_block]
        means.append(sum(block_values) / len(block_values))

    # Scale to the range of the means; a constant curve is drawn at half height.
    low = min(means)
    high = max(means)
    heights = [(m - low) / (high - low) if high > low else 0.5 for m in means]
    top_block = len(_SPARK_BLOCKS) - 1
    return "".join(_SPARK_BLOCKS[round(top_block * height)] for height in heights)


def find_problems(view: RunView, now: float) -> list[str]:
    """Return the problems of a run, a sentence for each.

    Args:
        view: of the run.
        now: Unix time.
    """
    problems = []
    if view.state is None or not view.state.has_ended:
        problems += [f"{url} does not answer" for url in view.silent_pages]

    # Problems of the whole run.
    last_progress = view.get_value("last_progress_timestamp_seconds")
    if last_progress is not None and not view.get_value("finished"):
        idle_seconds = now - last_progress
        if idle_seconds > _MAX_IDLE_SECONDS:
            problems.append(f"no progress for {idle_seconds:.0f} s")
    if view.get_value("diverged"):
        problems.append(
            "training has diverged: see not-finite-step-*.json in the run directory"
        )
    if num_bad := view.get_value("bad_samples"):
        limit = view.get_value("bad_samples_limit") or 0
        problems.append(f"{num_bad:.0f} bad samples, of at most {limit:.0f} allowed")
    workers = view.get_value("workers") or 0
    workers_wanted = view.get_value("workers_wanted") or 0
    if workers < workers_wanted:
        problems.append(f"{workers:.0f} of {workers_wanted:.0f} workers")

    # Problems of single ranks.
    waits = view.compute_increase("rank_data_wait_seconds_total", "rank")
    arrivals = view.compute_increase("rank_arrival_seconds_total", "rank")
    return problems + _find_slow_ranks(waits, arrivals)


def _find_slow_ranks(
    waits: Mapping[str, float], arrivals: Mapping[str, float]
) -> list[str]:
    """Return a sentence for each rank that waits for data, and for a straggler.

    Args:
        waits: seconds of waiting for data by rank.
        arrivals: seconds from the start of steps to the all-reduce by rank.
    """
    problems = []
    for rank, arrival in arrivals.items():
        if arrival and waits.get(rank, 0.0) > _MAX_WAITING_RATIO * arrival:
            ratio = waits[rank] / arrival
            problems.append(f"rank {rank} waits for data {ratio:.0%} of its time")
    if len(arrivals) > 1:
        slowest = max(arrivals, key=lambda rank: arrivals[rank])
        # The lower median: of two ranks, the straggler is compared with the other.
        median = sorted(arrivals.values())[(len(arrivals) - 1) // 2]
        if median and arrivals[slowest] > _STRAGGLER_RATIO * median:
            delay = arrivals[slowest] / median - 1
            problems.append(
                f"rank {slowest} reaches the all-reduce {delay:.0%} later "
                "than the median rank"
            )
    return problems


def render_lines(view: RunView, width: int, now: float | None = None) -> Iterable[str]:
    """Yield the view as lines of text.

    Args:
        view: of the run.
        width: columns of the terminal.
        now: Unix time; None: the current one.
    """
    now = now or time.time()
    # Leave room for the name and the value before each curve and bar.
    bar_width = max(10, width - 30)
    yield _render_position(view)
    if view.state is not None:
        yield from textwrap.wrap(view.state.text, width)
    yield _render_status(view, now)
    yield ""
    yield from _render_curves(view, bar_width)
    yield from _render_phases(view, bar_width)
    if problems := find_problems(view, now):
        yield ""
        yield from (f"! {problem}"[:width] for problem in problems)


def _render_position(view: RunView) -> str:
    step = view.get_value("step")
    total_steps = view.get_value("steps_planned")
    # If no page answers, the last record has the step.
    if step is None and view.history["loss"]:
        step = view.history["loss"][-1][0]
    line = f"{view.run}  step {step or 0:.0f}"
    if step is None or not total_steps:
        return line
    return f"{line} of {total_steps:.0f} ({step / total_steps:.0%})"


def _render_status(view: RunView, now: float) -> str:
    parts = []
    if (speed := view.get_value("images_per_second")) is not None:
        parts.append(f"{speed:,.0f} images/s")
    if workers := view.get_value("workers"):
        parts.append(f"{workers:.0f} worker{'s' * (workers > 1)}")
    if restarts := view.get_value("restarts"):
        parts.append(f"{restarts:.0f} restart{'s' * (restarts > 1)}")
    if (lr := view.get_value("learning_rate")) is not None:
        parts.append(f"lr {lr:.3g}")
    if (saved := view.get_value("checkpoint_timestamp_seconds")) is not None:
        parts.append(f"saved {now - saved:.0f} s ago")
    if not parts:
        return "no metrics page answers: all numbers are from the run directory"
    return "  ".join(parts)


def _render_curves(view: RunView, bar_width: int) -> Iterator[str]:
    for name, title, number_format in (
        ("loss", "loss", ".4f"),
        ("images_per_second", "images/s", ",.0f"),
        ("top1", "validation top-1", ".2%"),
    ):
        values = [value for _, value in view.history[name]]
        if values:
            last_value = format(values[-1], number_format)
            sparkline = draw_sparkline(values, bar_width)
            yield f"{title:<16} {last_value:>10}  {sparkline}"


def _render_phases(view: RunView, bar_width: int) -> Iterator[str]:
    """Yield an empty line, and a bar for each phase with its part of the time."""
    seconds = view.compute_increase("phase_seconds_sum", "phase")
    total_seconds = sum(seconds.values())
    if not total_seconds:
        return
    yield ""
    for phase in Phase:
        if phase in seconds:
            ratio = seconds[phase] / total_seconds
            bar = "█" * round(ratio * bar_width)
            yield f"{phase:<16} {ratio:>10.1%}  {bar}".rstrip()
