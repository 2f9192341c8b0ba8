"""The commands around jobs on a cluster: submit, jobs, logs, stop, resume."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distrain.errors import UserError

if TYPE_CHECKING:
    from distrain.config import Config
    from distrain.launch.submit import Jobs
    from distrain.monitor.sinks import Console

Address = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="Dashboard of the cluster's head.")
]
LOCAL = "http://127.0.0.1:8265"


def submit(
    config: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings.")] = None,
    address: Address = LOCAL,
    workers: Annotated[str | None, typer.Option(metavar="N|MIN-MAX", help="Ranks.")] = None,
    files: Annotated[
        list[Path] | None, typer.Option("--with", help="Python file or folder to send along, for an own model.")
    ] = None,
    job: Annotated[str | None, typer.Option("--id", help="Id of the job; without, it follows from the run.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show its progress until it ends.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
) -> None:
    """Start a run as a job on a Ray cluster. A run that is at work already is followed, not started twice.

    What is sent: the config, distrain's own source, and what --with names.
    """
    from distrain.config import load, workers_override

    settings = load(config, [*(overrides or []), *workers_override(workers)])
    _submit(settings, files or [], job, address, follow=follow, dry_run=dry_run, must_resume=False)


def resume(
    run: Annotated[str, typer.Argument(help="Run directory, path or URL.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings.")] = None,
    address: Address = LOCAL,
    workers: Annotated[str | None, typer.Option(metavar="N|MIN-MAX", help="Ranks.")] = None,
    files: Annotated[list[Path] | None, typer.Option("--with", help="As for submit.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show its progress until it ends.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
) -> None:
    """Go on with a run, as a job on a Ray cluster, with the config that its directory holds."""
    from distrain.config import parse_yaml, workers_override
    from distrain.data.store import Store

    store = Store(run)
    try:
        text = store.read("config.yaml").decode()
    except FileNotFoundError:
        raise UserError(f"there is no run in {store.name}: it has no config.yaml") from None
    where = f"run={run}"
    settings = parse_yaml(text, f"{store.name}/config.yaml", [where, *(overrides or []), *workers_override(workers)])
    _submit(settings, files or [], None, address, follow=follow, dry_run=dry_run, must_resume=True)


def jobs(address: Address = LOCAL) -> None:
    """List the jobs that distrain has submitted to a cluster."""
    found = _jobs(address).list()
    if not found:
        typer.echo("no jobs")
    for job in found:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started)) if job.started else "-"
        typer.echo(f"{job.id:<32} {job.status:<9} {began:<16} {job.run}")


def logs(
    job: Annotated[str, typer.Argument(help="Id of the job.")],
    address: Address = LOCAL,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Show what a job has told. It stands in log-*.txt of the run directory too, when the cluster is gone."""
    from distrain.monitor.consoles import replay
    from distrain.monitor.sinks import PlainLines

    found = _jobs(address)
    if follow:
        _follow(found, job, address)
        return
    console = PlainLines(sys.stdout)
    for line in found.lines(job):
        replay(line, console)


def stop(
    job: Annotated[str, typer.Argument(help="Id of the job.")],
    address: Address = LOCAL,
) -> None:
    """Have a job save a checkpoint and end."""
    from distrain.monitor.sinks import PlainLines

    console = PlainLines(sys.stdout)
    ended = _jobs(address).stop(job, console)
    console.event(f"{job} {ended.status.lower()}; to go on: distrain resume {ended.run} --address {address}")


def _submit(
    settings: "Config",
    files: list[Path],
    job: str | None,
    address: str,
    *,
    follow: bool,
    dry_run: bool,
    must_resume: bool,
) -> None:
    from distrain.launch.package import request

    wanted = request(settings, files, job=job, must_resume=must_resume)
    if dry_run:
        for line in wanted.lines():
            typer.echo(line)
        return
    found = _jobs(address)
    name, started = found.submit(wanted)
    typer.echo(f"job {name} {'submitted' if started else 'is at work already'}")
    if follow:
        _follow(found, name, address)
    else:
        typer.echo(f"to follow it: distrain logs {name} -f --address {address}")


def _jobs(address: str) -> "Jobs":
    from distrain.launch.submit import Jobs

    return Jobs(address)


def _follow(found: "Jobs", name: str, address: str) -> None:
    from distrain.launch.submit import exit_code
    from distrain.monitor.terminal import person

    console: Console = person()
    try:
        ended = found.follow(name, console)
    except KeyboardInterrupt:
        console.stop()
        console.event(f"the job goes on. To come back: distrain logs {name} -f --address {address}")
        console.event(f"to end it: distrain stop {name} --address {address}")
        raise SystemExit(130) from None
    console.stop()
    if ended.status == "STOPPED":
        console.event(f"job {name} was stopped; to go on: distrain resume {ended.run} --address {address}")
    raise SystemExit(exit_code(ended))
