"""The command line. Heavy packages are imported by the commands that need them."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distrain import __version__
from distrain.cli.data import (
    index_images,
    inspect_dataset,
    pack_images,
    print_color_stats,
    verify_images,
)
from distrain.cli.jobs import (
    drain_host,
    list_jobs,
    resume_run,
    show_logs,
    stop_job,
    submit_job,
)
from distrain.errors import RunError, UserError

if TYPE_CHECKING:
    from distrain.config import Config
    from distrain.launch.allocation import Allocation, ClusterNode
    from distrain.monitor.sinks import Console
    from distrain.train import Summary


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Data-parallel AlexNet training whose result does not depend on the cluster.",
)


def main() -> None:
    """Run a command; what the user can mend is one sentence on stderr."""
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    except (
        BrokenPipeError
    ):  # whoever read our output has gone: nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        sys.stderr.write(
            f"error: {error}: check the path, its permissions and the space left\n"
        )
        raise SystemExit(1) from None


bench_app = typer.Typer(
    no_args_is_help=True, help="Measure parts of the machine and of distrain."
)
app.add_typer(bench_app, name="bench")


@app.callback(invoke_without_command=True)
def show_version(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.")
    ] = False,
) -> None:
    """Nothing but --version."""
    if version:
        typer.echo(f"distrain {__version__}")
        raise typer.Exit


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings.")
    ] = None,
    must_resume: Annotated[
        bool,
        typer.Option("--resume", help="Insist on a checkpoint; one is used anyway."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the config and what it comes to.")
    ] = False,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="auto|N|MIN-MAX",
            help="Ranks: on this machine unless --address. auto: one per GPU.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="auto|HOST:PORT|ray://HOST:PORT", help="Ray cluster to train on."
        ),
    ] = None,
    accept_other_hardware: Annotated[
        bool,
        typer.Option(
            "--accept-other-hardware",
            help="Resume where the hardware computes other bits.",
        ),
    ] = False,
) -> None:
    """Train on this machine, on all its GPUs or its CPU cores, or on the workers of a Ray cluster.

    The run directory is runs/<recipe>, or run=...; a run that was stopped goes on from its newest checkpoint.
    """
    from distrain.config import format_workers_override, load_config

    if (wanted := os.environ.get("DISTRAIN_VERSION", __version__)) != __version__:
        raise UserError(
            f"the job was submitted by distrain {wanted}, and its image has {__version__}: use an image of {wanted}, "
            f"or submit with {__version__}"
        )
    settings = load_config(
        config, [*(overrides or []), *format_workers_override(workers)]
    )
    if dry_run:
        _print_dry_run(settings, address)
        return
    from distrain.data.storage.store import Store
    from distrain.launch.local import count_local_ranks
    from distrain.monitor.consoles import LogFileConsole
    from distrain.monitor.terminal import create_console

    options = {
        "must_resume": must_resume,
        "accept_other_hardware": accept_other_hardware,
    }
    with LogFileConsole(create_console(), Store(str(settings.run))) as console:
        if (
            address is not None
            or workers not in (None, "auto")
            or count_local_ranks(settings) > 1
        ):
            from distrain.launch.ray_driver import train_on_ray as run_on_ray

            summary, signal_number = run_on_ray(
                settings, console, address=address, **options
            )
        else:
            from distrain.launch.local import train_locally as run_here

            summary, signal_number = run_here(settings, console, **options)
        flags = [f"--workers={workers}"] * (workers is not None) + [
            f"--address={address}"
        ] * (address is not None)
        _print_summary(console, summary, [str(config), *(overrides or []), *flags])
    if signal_number is not None:
        raise SystemExit(128 + signal_number)


@app.command("lr")
def show_lr(
    config: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Images to train on; without, those of the data set."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Draw into this file instead.")
    ] = None,
) -> None:
    """Draw the learning rate over the run."""
    from distrain.cli.dry_run import compute_lr_curve, plot_lr_curve
    from distrain.config import load_config

    settings = load_config(config, overrides or [])
    if settings.schedule.follows_validation:
        typer.echo(
            f"{settings.schedule.name}: it will drop when validation stalls, which is not known ahead"
        )
    if png is not None:
        plot_lr_curve(settings, compute_lr_curve(settings, 2000, images), png)
        return
    curve = compute_lr_curve(settings, 24, images)
    highest = max(rate for _, _, rate in curve)
    typer.echo(f"{'step':>9} {'epoch':>7} {'rate':>10}")
    for step, epoch, rate in curve:
        typer.echo(
            f"{step:>9,} {epoch:>7.2f} {rate:>10.4g} {'#' * round(48 * rate / highest)}".rstrip()
        )


@app.command("model")
def show_model(
    name: Annotated[
        str,
        typer.Argument(
            help="alexnet, alexnet2012, alexnet_bn, torchvision:NAME, package:callable."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings.")
    ] = None,
    classes: Annotated[
        int, typer.Option(min=1, help="Classes that the network tells apart.")
    ] = 1000,
) -> None:
    """Print the layers of a network: output shapes, parameters, multiply-accumulates, and the share of each.

    Settings are those of a config's model and augment: model.width=0.5, augment.crop=227.
    """
    from distrain.cli.model import make_model_table_config
    from distrain.models.summary import format_layer_table

    wanted = make_model_table_config(name, overrides or [])
    for line in format_layer_table(
        wanted.model.build_skeleton(classes), wanted.augment.crop
    ):
        typer.echo(line)


@app.command("top")
def watch_run(
    run: Annotated[
        str,
        typer.Argument(
            help="Run directory (path or URL), or the URL of a metrics page."
        ),
    ],
    every: Annotated[
        float, typer.Option(min=0.2, help="Seconds between two looks.")
    ] = 2.0,
) -> None:
    """Watch a run: loss, speed, phases, warnings. Without a terminal, one look.

    Ctrl-C ends the view, not the run.
    """
    import time

    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.text import Text

    from distrain.monitor.top import RunWatcher, render_lines

    watch, console = RunWatcher(run), RichConsole(highlight=False)
    if not console.is_terminal:
        for line in render_lines(watch.refresh_view(), 80):
            typer.echo(line)
        return

    def render_view() -> Text:
        return Text(
            "\n".join(render_lines(watch.refresh_view(), console.width)),
            no_wrap=True,
            overflow="crop",
        )

    try:
        with Live(render_view(), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(render_view(), refresh=True)
    except KeyboardInterrupt:
        return


_COMMANDS: dict[str, Callable[..., None]] = {
    "submit": submit_job,
    "jobs": list_jobs,
    "logs": show_logs,
    "stop": stop_job,
    "resume": resume_run,
    "drain": drain_host,
    "pack": pack_images,
    "index": index_images,
    "stats": print_color_stats,
    "verify": verify_images,
    "inspect": inspect_dataset,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


@bench_app.command("data")
def bench_data(
    url: Annotated[str, typer.Argument(help="Packed data set (path or URL).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings.")
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, help="Images of each of five rounds.")
    ] = 2048,
) -> None:
    """Time the loader alone, beside the bare decode of the same files.

    Settings are those of a config's data and augment, global_batch and device: data.backend=torch, augment.crop=64.
    """
    from distrain.cli.bench import make_bench_config, measure_loader

    found = measure_loader(make_bench_config(url, overrides or []), images)
    typer.echo(
        f"{found.images_per_round:,} images a round, batches of {found.batch_size}, {found.num_threads} threads, medians of 5"
    )
    limit = found.throughputs[1] if len(found.throughputs) > 1 else None
    for rate in found.throughputs:
        times = (
            f", {rate.cpu_ms_per_image / limit.cpu_ms_per_image:.2f} x the bare decode"
            if limit and rate is not limit
            else ""
        )
        speed = f"{rate.images_per_second:8,.0f} images/s {rate.cpu_ms_per_image:7.3f} CPU-ms"
        typer.echo(f"{rate.name:<19} {speed}{times}")
    typer.echo(f"first batch after {found.seconds_to_first_batch:.2f} s")


def _print_dry_run(config: "Config", address: str | None) -> None:
    """Print a config and what it comes to, here or on a Ray cluster."""
    from distrain.cli.dry_run import describe_run
    from distrain.config import to_yaml
    from distrain.launch.allocation import choose_num_workers, describe_allocation

    share, nodes = _get_allocation(config, address)
    taken = describe_allocation(config, share, nodes, is_elastic=address is not None)
    typer.echo(to_yaml(config))
    for name, value in {
        **describe_run(config, choose_num_workers(share, nodes)),
        **taken,
    }.items():
        typer.echo(f"{name + ':':<24} {value}")


def _get_allocation(
    config: "Config", address: str | None
) -> "tuple[Allocation, list[ClusterNode]]":
    """Count the workers that a run would have on a Ray cluster, or on this machine; return the nodes too."""
    if address is None:
        from distrain.launch.local import compute_local_allocation

        return compute_local_allocation(config)
    from distrain.launch.allocation import compute_allocation
    from distrain.launch.ray_cluster import fetch_cluster_nodes
    from distrain.monitor.sinks import SilentConsole

    nodes = fetch_cluster_nodes(address, SilentConsole())
    return compute_allocation(config, nodes), nodes


def _print_summary(
    console: "Console", summary: "Summary", command_arguments: list[str]
) -> None:
    """The closing lines."""
    if summary.status == "already finished":
        console.log(
            f"{summary.run} is finished: all {summary.steps} steps are done. "
            "To start afresh, name another run directory: run=..."
        )
    elif summary.status == "stopped":
        # Who submitted a job resumes it: see cli/jobs.py.
        command = shlex.join(["distrain", "train", *command_arguments])
        to_go_on = "" if "DISTRAIN_CONSOLE" in os.environ else f"; to go on: {command}"
        console.log(
            f"stopped and saved after step {summary.step} of {summary.steps}{to_go_on}"
        )
    else:
        minutes, seconds = divmod(round(summary.seconds), 60)
        console.log(f"finished {summary.steps} steps in {minutes} min {seconds:02d} s")
    if summary.eval:
        result = summary.eval
        top5 = f", top-5 {result.top5:.2%}" if result.classes > 5 else ""
        console.log(
            f"validation: top-1 {result.top1:.2%}{top5} of {result.samples:,} images"
        )
    console.log(f"weights   {summary.weights[:16]}  ({summary.reduction} reduction)")
    console.log(f"run       {summary.run}")
