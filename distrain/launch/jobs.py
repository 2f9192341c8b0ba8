"""The functions behind the commands submit, resume, jobs, logs and stop.

Functions and arguments have the names of the commands and their options.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from distrain.config import (
    Config,
    check_is_config,
    format_workers_override,
    override_config,
    parse_config_yaml,
)
from distrain.data.storage.store import Store
from distrain.data.storage.url import expand_home
from distrain.errors import UserError
from distrain.launch.job_request import build_job_request
from distrain.launch.kuberay import JobManifests, Kubectl, build_manifests
from distrain.launch.ray_jobs import JobInfo, RayJobClient
from distrain.launch.slurm import render_script, submit_script
from distrain.monitor.consoles import replay_line
from distrain.monitor.sinks import Console, PlainConsole
from distrain.monitor.terminal import create_console
from distrain.parsing import check_overrides
from distrain.result_fields import check_result_fields, get_result_fields
from distrain.rundir.files import CONFIG_FILE

Platform = Literal["ray", "kuberay", "slurm"]

_LOCAL_DASHBOARD_URL = "http://127.0.0.1:8265"
_EXAMPLE_TEMPLATES = {
    "kuberay": "cluster/kuberay/rayjob.yaml",
    "slurm": "cluster/slurm/train.sbatch",
}


class Submission(NamedTuple):
    """Result of `submit` and `resume`."""

    status: Literal["submitted", "already_running", "dry_run"]
    id: str | None
    """Ray's submission ID, the name of the RayJob, or the Slurm job ID. None in a dry
    run for Slurm, which assigns the ID only when a job is submitted."""
    text: str
    """The list of files and the request (ray), the manifests, or the script."""
    namespace: str | None = None
    """Kubernetes namespace."""


class _JobSpec(NamedTuple):
    """A run to start as a job."""

    config: Config
    files: Sequence[Path]
    id: str | None
    train_options: Sequence[str]
    """Options of `distrain train`."""
    dry_run: bool


def submit(
    config: Config,
    *,
    to: Platform = "ray",
    address: str | None = None,
    workers: int | str | None = None,
    files: Sequence[str | Path] = (),
    id: str | None = None,
    template: str | Path | None = None,
    namespace: str | None = None,
    accept_other_hardware: bool = False,
    dry_run: bool = False,
    log: Callable[[str], None] | None = None,
) -> Submission:
    """Submit a run as a job: to a Ray cluster, Kubernetes (KubeRay) or Slurm.

    A run that is already queued or running is not started twice.

    Args:
        config: the run; its paths must mean the same on all nodes.
        to: where the job runs.
        address: URL of the Ray dashboard. Default: RAY_API_SERVER_ADDRESS, or this
            machine.
        workers: "auto", N or "MIN-MAX". Default: the config's cluster.workers.
        files: Python files or folders to send along for your own model, loss,
            optimizer or schedule (`--with`).
        id: job ID. Default: derived from the run.
        template: your site's manifest (kuberay) or script (slurm). Default:
            DISTRAIN_TEMPLATE.
        namespace: Kubernetes namespace. Default: the template's, else the
            kubeconfig's.
        accept_other_hardware: resume even if the hardware does not reproduce the
            checkpoint's bits.
        dry_run: send nothing; `text` of the result is what would be sent.
        log: gets a line if the cluster does not answer at once.

    Raises:
        UserError: a path is local to this machine, the template or an argument does
            not fit, or the destination rejects the job.
    """
    check_is_config(config, "submit")
    if workers is not None:
        config = override_config(config, format_workers_override(workers, "workers="))
    paths = _to_paths(files)
    options = ["--accept-other-hardware"] * accept_other_hardware
    spec = _JobSpec(config, paths, id, options, dry_run)
    return _submit_to_platform(spec, to, address, template, namespace, log)


def resume(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    to: Platform = "ray",
    address: str | None = None,
    workers: int | str | None = None,
    files: Sequence[str | Path] = (),
    template: str | Path | None = None,
    namespace: str | None = None,
    accept_other_hardware: bool = False,
    dry_run: bool = False,
    log: Callable[[str], None] | None = None,
) -> Submission:
    """Resume a run as a job, from the config in its run directory.

    Args:
        run: run directory (path or URL).
        overrides: changes to the config, as `key.sub=value`, of what does not decide
            the weights.
        to: see `submit`, as for all that follow.
        address: URL of the Ray dashboard.
        workers: "auto", N or "MIN-MAX".
        files: Python files or folders to send along.
        template: your site's manifest or script.
        namespace: Kubernetes namespace.
        accept_other_hardware: resume even if the bits differ.
        dry_run: send nothing.
        log: gets a line if the cluster does not answer at once.

    Raises:
        UserError: as `submit`; or there is no run, or an override changes what decides
            its weights.
    """
    run = expand_home(str(run))
    check_overrides(overrides)
    paths = _to_paths(files)
    make_importable(paths)
    # Read the run's config. The directory may have been moved, or be named differently
    # from this machine: the name given here replaces the one in the config.
    store = Store(run)
    try:
        text = store.read(CONFIG_FILE).decode()
    except FileNotFoundError:
        raise UserError(
            f"{store.redacted_url} is not a run directory: it has no {CONFIG_FILE}"
        ) from None
    except NotADirectoryError:
        folder = store.redacted_url.rpartition("/")[0] or "."
        raise UserError(
            f"{store.redacted_url} is a file: name the run directory, {folder}"
        ) from None
    workers_override = format_workers_override(workers)
    origin = f"{store.redacted_url}/{CONFIG_FILE}"
    config = parse_config_yaml(text, origin, [*overrides, *workers_override], run=run)
    # Here, where the user is, and not only once the job has started.
    if overrides:
        saved = parse_config_yaml(text, origin, run=run)
        check_result_fields(config, get_result_fields(saved))

    options = ["--resume", *["--accept-other-hardware"] * accept_other_hardware]
    spec = _JobSpec(config, paths, None, options, dry_run)
    return _submit_to_platform(spec, to, address, template, namespace, log)


def jobs(
    address: str | None = None, *, log: Callable[[str], None] | None = None
) -> list[JobInfo]:
    """List the jobs that distrain has submitted to a Ray cluster, oldest first.

    Args:
        address: URL of the Ray dashboard. Default: RAY_API_SERVER_ADDRESS, or this
            machine.
        log: gets a line if the cluster does not answer at once.

    Raises:
        UserError: no cluster answers at the address, or it rejects the token.
    """
    return _connect(address, log).list_jobs()


def logs(
    job: str,
    address: str | None = None,
    *,
    follow: bool = False,
    console: Console | None = None,
    log: Callable[[str], None] | None = None,
) -> JobInfo:
    """Print the log of a job as `distrain train` would have printed it here.

    Args:
        job: job ID.
        address: URL of the Ray dashboard.
        follow: follow the log until the job ends; reconnect if needed.
        console: where the lines go. Default: stdout.
        log: gets a line if the cluster does not answer at once.

    Raises:
        UserError: no job has that ID, or no cluster answers.
    """
    client = _connect(address, log)
    if follow:
        console = console or create_console()
        try:
            return client.follow_job(job, console)
        finally:
            console.stop()
    # No progress bar: these lines are history.
    console = console or PlainConsole(sys.stdout)
    for line in client.read_log_lines(job):
        replay_line(line, console)
    return client.get_job_info(job)


def stop(
    job: str,
    address: str | None = None,
    *,
    console: Console | None = None,
    log: Callable[[str], None] | None = None,
) -> JobInfo:
    """Ask a job to checkpoint and stop, and wait until it has ended.

    Args:
        job: job ID.
        address: URL of the Ray dashboard.
        console: where progress is printed. Default: stdout.
        log: gets a line if the cluster does not answer at once.

    Raises:
        UserError: no job has that ID, or no cluster answers.
    """
    return _connect(address, log).stop_job(job, console or PlainConsole(sys.stdout))


def make_importable(files: Sequence[Path]) -> None:
    """Make the files that are sent along importable here, where the config is checked.

    On the cluster they lie side by side, so the folder of each is searched.
    """
    sys.path.extend(
        str(Path(expand_home(str(file))).absolute().parent) for file in files
    )


def _to_paths(files: Sequence[str | Path]) -> list[Path]:
    """Return the files that are sent along. Raises UserError for a single path."""
    if isinstance(files, str | Path):
        raise UserError(
            f"files must be a list of paths, not one path: use [{str(files)!r}]"
        )
    return [Path(expand_home(str(file))) for file in files]


def get_dashboard_url(address: str | None) -> str:
    """Return the URL of the Ray dashboard: an address, the environment's, or local."""
    # From Python it may be a number.
    given = None if address is None else str(address)
    return given or os.environ.get("RAY_API_SERVER_ADDRESS") or _LOCAL_DASHBOARD_URL


def _connect(address: str | None, log: Callable[[str], None] | None) -> RayJobClient:
    url = get_dashboard_url(address)
    return RayJobClient(url, log=log) if log else RayJobClient(url)


def _submit_to_platform(
    spec: _JobSpec,
    to: Platform,
    address: str | None,
    template: str | Path | None,
    namespace: str | None,
    log: Callable[[str], None] | None,
) -> Submission:
    # Refuse what the platform would ignore. The environment's defaults are for all.
    if to not in ("ray", *_EXAMPLE_TEMPLATES):
        raise UserError(f"cannot submit to {to!r}: use ray, kuberay or slurm")
    if namespace is not None and to != "kuberay":
        raise UserError(f"a job on {to} has no namespace: leave it out")
    if address is not None and to != "ray":
        raise UserError(
            f"a job on {to} does not go through a Ray dashboard: leave the address out"
        )
    if template is not None and to == "ray":
        raise UserError(
            "a job on a Ray cluster has no template: leave it out, or say where the "
            "job runs, with --to kuberay or --to slurm"
        )
    if to == "ray":
        return _submit_to_ray(spec, address, log)

    # KubeRay and Slurm fill the run into the site's own template.
    template = template or os.environ.get("DISTRAIN_TEMPLATE")
    if template is None:
        raise UserError(
            f"--to {to} needs --template: a copy of {_EXAMPLE_TEMPLATES[to]} from "
            "distrain's repository, adapted to your site"
        )
    template_path = Path(expand_home(str(template)))
    if to == "kuberay":
        return _submit_to_kuberay(spec, template_path, namespace)
    return _submit_to_slurm(spec, template_path)


def _submit_to_ray(
    spec: _JobSpec, address: str | None, log: Callable[[str], None] | None
) -> Submission:
    request = build_job_request(
        spec.config, spec.files, job_id=spec.id, train_options=spec.train_options
    )
    text = "".join(f"{line}\n" for line in request.format_lines())
    # Needs no cluster.
    if spec.dry_run:
        return Submission("dry_run", request.body["submission_id"], text)
    job_id, is_new = _connect(address, log).submit_job(request)
    return Submission(_to_status(is_new), job_id, text)


def _submit_to_kuberay(
    spec: _JobSpec, template: Path, namespace: str | None
) -> Submission:
    def render_manifests(job_name: str | None) -> JobManifests:
        return build_manifests(
            spec.config,
            template,
            spec.files,
            job_name=job_name,
            namespace=namespace,
            train_options=spec.train_options,
        )

    manifests = render_manifests(spec.id)
    # Needs no cluster.
    if spec.dry_run:
        return Submission("dry_run", manifests.job_name, manifests.to_yaml(), namespace)

    # Render again under a free name: a RayJob of this run may have ended before.
    kubectl = Kubectl()
    manifests = render_manifests(kubectl.choose_job_name(manifests))
    used_namespace, is_new = kubectl.submit_job(manifests)
    return Submission(
        _to_status(is_new), manifests.job_name, manifests.to_yaml(), used_namespace
    )


def _submit_to_slurm(spec: _JobSpec, template: Path) -> Submission:
    script = render_script(
        spec.config,
        template,
        spec.files,
        job_name=spec.id,
        train_options=spec.train_options,
    )
    # Needs no cluster, which is also what numbers the job.
    if spec.dry_run:
        return Submission("dry_run", None, script)
    number, is_new = submit_script(script)
    return Submission(_to_status(is_new), number, script)


def _to_status(is_new: bool) -> Literal["submitted", "already_running"]:
    return "submitted" if is_new else "already_running"
