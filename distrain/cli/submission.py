"""Submission of a run to a Ray cluster, to Kubernetes (KubeRay) or to Slurm."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from distrain.cli.options import Platform
from distrain.errors import UserError

if TYPE_CHECKING:
    from distrain.config import Config
    from distrain.launch.kuberay import JobManifests
    from distrain.launch.ray_jobs import JobInfo, RayJobClient

_EXAMPLE_TEMPLATES = {
    "kuberay": "cluster/kuberay/rayjob.yaml",
    "slurm": "cluster/slurm/train.sbatch",
}


class JobSpec(NamedTuple):
    """A run to start as a job."""

    config: "Config"
    files: list[Path]
    """Python files and folders that the run imports from."""
    job_id: str | None
    """None: derived from the run."""
    must_resume: bool
    """Fail if there is no checkpoint."""


class Destination(NamedTuple):
    """System that runs the job."""

    platform: Platform
    address: str
    """Dashboard of the Ray cluster's head."""
    template: Path | None
    """The site's manifest (kuberay) or script (slurm)."""
    namespace: str | None
    """Kubernetes namespace."""


def submit_to_destination(
    spec: JobSpec, destination: Destination, follow: bool, dry_run: bool
) -> None:
    """Submit a job, or print what would be sent if `dry_run`.

    Raises:
        UserError: options contradict each other, or the destination rejects the job.
    """
    if destination.platform == "ray":
        _submit_to_ray(spec, destination.address, follow, dry_run)
        return

    # KubeRay and Slurm fill the run into the site's own template, and have their own
    # tools to follow a job.
    if destination.template is None:
        raise UserError(
            f"--to {destination.platform} needs --template: a copy of "
            f"{_EXAMPLE_TEMPLATES[destination.platform]} from distrain's repository, "
            "adapted to your site"
        )
    if follow and not dry_run:
        raise UserError(
            f"--to {destination.platform} does not support --follow: submit without "
            f"it, then watch with distrain top {spec.config.run}"
        )
    if destination.platform == "kuberay":
        _submit_to_kuberay(spec, destination.template, destination.namespace, dry_run)
    else:
        _submit_to_slurm(spec, destination.template, dry_run)


def _submit_to_ray(spec: JobSpec, address: str, follow: bool, dry_run: bool) -> None:
    from distrain.launch.job_request import build_job_request

    request = build_job_request(
        spec.config, spec.files, job_id=spec.job_id, must_resume=spec.must_resume
    )
    # Needs no cluster.
    if dry_run:
        for line in request.format_lines():
            typer.echo(line)
        return
    client = connect_client(address)
    job_id, is_new = client.submit_job(request)
    typer.echo(f"job {job_id} {_describe_submission(is_new)}")
    if follow:
        show_job_progress(client, job_id, address)
    else:
        typer.echo(f"to follow it: distrain logs {job_id} -f --address {address}")


def _submit_to_kuberay(
    spec: JobSpec, template: Path, namespace: str | None, dry_run: bool
) -> None:
    from distrain.launch.kuberay import Kubectl, build_manifests

    def render_manifests(job_name: str | None) -> "JobManifests":
        return build_manifests(
            spec.config,
            template,
            spec.files,
            job_name=job_name,
            namespace=namespace,
            must_resume=spec.must_resume,
        )

    manifests = render_manifests(spec.job_id)
    # Needs no cluster.
    if dry_run:
        typer.echo(manifests.to_yaml(), nl=False)
        return

    # Render again under a free name: a RayJob of this run may have ended before.
    kubectl = Kubectl()
    manifests = render_manifests(kubectl.choose_job_name(manifests))
    namespace, is_new = kubectl.submit_job(manifests)

    # The dashboard of the job's own cluster is inside Kubernetes: follow the run by
    # its directory or its pod's log.
    name = manifests.job_name
    typer.echo(f"RayJob {name} in {namespace} {_describe_submission(is_new)}")
    typer.echo(f"to watch it: distrain top {spec.config.run}, or")
    typer.echo(f"  kubectl -n {namespace} logs -f job/{name} | distrain logs -")
    typer.echo(
        f"to stop it: kubectl -n {namespace} delete rayjob {name} "
        "(saves a checkpoint first)"
    )


def _submit_to_slurm(spec: JobSpec, template: Path, dry_run: bool) -> None:
    from distrain.launch.slurm import render_script, submit_script

    script = render_script(
        spec.config,
        template,
        spec.files,
        job_name=spec.job_id,
        must_resume=spec.must_resume,
    )
    # Needs no cluster.
    if dry_run:
        typer.echo(script, nl=False)
        return
    number, is_new = submit_script(script)
    typer.echo(f"Slurm job {number} {_describe_submission(is_new)}")
    typer.echo(f"to watch it: distrain top {spec.config.run}")
    # --batch signals the script only, which ends the run before Ray; without it, Ray
    # would get the signal too.
    typer.echo(
        f"to stop it: scancel --batch --signal=TERM {number} (saves a checkpoint first)"
    )


def _describe_submission(is_new: bool) -> str:
    return "submitted" if is_new else "is already queued or running"


def connect_client(address: str) -> "RayJobClient":
    """Connect to a Ray cluster; what the client logs goes to stderr.

    Raises:
        UserError: the cluster does not answer, or rejects the token.
    """
    from distrain.launch.ray_jobs import RayJobClient

    # Stdout holds results only, which may be piped.
    return RayJobClient(address, log=lambda text: typer.echo(text, err=True))


def show_job_progress(client: "RayJobClient", job_id: str, address: str) -> None:
    """Follow a job until it ends, then exit with the exit code of its run."""
    from distrain.launch.ray_jobs import to_exit_code
    from distrain.monitor.terminal import create_console

    console = create_console()
    # Ctrl-C ends the view, not the job. The console stops first, since its progress
    # bar would overwrite the lines.
    try:
        job = client.follow_job(job_id, console)
    except KeyboardInterrupt:
        console.stop()
        console.log(
            f"the job keeps running; to follow it again: distrain logs {job_id} -f "
            f"--address {address}"
        )
        console.log(f"to stop it: distrain stop {job_id} --address {address}")
        raise SystemExit(130) from None
    console.stop()
    if job.status == "STOPPED":
        console.log(f"job {job_id} was stopped; {format_resume_hint(job, address)}")
    raise SystemExit(to_exit_code(job))


def format_resume_hint(job: "JobInfo", address: str) -> str:
    """Return how to resume a job's run on the same cluster."""
    return f"to resume: distrain resume {job.run} --address {address}"
