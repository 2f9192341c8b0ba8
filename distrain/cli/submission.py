"""Print the result of a submission, and how to follow, stop and resume the job."""

from typing import TYPE_CHECKING, NoReturn

import typer

from distrain.errors import UserError

if TYPE_CHECKING:
    from distrain.launch.jobs import Platform, Submission
    from distrain.launch.ray_jobs import JobInfo


def log_to_stderr(line: str) -> None:
    """Print a line on stderr: stdout holds results only, which may be piped."""
    typer.echo(line, err=True)


def check_follow(to: "Platform", run: str | None, follow: bool) -> None:
    """Raise UserError if a job cannot be followed: only Ray streams its log here."""
    if follow and to != "ray":
        raise UserError(
            f"--to {to} does not support --follow: submit without it, then watch with "
            f"distrain top {run}"
        )


def print_submission(
    submission: "Submission",
    to: "Platform",
    address: str | None,
    run: str,
    follow: bool,
) -> None:
    """Print what was submitted and how to watch and stop it; follow it if asked to.

    Args:
        submission: the result of `submit` or `resume`.
        to: where it was submitted.
        address: URL of the Ray dashboard, as given.
        run: run directory.
        follow: follow the job until it ends, then exit with the run's exit code.
    """
    if submission.status == "dry_run":
        typer.echo(submission.text, nl=False)
        return
    is_new = submission.status == "submitted"
    outcome = "submitted" if is_new else "is already queued or running"
    job = submission.id
    if to == "ray":
        typer.echo(f"job {job} {outcome}")
        assert job is not None
        if follow:
            exit_with_job(follow_job(job, address), address)
        typer.echo(f"to follow it: distrain logs {job} -f{_format_address(address)}")
    elif to == "kuberay":
        # The dashboard of the job's own cluster is inside Kubernetes: follow the run by
        # its directory or its pod's log.
        namespace = submission.namespace
        typer.echo(f"RayJob {job} in {namespace} {outcome}")
        typer.echo(f"to watch it: distrain top {run}, or")
        typer.echo(f"  kubectl -n {namespace} logs -f job/{job} | distrain logs -")
        typer.echo(
            f"to stop it: kubectl -n {namespace} delete rayjob {job} "
            "(saves a checkpoint first)"
        )
    else:
        typer.echo(f"Slurm job {job} {outcome}")
        typer.echo(f"to watch it: distrain top {run}")
        # --batch signals the script only, which ends the run before Ray; without it,
        # Ray would get the signal too.
        typer.echo(
            f"to stop it: scancel --batch --signal=TERM {job} "
            "(saves a checkpoint first)"
        )


def follow_job(job: str, address: str | None) -> "JobInfo":
    """Follow a job until it ends. Ctrl-C ends the view, not the job: then exit."""
    from distrain.launch.jobs import logs

    try:
        return logs(job, address, follow=True, log=log_to_stderr)
    except KeyboardInterrupt:
        option = _format_address(address)
        typer.echo(
            f"the job keeps running; to follow it again: distrain logs {job} -f{option}"
        )
        typer.echo(f"to stop it: distrain stop {job}{option}")
        raise SystemExit(130) from None


def exit_with_job(job: "JobInfo", address: str | None) -> NoReturn:
    """Exit with the exit code of a job's run; first say how to resume a stopped one."""
    from distrain.launch.ray_jobs import to_exit_code

    if job.status == "STOPPED":
        typer.echo(f"job {job.id} was stopped; {format_resume_hint(job, address)}")
    raise SystemExit(to_exit_code(job))


def format_resume_hint(job: "JobInfo", address: str | None) -> str:
    """Return how to resume a job's run on the same cluster."""
    return f"to resume: distrain resume {job.run}{_format_address(address)}"


def _format_address(address: str | None) -> str:
    """Return the option for the address of the dashboard, as it was found."""
    from distrain.launch.jobs import get_dashboard_url

    return f" --address {get_dashboard_url(address)}"
