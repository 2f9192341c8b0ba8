"""Console for a terminal: a progress bar, with lines that stay above it."""

import os
import sys
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from distrain.monitor.consoles import JsonConsole
from distrain.monitor.records import EvalRecord, MetricsRecord
from distrain.monitor.sinks import Console, PlainConsole, format_record


def create_console() -> Console:
    """Return the console that fits the reader of this process's output.

    That is a terminal, a file or pipe, or `distrain submit` on another machine, which
    sets DISTRAIN_CONSOLE=json.
    """
    if os.environ.get("DISTRAIN_CONSOLE") == "json":
        return JsonConsole(sys.stdout)
    return TerminalConsole() if sys.stdout.isatty() else PlainConsole(sys.stdout)


class TerminalConsole:
    """Console with a progress bar."""

    def __init__(self) -> None:
        self._rich_console = RichConsole(highlight=False, soft_wrap=True)
        self._progress_bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn(
                "step {task.completed:.0f}/{task.total:.0f}  {task.fields[numbers]}"
            ),
            TimeRemainingColumn(compact=True),
            console=self._rich_console,
            refresh_per_second=4,
            transient=True,
            expand=True,
        )
        self._task_id: Any = None
        self._num_steps = 0
        self._steps_per_epoch = 1

    def log(self, text: str) -> None:
        """Print a line above the bar."""
        # Messages may hold brackets, which rich would take for markup.
        self._rich_console.print(text, markup=False)

    def start(self, *, step: int, steps: int, steps_per_epoch: int) -> None:
        """Show the bar."""
        self._num_steps = steps
        self._steps_per_epoch = steps_per_epoch
        # A run that resumes after the loss of a rank starts again: replace its bar.
        if self._task_id is not None:
            self._progress_bar.remove_task(self._task_id)
        self._task_id = self._progress_bar.add_task(
            "train",
            total=steps,
            completed=step,
            epoch=step // steps_per_epoch,
            numbers="starting",
        )
        self._progress_bar.start()

    def set_step(self, step: int) -> None:
        """Advance the bar, if training has started."""
        if self._task_id is not None:
            self._progress_bar.update(
                self._task_id, completed=step, epoch=(step - 1) // self._steps_per_epoch
            )

    def log_metrics(self, record: MetricsRecord) -> None:
        """Show numbers of training beside the bar, and of an evaluation above it.

        Without a bar, since a log is shown from its middle, each record is a line.
        """
        if isinstance(record, EvalRecord) or self._task_id is None:
            self.log(format_record(record, self._num_steps))
            return
        speed = f"{record.images_per_second:.0f} images/s"
        numbers = f"loss {record.loss:.3f}  {speed}  waits {record.data_wait:.0%}"
        self._progress_bar.update(self._task_id, numbers=numbers)

    def stop(self) -> None:
        """Remove the bar."""
        self._progress_bar.stop()
