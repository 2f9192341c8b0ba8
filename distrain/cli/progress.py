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
    from distrain.data.prepare.source import Progress as Done


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
        self._bar = Progress(
            *columns, console=console, refresh_per_second=4, transient=True, expand=True
        )
        self._task = self._bar.add_task("", total=None)
        self._on_terminal = sys.stdout.isatty()
        self._began: float | None = None
        self._first = 0
        self._tenths = 0

    def __enter__(self) -> "ImageProgress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._on_terminal:  # elsewhere rich would end with an empty line
            self._bar.stop()

    def update(self, now: "Done") -> None:
        """Show what is done by now; the first update is what was done before this process began."""
        if self._began is None:
            self._began, self._first = time.monotonic(), now.done
            if self._on_terminal:
                self._bar.start()
        rate = (now.done - self._first) / max(time.monotonic() - self._began, 1e-9)
        if self._on_terminal:
            text = f"{now.done:,}/{now.total:,} images  {rate:,.0f}/s  {now.bytes / 1e6:,.0f} MB"
            self._bar.update(
                self._task, total=now.total, completed=now.done, description=text
            )
            return
        tenths = 10 * now.done // max(now.total, 1)
        if tenths > self._tenths:
            self._tenths = tenths
            left = timedelta(
                seconds=round((now.total - now.done) / rate if rate else 0)
            )
            done = f"{now.done:,} of {now.total:,} images"
            typer.echo(f"{done}  {rate:,.0f}/s  {now.bytes / 1e6:,.1f} MB  {left} left")
