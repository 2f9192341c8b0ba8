"""Commands for jobs on a cluster: submit, jobs, logs, stop, resume, drain."""

import sys
import time
from typing import Annotated

import typer

from distrain.cli.options import (
    NO_VALUE,
    AddressOption,
    DryRunOption,
    FilesOption,
    FollowOption,
    NamespaceOption,
    OtherHardwareOption,
    OverridesArgument,
    PlatformOption,
    RecipeArgument,
    ResumeOverridesArgument,
    TemplateOption,
    WorkersOption,
)
from distrain.cli.submission import (
    check_follow,
    exit_with_job,
    follow_job,
    format_resume_hint,
    log_to_stderr,
    print_submission,
)


def submit_job(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    address: AddressOption = None,
    workers: WorkersOption = None,
    files: FilesOption = None,
    job: Annotated[
        str | None,
        typer.Option(
            "--id",
            metavar="NAME",
            help="Job ID.",
            show_default="derived from the run",
        ),
    ] = None,
    follow: FollowOption = False,
    dry_run: DryRunOption = False,
    to: PlatformOption = "ray",
    template: TemplateOption = None,
    namespace: NamespaceOption = None,
    accept_other_hardware: OtherHardwareOption = False,
) -> None:
    """Submit a run as a job: to a Ray cluster, Kubernetes (KubeRay) or Slurm.

    A run that is already queued or running is not started twice. A Ray cluster
    receives the config, distrain's own source and what --with names. On
    Kubernetes distrain is in the image; on Slurm it is in this environment,
    which all nodes share.
    """
    from distrain.config import format_workers_override, load_config
    from distrain.launch.jobs import make_importable, submit

    make_importable(files or [])

    config = load_config(
        recipe, [*(overrides or []), *format_workers_override(workers)]
    )
    check_follow(to, config.run, follow and not dry_run)
    submission = submit(
        config,
        to=to,
        address=address,
        files=files or [],
        id=job,
        template=template,
        namespace=namespace,
        accept_other_hardware=accept_other_hardware,
        dry_run=dry_run,
        log=log_to_stderr,
    )
    print_submission(submission, to, address, str(config.run), follow)


def resume_run(
    run: Annotated[str, typer.Argument(help="Run directory (path or URL).")],
    overrides: ResumeOverridesArgument = None,
    address: AddressOption = None,
    workers: WorkersOption = None,
    files: FilesOption = None,
    follow: FollowOption = False,
    dry_run: DryRunOption = False,
    to: PlatformOption = "ray",
    template: TemplateOption = None,
    namespace: NamespaceOption = None,
    accept_other_hardware: OtherHardwareOption = False,
) -> None:
    """Resume a run as a cluster job, from the config in its run directory.

    To resume a run on this machine, repeat its `distrain train` command.
    """
    from distrain.launch.jobs import resume

    check_follow(to, run, follow and not dry_run)
    submission = resume(
        run,
        overrides or [],
        to=to,
        address=address,
        workers=workers,
        files=files or [],
        template=template,
        namespace=namespace,
        accept_other_hardware=accept_other_hardware,
        dry_run=dry_run,
        log=log_to_stderr,
    )
    print_submission(submission, to, address, run, follow)


def list_jobs(address: AddressOption = None) -> None:
    """List the jobs that distrain has submitted to a Ray cluster."""
    from distrain.launch.jobs import jobs

    submitted_jobs = jobs(address, log=log_to_stderr)
    if not submitted_jobs:
        typer.echo("no jobs")
    for job in submitted_jobs:
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
    address: AddressOption = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            "-f",
            help="Follow the log until the job ends.",
            metavar=NO_VALUE,
        ),
    ] = False,
) -> None:
    """Print a job's log (also kept as log-*.txt in the run directory)."""
    # A job logs JSON lines; replay them on a console as if it ran here.
    if job == "-":
        from distrain.monitor.consoles import replay_line
        from distrain.monitor.terminal import create_console

        stdin_console = create_console()
        try:
            for line in sys.stdin:
                replay_line(line.rstrip("\n"), stdin_console)
        # Ctrl-C must not leave a progress bar on the terminal.
        finally:
            stdin_console.stop()
        return
    if follow:
        exit_with_job(follow_job(job, address), address)
    from distrain.launch.jobs import logs

    logs(job, address, log=log_to_stderr)


def stop_job(
    job: Annotated[str, typer.Argument(help="Job ID.")],
    address: AddressOption = None,
) -> None:
    """Checkpoint and stop a job."""
    from distrain.launch.jobs import stop

    ended_job = stop(job, address, log=log_to_stderr)
    text = f"{job} {ended_job.status.lower()}"
    if ended_job.status != "SUCCEEDED":
        text += f"; {format_resume_hint(ended_job, address)}"
    typer.echo(text)


def drain_host(
    seconds: Annotated[
        float, typer.Option(min=1, help="Give up after this many seconds.")
    ] = 240.0,
) -> None:
    """Drain this Ray node: its runs checkpoint and continue on the other nodes.

    On the head node, runs checkpoint and end. Meant for whatever removes nodes,
    such as the pre-stop hook of a pod or a service manager.
    """
    from distrain.launch.drain import drain

    drain(seconds)
