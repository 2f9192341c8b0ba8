"""The train command: decide where to train, train there, and print how it ended."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distrain import __version__
from distrain.cli.options import (
    NO_VALUE,
    OtherHardwareOption,
    OverridesArgument,
    RecipeArgument,
)
from distrain.errors import UserError

if TYPE_CHECKING:
    from distrain.config import Config

# Names of the numbers of --dry-run, with their colon, are padded to this width.
_NAME_WIDTH = 26

_ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Fail if there is no checkpoint to resume from (without this flag, one is "
        "used if present).",
        metavar=NO_VALUE,
    ),
]
_DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the resolved config and the numbers derived from it; do not train.",
        metavar=NO_VALUE,
    ),
]
_WorkersOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|N|MIN-MAX",
        help="Train on N workers, or elastically on MIN-MAX; auto: one per GPU. On "
        "this machine unless --address is given.",
        show_default="the recipe's cluster.workers",
    ),
]
_AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Train on this Ray cluster: auto (the one that this machine belongs to), "
        "HOST:PORT or ray://HOST:PORT.",
    ),
]


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    must_resume: _ResumeOption = False,
    dry_run: _DryRunOption = False,
    workers: _WorkersOption = None,
    address: _AddressOption = None,
    accept_other_hardware: OtherHardwareOption = False,
) -> None:
    """Train on this machine's GPUs or CPU cores, or on a Ray cluster.

    The run directory is runs/RECIPE unless run=... names another. To resume a
    stopped run from its newest checkpoint, run the same command.
    """
    from distrain.config import format_workers_override, load_config

    # Resolve the config: flags count as overrides and come last.
    _check_submitted_version()
    config = load_config(
        recipe, [*(overrides or []), *format_workers_override(workers)]
    )
    if dry_run:
        _print_dry_run(config, address)
        return
    from distrain.data.storage.store import Store
    from distrain.launch.launcher import log_summary, train_here_or_on_ray
    from distrain.monitor.consoles import LogFileConsole
    from distrain.monitor.terminal import create_console

    # Train, with a copy of the console's lines in the run directory.
    with LogFileConsole(create_console(), Store(str(config.run))) as console:
        summary, signal_number = train_here_or_on_ray(
            config,
            console,
            workers=workers,
            address=address,
            must_resume=must_resume,
            accept_other_hardware=accept_other_hardware,
        )
        # A job's recipe is a temporary copy on the cluster, so its command would be of
        # no use: `distrain logs -f` and `distrain stop` print one instead.
        is_job = "DISTRAIN_CONSOLE" in os.environ
        command = _format_resume_command(recipe, overrides or [], workers, address)
        log_summary(console, summary, None if is_job else command)
    # As a shell reports a process that died of the signal.
    if signal_number is not None:
        raise SystemExit(128 + signal_number)


def _print_dry_run(config: "Config", address: str | None) -> None:
    """Print a config as YAML, and the numbers derived from it."""
    from distrain.config import to_yaml
    from distrain.launch.dry_run import dry_run

    # The config first: it is known even if the data or the cluster is not there.
    typer.echo(to_yaml(config))
    for name, value in dry_run(config, address).items():
        typer.echo(f"{name + ':':<{_NAME_WIDTH}} {value}")


def _check_submitted_version() -> None:
    """Raise UserError if this job was submitted by another version of distrain."""
    # Set by `distrain submit`; elsewhere there is nothing to compare with.
    submitted_by = os.environ.get("DISTRAIN_VERSION", __version__)
    if submitted_by != __version__:
        raise UserError(
            f"the job was submitted by distrain {submitted_by}, but its image has "
            f"{__version__}: use an image with {submitted_by}, or submit with "
            f"{__version__}"
        )


def _format_resume_command(
    recipe: Path, overrides: Sequence[str], workers: str | None, address: str | None
) -> str:
    """Return the command line that resumes this run, quoted for a shell."""
    arguments = ["distrain", "train", str(recipe), *overrides]
    if workers is not None:
        arguments.append(f"--workers={workers}")
    if address is not None:
        arguments.append(f"--address={address}")
    return shlex.join(arguments)
