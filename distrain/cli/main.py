"""The command line. Heavy packages are imported by the commands that need them."""

import atexit
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from distrain import __version__
from distrain.cli.after_training import evaluate_models, predict_images
from distrain.cli.data import (
    index_images,
    inspect_dataset,
    pack_images,
    print_color_stats,
    verify_images,
)
from distrain.cli.export import export_model
from distrain.cli.jobs import (
    drain_host,
    list_jobs,
    resume_run,
    show_logs,
    stop_job,
    submit_job,
)
from distrain.cli.options import (
    NO_VALUE,
    DatasetArgument,
    OverridesArgument,
    RecipeArgument,
)
from distrain.cli.reports import compare_runs, report_run
from distrain.cli.train import train
from distrain.data.storage.retry import RefusedError
from distrain.errors import RunError, UserError

# Rows and widest bar of the plot in a terminal of 80 columns.
_LR_TABLE_ROWS = 24
_LR_BAR_WIDTH = 48

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Data-parallel AlexNet training whose result does not depend on the cluster.",
)
bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks.")


def main() -> None:
    """Run a command; print an error that the user can fix as one sentence on stderr.

    Exit code 2: the command, config or data are wrong; 1: the run or the I/O failed.
    """
    # Ctrl-C while the interpreter shuts down would print a traceback of its own.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    # The store's sentence says what to set: credentials, region, bucket.
    except RefusedError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    # Before OSError, its base class: the reader of our output (`| head`) has exited.
    except BrokenPipeError:
        # Python flushes stdout at exit, which would raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        sys.stderr.write(f"error: {_explain_os_error(error)}\n")
        raise SystemExit(1) from None


def _explain_os_error(error: OSError) -> str:
    # Without a number it is not the system's own, but of an object store: a sentence.
    if error.strerror is None:
        return str(error)
    # Python's own text starts with the number, and has the file last.
    place = f"{error.filename}: " if error.filename else ""
    remedy = "check the path, its permissions and the free space"
    return f"{place}{error.strerror}: {remedy}"


@app.callback(invoke_without_command=True)
def show_version(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", metavar=NO_VALUE),
    ] = False,
) -> None:
    """Print the version if --version is given."""
    if version:
        typer.echo(f"distrain {__version__}")
        raise typer.Exit


def show_lr(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of training images.",
            show_default="those of the data set",
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Plot into this image file instead of the terminal."),
    ] = None,
) -> None:
    """Plot the learning rate over a run."""
    from distrain.config import load_config
    from distrain.training.lr_curve import lr

    config = load_config(recipe, overrides or [])
    if config.schedule.follows_validation:
        typer.echo(
            f"{config.schedule.name}: drops depend on validation and cannot be shown "
            "in advance"
        )
    # Plot into a file.
    if png is not None:
        lr(config, images=images, png=png)
        typer.echo(f"wrote {png}")
        return

    # Or print a table with a bar per row.
    curve = lr(config, images=images, points=_LR_TABLE_ROWS)
    highest = max(point.lr for point in curve)
    typer.echo(f"{'step':>9} {'epoch':>7} {'rate':>10}")
    for step, epoch, rate in curve:
        bar = "#" * round(_LR_BAR_WIDTH * rate / highest)
        typer.echo(f"{step:>9,} {epoch:>7.2f} {rate:>10.4g} {bar}".rstrip())


def show_model(
    name: Annotated[
        str,
        typer.Argument(
            help="alexnet, alexnet2012, alexnet_bn, torchvision:NAME or "
            "package:callable"
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="key.sub=value",
            help="Config overrides of the sections model and augment, e.g. "
            "model.width=0.5 augment.crop=227",
        ),
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Number of classes.")] = 1000,
) -> None:
    """Print a model's layers: output shapes, parameters and multiply-accumulates.

    Each layer's share of all parameters and of all multiply-accumulates is in %.
    """
    from distrain.models.summary import format_layer_table
    from distrain.training.model_table import model

    for line in format_layer_table(model(name, overrides or [], classes=classes)):
        typer.echo(line)


def print_schema() -> None:
    """Print the JSON Schema of recipes, for completion and checks in editors."""
    from distrain.config_schema import schema

    typer.echo(json.dumps(schema(), indent=2))


def watch_run(
    run: Annotated[
        str,
        typer.Argument(help="Run directory (path or URL), or URL of a metrics page."),
    ],
    every: Annotated[
        float, typer.Option(min=0.2, help="Refresh interval, seconds.")
    ] = 2.0,
) -> None:
    """Watch a run: loss, speed, phases and warnings.

    Prints once if stdout is not a terminal. Ctrl-C ends the view, not the run.
    """
    import time

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from distrain.monitor.top import RunWatcher, render_lines, top

    console = Console(highlight=False)
    if not console.is_terminal:
        for line in top(run):
            typer.echo(line)
        return

    watcher = RunWatcher(run)

    def render_view() -> Text:
        # The width is read each time: the terminal may be resized.
        lines = render_lines(watcher.refresh_view(), console.width)
        return Text("\n".join(lines), no_wrap=True, overflow="crop")

    try:
        # Refreshed below only: rich's own thread would redraw an unchanged view.
        with Live(render_view(), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(render_view(), refresh=True)
    except KeyboardInterrupt:
        return


def print_data_bench(
    url: DatasetArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="key.sub=value",
            help="Config overrides of data, augment, global_batch and device, e.g. "
            "data.backend=torch augment.crop=64",
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, help="Images per round; there are five rounds.")
    ] = 2048,
) -> None:
    """Time the data loader alone, next to a bare decode of the same files."""
    from distrain.training.bench_data import bench_data, format_bench_result

    result = bench_data(url, overrides or [], images=images)
    for line in format_bench_result(result):
        typer.echo(line)


# In the order in which --help lists them.
_COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Data": {
        "pack": pack_images,
        "index": index_images,
        "stats": print_color_stats,
        "verify": verify_images,
        "inspect": inspect_dataset,
    },
    "Train": {
        "train": train,
        "lr": show_lr,
        "model": show_model,
        "schema": print_schema,
        "top": watch_run,
    },
    "After training": {
        "eval": evaluate_models,
        "predict": predict_images,
        "report": report_run,
        "compare": compare_runs,
        "export": export_model,
    },
    "Cluster": {
        "submit": submit_job,
        "jobs": list_jobs,
        "logs": show_logs,
        "stop": stop_job,
        "resume": resume_run,
        "drain": drain_host,
    },
}
for _panel, _commands in _COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)

app.add_typer(bench_app, name="bench", rich_help_panel="Train")
bench_app.command("data")(print_data_bench)
