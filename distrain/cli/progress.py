"""Progress of work on a data set: a bar on a terminal, a line per tenth elsewhere."""

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from distrain.data.prepare.source import DatasetProgress


class ImageProgress:
    """Context manager that shows images done, images/s, megabytes and the time left."""

    def __init__(self, *, to_stderr: bool = False) -> None:
        """Prepare the bar; the first `update` shows it.

        Args:
            to_stderr: print on stderr, since stdout holds a result that may be piped.
        """
        columns = (
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
        )
        self._progress_bar = Progress(
            *columns,
            console=Console(highlight=False, stderr=to_stderr),
            refresh_per_second=4,
            # Cleared at the end, where the command prints a result instead.
            transient=True,
            expand=True,
        )
        # The number of images is known at the first update only.
        self._task_id = self._progress_bar.add_task("", total=None)
        self._to_stderr = to_stderr
        self._on_terminal = (sys.stderr if to_stderr else sys.stdout).isatty()
        self._stage: str | None = None
        self._started_at = 0.0
        self._initial_done = 0
        self._printed_tenths = 0

    def __enter__(self) -> "ImageProgress":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Without a terminal, rich would print an empty line here.
        if self._on_terminal:
            self._progress_bar.stop()

    def update(self, progress: "DatasetProgress") -> None:
        """Show the progress so far.

        The first call of a stage must come before any work: what it reports as done
        was done by an earlier process and does not count towards images/s.
        """
        if progress.stage != self._stage:
            self._stage = progress.stage
            self._started_at = time.monotonic()
            self._initial_done = progress.done
            self._printed_tenths = 0
            if self._on_terminal:
                self._progress_bar.reset(self._task_id)
                self._progress_bar.start()
        # On the first call, no time has passed.
        seconds = max(time.monotonic() - self._started_at, 1e-9)
        images_per_second = (progress.done - self._initial_done) / seconds
        if self._on_terminal:
            self._update_bar(progress, images_per_second)
        else:
            self._print_tenth(progress, images_per_second)

    def _update_bar(
        self, progress: "DatasetProgress", images_per_second: float
    ) -> None:
        counts = f"{_name_stage(progress)}{progress.done:,}/{progress.total:,} images"
        speed = f"{images_per_second:,.0f}/s{_format_bytes(progress, decimals=0)}"
        self._progress_bar.update(
            self._task_id,
            total=progress.total,
            completed=progress.done,
            description=f"{counts}  {speed}",
        )

    def _print_tenth(
        self, progress: "DatasetProgress", images_per_second: float
    ) -> None:
        # One line per tenth keeps a log file short, however many images there are.
        tenths = 10 * progress.done // max(progress.total, 1)
        if tenths <= self._printed_tenths:
            return
        self._printed_tenths = tenths
        images_left = progress.total - progress.done
        # All of it may have been done by an earlier process, at no rate of ours.
        seconds_left = images_left / images_per_second if images_per_second else 0
        time_left = timedelta(seconds=round(seconds_left))
        stage = _name_stage(progress)
        counts = f"{stage}{progress.done:,} of {progress.total:,} images"
        typer.echo(
            f"{counts}  {images_per_second:,.0f}/s"
            f"{_format_bytes(progress, decimals=1)}  {time_left} left",
            err=self._to_stderr,
        )


def _format_bytes(progress: "DatasetProgress", *, decimals: int) -> str:
    """Return the megabytes so far, where they are counted."""
    if not progress.num_bytes:
        return ""
    return f"  {progress.num_bytes / 1e6:,.{decimals}f} MB"


def _name_stage(progress: "DatasetProgress") -> str:
    return f"{progress.stage}: " if progress.stage else ""
