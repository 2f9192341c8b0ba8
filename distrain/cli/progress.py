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
    from distrain.data.prepare.source import DatasetProgress as Done


class ImageProgress:
    """A context in which `update` shows images done, images per second, megabytes and the time left."""

    def __init__(self) -> None:
        """Prepare the bar; it is shown from the first update on."""
        columns = (
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
        )
        console = Console(highlight=False)
        self._progress_bar = Progress(
            *columns, console=console, refresh_per_second=4, transient=True, expand=True
        )
        self._task_id = self._progress_bar.add_task("", total=None)
        self._on_terminal = sys.stdout.isatty()
        self._started_at: float | None = None
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
        if self._on_terminal:  # elsewhere rich would end with an empty line
            self._progress_bar.stop()

    def update(self, progress: "Done") -> None:
        """Show what is done by now; the first update is what was done before this process began."""
        if self._started_at is None:
            self._started_at, self._initial_done = time.monotonic(), progress.done
            if self._on_terminal:
                self._progress_bar.start()
        rate = (progress.done - self._initial_done) / max(
            time.monotonic() - self._started_at, 1e-9
        )
        if self._on_terminal:
            text = f"{progress.done:,}/{progress.total:,} images  {rate:,.0f}/s  {progress.num_bytes / 1e6:,.0f} MB"
            self._progress_bar.update(
                self._task_id,
                total=progress.total,
                completed=progress.done,
                description=text,
            )
            return
        tenths = 10 * progress.done // max(progress.total, 1)
        if tenths > self._printed_tenths:
            self._printed_tenths = tenths
            left = timedelta(
                seconds=round((progress.total - progress.done) / rate if rate else 0)
            )
            done = f"{progress.done:,} of {progress.total:,} images"
            typer.echo(
                f"{done}  {rate:,.0f}/s  {progress.num_bytes / 1e6:,.1f} MB  {left} left"
            )
