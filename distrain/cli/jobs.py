"""The commands around jobs on a cluster: submit, jobs, logs, stop, resume, drain."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from distrain.errors import UserError

if TYPE_CHECKING:
    from distrain.config import Config
    from distrain.launch.kuberay import JobManifests
    from distrain.launch.ray_jobs import RayJobClient
    from distrain.monitor.sinks import Console

AddressOption = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        metavar="URL",
        help="Dashboard of the cluster's head.",
    ),
]
LOCAL_DASHBOARD_URL = "http://127.0.0.1:8265"
FollowOption = Annotated[
    bool, typer.Option("--follow", "-f", help="Show its progress until it ends.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")
]
PlatformOption = Annotated[
    Literal["ray", "kuberay", "slurm"], typer.Option(help="What the job runs on.")
]
TemplateOption = Annotated[
    Path | None,
    typer.Option(
        envvar="DISTRAIN_TEMPLATE",
        help="Your site's manifest (kuberay) or script (slurm); see cluster/.",
    ),
]
NamespaceOption = Annotated[
    str | None,
    typer.Option(help="Of Kubernetes; without, the template's or the kubeconfig's."),
]


class JobSpec(NamedTuple):
    """What a job is asked to do."""

    config: "Config"
    files: list[Path]
    job_id: str | None
    must_resume: bool


class Destination(NamedTuple):
    """Where it is asked to run."""

    platform: Literal["ray", "kuberay", "slurm"]
    address: str
    template: Path | None
    namespace: str | None


def submit_job(
    config: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings.")
    ] = None,
    address: AddressOption = LOCAL_DASHBOARD_URL,
    workers: Annotated[
        str | None, typer.Option(metavar="N|MIN-MAX", help="Ranks.")
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            help="Python file or folder to send along, for an own model or loss.",
        ),
    ] = None,
    job: Annotated[
        str | None,
        typer.Option("--id", help="Id of the job; without, it follows from the run."),
    ] = None,
    follow: FollowOption = False,
    dry_run: DryRunOption = False,
    to: PlatformOption = "ray",
    template: TemplateOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Start a run as a job: on a Ray cluster, on Kubernetes (KubeRay) or on Slurm.

    A run that is at work already is not started twice. To a Ray cluster go the config, distrain's own source, and what
    --with names; on Kubernetes distrain is in the image, on Slurm in this environment, which all nodes share.
    """
    from distrain.config import format_workers_override, load_config

    # What is sent lies beside each other on the cluster: here, too, a loss of one's own is found there.
    sys.path.extend(str(file.absolute().parent) for file in files or [])

    settings = load_config(
        config, [*(overrides or []), *format_workers_override(workers)]
    )
    _submit_to_destination(
        JobSpec(settings, files or [], job, False),
        Destination(to, address, template, namespace),
        follow,
        dry_run,
    )


def resume_run(
    run: Annotated[str, typer.Argument(help="Run directory, path or URL.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings.")
    ] = None,
    address: AddressOption = LOCAL_DASHBOARD_URL,
    workers: Annotated[
        str | None, typer.Option(metavar="N|MIN-MAX", help="Ranks.")
    ] = None,
    files: Annotated[
        list[Path] | None, typer.Option("--with", help="As for submit.")
    ] = None,
    follow: FollowOption = False,
    dry_run: DryRunOption = False,
    to: PlatformOption = "ray",
    template: TemplateOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Go on with a run, as a job, with the config that its directory holds."""
    from distrain.config import format_workers_override, parse_config_yaml
    from distrain.data.storage.store import Store
    from distrain.rundir.files import CONFIG_FILE

    store = Store(run)
    try:
        text = store.read(CONFIG_FILE).decode()
    except FileNotFoundError:
        raise UserError(
            f"there is no run in {store.redacted_url}: it has no config.yaml"
        ) from None
    where = f"run={run}"
    settings = parse_config_yaml(
        text,
        f"{store.redacted_url}/config.yaml",
        [where, *(overrides or []), *format_workers_override(workers)],
    )
    _submit_to_destination(
        JobSpec(settings, files or [], None, True),
        Destination(to, address, template, namespace),
        follow,
        dry_run,
    )


def list_jobs(address: AddressOption = LOCAL_DASHBOARD_URL) -> None:
    """List the jobs that distrain has submitted to a cluster."""
    found = _connect_client(address).list_jobs()
    if not found:
        typer.echo("no jobs")
    for job in found:
        began = (
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job.start_time))
            if job.start_time
            else "-"
        )
        typer.echo(f"{job.id:<32} {job.status:<9} {began:<16} {job.run}")


def show_logs(
    job: Annotated[
        str,
        typer.Argument(
            help="Id of the job; -: show what is piped in, as kubectl logs has it."
        ),
    ],
    address: AddressOption = LOCAL_DASHBOARD_URL,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends.")
    ] = False,
) -> None:
    """Show what a job has told. It stands in log-*.txt of the run directory too, when the cluster is gone."""
    from distrain.monitor.consoles import replay_line
    from distrain.monitor.sinks import PlainConsole
    from distrain.monitor.terminal import create_console

    if job == "-":
        shown = create_console()
        for line in sys.stdin:
            replay_line(line.rstrip("\n"), shown)
        shown.stop()
        return
    found = _connect_client(address)
    if follow:
        _show_job_progress(found, job, address)
        return
    console = PlainConsole(sys.stdout)
    for line in found.read_log_lines(job):
        replay_line(line, console)


def stop_job(
    job: Annotated[str, typer.Argument(help="Id of the job.")],
    address: AddressOption = LOCAL_DASHBOARD_URL,
) -> None:
    """Have a job save a checkpoint and end."""
    from distrain.monitor.sinks import PlainConsole

    console = PlainConsole(sys.stdout)
    ended = _connect_client(address).stop_job(job, console)
    console.log(
        f"{job} {ended.status.lower()}; to go on: distrain resume {ended.run} --address {address}"
    )


def drain_host(
    seconds: Annotated[
        float, typer.Option(min=1, help="Until when the host is given up all the same.")
    ] = 240.0,
) -> None:
    """Take this host out of its Ray cluster: runs save, and go on with the others. On the head: runs save and end.

    For whatever takes hosts away: the pre-stop hook of a pod, a service manager.
    """
    from distrain.launch.drain import drain_ray_host as take_out
    from distrain.monitor.sinks import PlainConsole

    take_out(PlainConsole(sys.stdout), timeout_seconds=seconds)


def _submit_to_destination(
    spec: JobSpec, destination: Destination, follow: bool, dry_run: bool
) -> None:
    if destination.platform == "ray":
        _submit_to_ray(spec, destination.address, follow, dry_run)
        return
    if destination.template is None:
        example = {
            "kuberay": "cluster/kuberay/rayjob.yaml",
            "slurm": "cluster/slurm/train.sbatch",
        }[destination.platform]
        raise UserError(
            f"--to {destination.platform} needs --template: a copy of {example} of distrain's repository with what your site "
            "needs put in"
        )
    if follow and not dry_run:
        raise UserError(
            f"--to {destination.platform} does not follow: submit without -f, then watch with distrain top {spec.config.run}"
        )
    if destination.platform == "kuberay":
        _submit_to_kuberay(spec, destination.template, destination.namespace, dry_run)
    else:
        _submit_to_slurm(spec, destination.template, dry_run)


def _submit_to_ray(spec: JobSpec, address: str, follow: bool, dry_run: bool) -> None:
    from distrain.launch.job_request import build_job_request

    sent = build_job_request(
        spec.config, spec.files, job_id=spec.job_id, must_resume=spec.must_resume
    )
    if dry_run:
        for line in sent.format_lines():
            typer.echo(line)
        return
    found = _connect_client(address)
    name, started = found.submit_job(sent)
    typer.echo(f"job {name} {_describe_submission(started)}")
    if follow:
        _show_job_progress(found, name, address)
    else:
        typer.echo(f"to follow it: distrain logs {name} -f --address {address}")


def _submit_to_kuberay(
    spec: JobSpec, template: Path, namespace: str | None, dry_run: bool
) -> None:
    from distrain.launch.kuberay import Kubectl, build_manifests

    def render_manifests(job_name: str | None) -> "JobManifests":
        asked, more = spec, {"job_name": job_name, "namespace": namespace}
        return build_manifests(
            asked.config, template, asked.files, must_resume=asked.must_resume, **more
        )

    found = render_manifests(spec.job_id)
    if dry_run:
        typer.echo(found.to_yaml(), nl=False)
        return
    cluster = Kubectl()
    found = render_manifests(cluster.choose_job_name(found))
    where, started = cluster.submit_job(found)
    typer.echo(f"RayJob {found.job_name} in {where} {_describe_submission(started)}")
    typer.echo(f"to watch it: distrain top {spec.config.run}, or")
    typer.echo(f"  kubectl -n {where} logs -f job/{found.job_name} | distrain logs -")
    typer.echo(
        f"to stop it: kubectl -n {where} delete rayjob {found.job_name} (it saves first)"
    )


def _submit_to_slurm(spec: JobSpec, template: Path, dry_run: bool) -> None:
    from distrain.launch.slurm import render_script, submit_script

    text = render_script(
        spec.config,
        template,
        spec.files,
        job_name=spec.job_id,
        must_resume=spec.must_resume,
    )
    if dry_run:
        typer.echo(text, nl=False)
        return
    number, started = submit_script(text)
    typer.echo(f"Slurm job {number} {_describe_submission(started)}")
    typer.echo(f"to watch it: distrain top {spec.config.run}")
    typer.echo(f"to stop it: scancel --batch --signal=TERM {number} (it saves first)")


def _describe_submission(started: bool) -> str:
    return "submitted" if started else "is at work already"


def _connect_client(address: str) -> "RayJobClient":
    from distrain.launch.ray_jobs import RayJobClient

    return RayJobClient(address, log=lambda text: typer.echo(text, err=True))


def _show_job_progress(client: "RayJobClient", job_id: str, address: str) -> None:
    from distrain.launch.ray_jobs import to_exit_code
    from distrain.monitor.terminal import create_console

    console: Console = create_console()
    try:
        ended = client.follow_job(job_id, console)
    except KeyboardInterrupt:
        console.stop()
        console.log(
            f"the job goes on. To come back: distrain logs {job_id} -f --address {address}"
        )
        console.log(f"to end it: distrain stop {job_id} --address {address}")
        raise SystemExit(130) from None
    console.stop()
    if ended.status == "STOPPED":
        console.log(
            f"job {job_id} was stopped; to go on: distrain resume {ended.run} --address {address}"
        )
    raise SystemExit(to_exit_code(ended))
