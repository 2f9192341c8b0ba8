"""Commands for jobs on a cluster: submit, jobs, logs, stop, resume, drain."""

import sys
import time
from typing import Annotated

import typer

from distrain.cli.options import (
    LOCAL_DASHBOARD_URL,
    AddressOption,
    DryRunOption,
    FilesOption,
    FollowOption,
    NamespaceOption,
    OverridesArgument,
    PlatformOption,
    RecipeArgument,
    TemplateOption,
    WorkersOption,
)
from distrain.cli.submission import (
    Destination,
    JobSpec,
    connect_client,
    format_resume_hint,
    show_job_progress,
    submit_to_destination,
)
from distrain.errors import UserError


def submit_job(
    config: RecipeArgument,
    overrides: OverridesArgument = None,
    address: AddressOption = LOCAL_DASHBOARD_URL,
    workers: WorkersOption = None,
    files: FilesOption = None,
    job: Annotated[
        str | None,
        typer.Option("--id", help="Job ID.", show_default="derived from the run"),
    ] = None,
    follow: FollowOption = False,
    dry_run: DryRunOption = False,
    to: PlatformOption = "ray",
    template: TemplateOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Submit a run as a job: to a Ray cluster, Kubernetes (KubeRay) or Slurm.

    A run that is already queued or running is not started twice. A Ray cluster
    receives the config, distrain's own source and what --with names. On
    Kubernetes distrain is in the image; on Slurm it is in this environment,
    which all nodes share.
    """
    from distrain.config import format_workers_override, load_config

    # The files sent along lie side by side on the cluster and can be imported there.
    # Make them importable here too: the config is validated before it is sent.
    sys.path.extend(str(file.absolute().parent) for file in files or [])

    settings = load_config(
        config, [*(overrides or []), *format_workers_override(workers)]
    )
    submit_to_destination(
        JobSpec(settings, files or [], job, False),
        Destination(to, address, template, namespace),
        follow,
        dry_run,
    )


def resume_run(
    run: Annotated[str, typer.Argument(help="Run directory (path or URL).")],
    overrides: OverridesArgument = None,
    address: AddressOption = LOCAL_DASHBOARD_URL,
    workers: WorkersOption = None,
    files: FilesOption = None,
    follow: FollowOption = False,
    dry_run: DryRunOption = False,
    to: PlatformOption = "ray",
    template: TemplateOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Resume a run as a cluster job, from the config in its run directory."""
    from distrain.config import format_workers_override, parse_config_yaml
    from distrain.data.storage.store import Store
    from distrain.rundir.files import CONFIG_FILE

    # Read the run's config.
    store = Store(run)
    try:
        text = store.read(CONFIG_FILE).decode()
    except FileNotFoundError:
        raise UserError(
            f"{store.redacted_url} is not a run directory: it has no config.yaml"
        ) from None

    # The directory may have been moved, or be named differently from this machine:
    # the name given here replaces the one in the config.
    run_override = f"run={run}"
    settings = parse_config_yaml(
        text,
        f"{store.redacted_url}/config.yaml",
        [run_override, *(overrides or []), *format_workers_override(workers)],
    )
    submit_to_destination(
        JobSpec(settings, files or [], None, True),
        Destination(to, address, template, namespace),
        follow,
        dry_run,
    )


def list_jobs(address: AddressOption = LOCAL_DASHBOARD_URL) -> None:
    """List the jobs that distrain has submitted to a Ray cluster."""
    jobs = connect_client(address).list_jobs()
    if not jobs:
        typer.echo("no jobs")
    for job in jobs:
        started_at = "-"
        # 0 if Ray does not report it.
        if job.start_time:
            local_time = time.localtime(job.start_time)
            started_at = time.strftime("%Y-%m-%d %H:%M", local_time)
        typer.echo(f"{job.id:<32} {job.status:<9} {started_at:<16} {job.run}")


def show_logs(
    job: Annotated[
        str,
        typer.Argument(
            help="Job ID, or - for a log on stdin, e.g. piped from kubectl logs."
        ),
    ],
    address: AddressOption = LOCAL_DASHBOARD_URL,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Follow the log until the job ends."),
    ] = False,
) -> None:
    """Print a job's log (also kept as log-*.txt in the run directory)."""
    from distrain.monitor.consoles import replay_line
    from distrain.monitor.sinks import PlainConsole
    from distrain.monitor.terminal import create_console

    # A job logs JSON lines; replay them on a console as if it ran here.
    if job == "-":
        stdin_console = create_console()
        for line in sys.stdin:
            replay_line(line.rstrip("\n"), stdin_console)
        stdin_console.stop()
        return
    client = connect_client(address)
    if follow:
        show_job_progress(client, job, address)
        return
    # No progress bar: these lines are history.
    plain_console = PlainConsole(sys.stdout)
    for line in client.read_log_lines(job):
        replay_line(line, plain_console)


def stop_job(
    job: Annotated[str, typer.Argument(help="Job ID.")],
    address: AddressOption = LOCAL_DASHBOARD_URL,
) -> None:
    """Checkpoint and stop a job."""
    from distrain.monitor.sinks import PlainConsole

    console = PlainConsole(sys.stdout)
    ended_job = connect_client(address).stop_job(job, console)
    status = ended_job.status.lower()
    console.log(f"{job} {status}; {format_resume_hint(ended_job, address)}")


def drain_host(
    seconds: Annotated[
        float, typer.Option(min=1, help="Give up after this many seconds.")
    ] = 240.0,
) -> None:
    """Drain this Ray node: its runs checkpoint and continue on the other nodes.

    On the head node, runs checkpoint and end. Meant for whatever removes nodes,
    such as the pre-stop hook of a pod or a service manager.
    """
    from distrain.launch.drain import drain_ray_host
    from distrain.monitor.sinks import PlainConsole

    drain_ray_host(PlainConsole(sys.stdout), timeout_seconds=seconds)
