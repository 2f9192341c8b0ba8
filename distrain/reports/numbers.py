"""Final numbers of a run: the same in a report, a comparison and from Python."""

from collections import Counter
from typing import Any, NamedTuple

from distrain.monitor.phases import Phase
from distrain.reports.history import RunHistory


class RunNumbers(NamedTuple):
    """Final numbers of a run, as it logged them; None: it logged none."""

    step: int
    """Last step that was logged, 0 before the first."""
    train_loss: float | None
    """Mean of the last log interval."""
    train_top1: float | None
    val_loss: float | None
    """Of the last evaluation, as the two below."""
    val_top1: float | None
    val_top5: float | None
    best_top1: float | None
    """Highest top-1 of all evaluations."""
    best_step: int | None
    train_seconds: float
    """Time of all logged steps, without evaluations."""
    images_per_second: float | None
    """Mean over that time."""
    data_wait: float | None
    """Fraction of that time that rank 0 waited for data."""
    bad_samples: int
    """Training samples that could not be decoded."""

    def to_rows(self) -> list[tuple[str, str]]:
        """Return name and value of each number, as text."""
        best = format_percent(self.best_top1)
        if self.best_step is not None:
            best += f" at step {self.best_step:,}"
        return [
            ("last logged step", f"{self.step:,}"),
            ("training loss", format_number(self.train_loss)),
            ("training top-1", format_percent(self.train_top1)),
            ("validation loss", format_number(self.val_loss)),
            ("validation top-1", format_percent(self.val_top1)),
            ("validation top-5", format_percent(self.val_top5)),
            ("best validation top-1", best),
            ("time of the logged steps", format_seconds(self.train_seconds)),
            ("images per second", format_number(self.images_per_second, ",.0f")),
            ("waiting for data", format_percent(self.data_wait, 1)),
            ("bad samples", f"{self.bad_samples:,}"),
        ]


def compute_numbers(history: RunHistory) -> RunNumbers:
    """Compute the final numbers of a run from its records."""
    train = history.train[-1] if history.train else None
    last_eval = history.evals[-1] if history.evals else None
    # The first of those that are equal.
    best = max(history.evals, key=lambda record: record.top1, default=None)
    seconds = sum(record.seconds for record in history.train)
    images = sum(r.images_per_second * r.seconds for r in history.train)
    waits = sum(r.data_wait * r.seconds for r in history.train)
    return RunNumbers(
        step=max(_get(train, "step", 0), _get(last_eval, "step", 0)),
        train_loss=_get(train, "loss"),
        train_top1=_get(train, "top1"),
        val_loss=_get(last_eval, "loss"),
        val_top1=_get(last_eval, "top1"),
        val_top5=_get(last_eval, "top5"),
        best_top1=_get(best, "top1"),
        best_step=_get(best, "step"),
        train_seconds=seconds,
        images_per_second=images / seconds if seconds else None,
        data_wait=waits / seconds if seconds else None,
        bad_samples=_get(train, "bad_samples", 0),
    )


class PhaseTime(NamedTuple):
    """Time that a run spent in a phase of its steps, on rank 0."""

    phase: str
    seconds: float
    """Summed over lanes."""
    share: float
    """Of the time of all phases."""


def sum_phases(history: RunHistory) -> list[PhaseTime]:
    """Return the time of each phase that was logged, in the order of a step."""
    totals: Counter[str] = Counter()
    for record in history.train:
        totals.update(record.phase_seconds)
    total = sum(totals.values())
    return [
        PhaseTime(str(phase), totals[phase], totals[phase] / total)
        for phase in Phase
        if totals[phase]
    ]


def format_number(value: float | None, form: str = ".4f") -> str:
    """Return a number as text; a dash if there is none."""
    return "–" if value is None else format(value, form)


def format_percent(fraction: float | None, digits: int = 2) -> str:
    """Return a fraction in %; a dash if there is none."""
    return "–" if fraction is None else f"{fraction:.{digits}%}"


def format_seconds(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    )


def _get(record: Any, name: str, default: Any = None) -> Any:
    return default if record is None else getattr(record, name)
