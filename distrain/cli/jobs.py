"""The commands around jobs on a cluster: submit, jobs, logs, stop, resume, drain."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from distrain.errors import UserError

if TYPE_CHECKING:
    from distrain.config import Config
    from distrain.launch.kuberay import Manifests
    from distrain.launch.submit import Jobs
    from distrain.monitor.sinks import Console

Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        metavar="URL",
        help="Dashboard of the cluster's head.",
    ),
]
LOCAL = "http://127.0.0.1:8265"
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Show its progress until it ends.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")
]
To = Annotated[
    Literal["ray", "kuberay", "slurm"], typer.Option(help="What the job runs on.")
]
Template = Annotated[
    Path | None,
    typer.Option(
        envvar="DISTRAIN_TEMPLATE",
        help="Your site's manifest (kuberay) or script (slurm); see cluster/.",
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option(help="Of Kubernetes; without, the template's or the kubeconfig's."),
]


class Wanted(NamedTuple):
    """What a job is asked to do."""

    config: "Config"
    files: list[Path]
    job: str | None
    must_resume: bool


class Target(NamedTuple):
    """Where it is asked to run."""

    to: Literal["ray", "kuberay", "slurm"]
    address: str
    template: Path | None
    namespace: str | None


def submit(
    config: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings.")
    ] = None,
    address: Address = LOCAL,
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
    follow: Follow = False,
    dry_run: DryRun = False,
    to: To = "ray",
    template: Template = None,
    namespace: Namespace = None,
) -> None:
    """Start a run as a job: on a Ray cluster, on Kubernetes (KubeRay) or on Slurm.

    A run that is at work already is not started twice. To a Ray cluster go the config, distrain's own source, and what
    --with names; on Kubernetes distrain is in the image, on Slurm in this environment, which all nodes share.
    """
    from distrain.config import load, workers_override

    # What is sent lies beside each other on the cluster: here, too, a loss of one's own is found there.
    sys.path.extend(str(file.absolute().parent) for file in files or [])

    settings = load(config, [*(overrides or []), *workers_override(workers)])
    _submit(
        Wanted(settings, files or [], job, False),
        Target(to, address, template, namespace),
        follow,
        dry_run,
    )


def resume(
    run: Annotated[str, typer.Argument(help="Run directory, path or URL.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings.")
    ] = None,
    address: Address = LOCAL,
    workers: Annotated[
        str | None, typer.Option(metavar="N|MIN-MAX", help="Ranks.")
    ] = None,
    files: Annotated[
        list[Path] | None, typer.Option("--with", help="As for submit.")
    ] = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    to: To = "ray",
    template: Template = None,
    namespace: Namespace = None,
) -> None:
    """Go on with a run, as a job, with the config that its directory holds."""
    from distrain.config import parse_yaml, workers_override
    from distrain.data.storage.store import Store
    from distrain.rundir.files import CONFIG

    store = Store(run)
    try:
        text = store.read(CONFIG).decode()
    except FileNotFoundError:
        raise UserError(
            f"there is no run in {store.name}: it has no config.yaml"
        ) from None
    where = f"run={run}"
    settings = parse_yaml(
        text,
        f"{store.name}/config.yaml",
        [where, *(overrides or []), *workers_override(workers)],
    )
    _submit(
        Wanted(settings, files or [], None, True),
        Target(to, address, template, namespace),
        follow,
        dry_run,
    )


def jobs(address: Address = LOCAL) -> None:
    """List the jobs that distrain has submitted to a cluster."""
    found = _jobs(address).list()
    if not found:
        typer.echo("no jobs")
    for job in found:
        began = (
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
            if job.started
            else "-"
        )
        typer.echo(f"{job.id:<32} {job.status:<9} {began:<16} {job.run}")


def logs(
    job: Annotated[
        str,
        typer.Argument(
            help="Id of the job; -: show what is piped in, as kubectl logs has it."
        ),
    ],
    address: Address = LOCAL,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends.")
    ] = False,
) -> None:
    """Show what a job has told. It stands in log-*.txt of the run directory too, when the cluster is gone."""
    from distrain.monitor.consoles import replay
    from distrain.monitor.sinks import PlainLines
    from distrain.monitor.terminal import person

    if job == "-":
        shown = person()
        for line in sys.stdin:
            replay(line.rstrip("\n"), shown)
        shown.stop()
        return
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
    console.event(
        f"{job} {ended.status.lower()}; to go on: distrain resume {ended.run} --address {address}"
    )


def drain(
    seconds: Annotated[
        float, typer.Option(min=1, help="Until when the host is given up all the same.")
    ] = 240.0,
) -> None:
    """Take this host out of its Ray cluster: runs save, and go on with the others. On the head: runs save and end.

    For whatever takes hosts away: the pre-stop hook of a pod, a service manager.
    """
    from distrain.launch.drain import drain as take_out
    from distrain.monitor.sinks import PlainLines

    take_out(PlainLines(sys.stdout), seconds=seconds)


def _submit(wanted: Wanted, target: Target, follow: bool, dry_run: bool) -> None:
    if target.to == "ray":
        _to_ray(wanted, target.address, follow, dry_run)
        return
    if target.template is None:
        example = {
            "kuberay": "cluster/kuberay/rayjob.yaml",
            "slurm": "cluster/slurm/train.sbatch",
        }[target.to]
        raise UserError(
            f"--to {target.to} needs --template: a copy of {example} of distrain's repository with what your site "
            "needs put in"
        )
    if follow and not dry_run:
        raise UserError(
            f"--to {target.to} does not follow: submit without -f, then watch with distrain top {wanted.config.run}"
        )
    if target.to == "kuberay":
        _to_kuberay(wanted, target.template, target.namespace, dry_run)
    else:
        _to_slurm(wanted, target.template, dry_run)


def _to_ray(wanted: Wanted, address: str, follow: bool, dry_run: bool) -> None:
    from distrain.launch.package import request

    sent = request(
        wanted.config, wanted.files, job=wanted.job, must_resume=wanted.must_resume
    )
    if dry_run:
        for line in sent.lines():
            typer.echo(line)
        return
    found = _jobs(address)
    name, started = found.submit(sent)
    typer.echo(f"job {name} {_did(started)}")
    if follow:
        _follow(found, name, address)
    else:
        typer.echo(f"to follow it: distrain logs {name} -f --address {address}")


def _to_kuberay(
    wanted: Wanted, template: Path, namespace: str | None, dry_run: bool
) -> None:
    from distrain.launch.kuberay import Kubectl, manifests

    def rendered(name: str | None) -> "Manifests":
        asked, more = wanted, {"job": name, "namespace": namespace}
        return manifests(
            asked.config, template, asked.files, must_resume=asked.must_resume, **more
        )

    found = rendered(wanted.job)
    if dry_run:
        typer.echo(found.text(), nl=False)
        return
    cluster = Kubectl()
    found = rendered(cluster.name_for(found))
    where, started = cluster.submit(found)
    typer.echo(f"RayJob {found.name} in {where} {_did(started)}")
    typer.echo(f"to watch it: distrain top {wanted.config.run}, or")
    typer.echo(f"  kubectl -n {where} logs -f job/{found.name} | distrain logs -")
    typer.echo(
        f"to stop it: kubectl -n {where} delete rayjob {found.name} (it saves first)"
    )


def _to_slurm(wanted: Wanted, template: Path, dry_run: bool) -> None:
    from distrain.launch.slurm import script, submit

    text = script(
        wanted.config,
        template,
        wanted.files,
        job=wanted.job,
        must_resume=wanted.must_resume,
    )
    if dry_run:
        typer.echo(text, nl=False)
        return
    number, started = submit(text)
    typer.echo(f"Slurm job {number} {_did(started)}")
    typer.echo(f"to watch it: distrain top {wanted.config.run}")
    typer.echo(f"to stop it: scancel --batch --signal=TERM {number} (it saves first)")


def _did(started: bool) -> str:
    return "submitted" if started else "is at work already"


def _jobs(address: str) -> "Jobs":
    from distrain.launch.submit import Jobs

    return Jobs(address, tell=lambda text: typer.echo(text, err=True))


def _follow(found: "Jobs", name: str, address: str) -> None:
    from distrain.launch.submit import exit_code
    from distrain.monitor.terminal import person

    console: Console = person()
    try:
        ended = found.follow(name, console)
    except KeyboardInterrupt:
        console.stop()
        console.event(
            f"the job goes on. To come back: distrain logs {name} -f --address {address}"
        )
        console.event(f"to end it: distrain stop {name} --address {address}")
        raise SystemExit(130) from None
    console.stop()
    if ended.status == "STOPPED":
        console.event(
            f"job {name} was stopped; to go on: distrain resume {ended.run} --address {address}"
        )
    raise SystemExit(exit_code(ended))
