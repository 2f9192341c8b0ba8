"""Runs on Slurm: a site's sbatch script with the run filled in, and its way to Slurm.

The script is the site's, with its partitions, limits and environment; cluster/slurm/train.sbatch is one to start from.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from distrain.config import Config, to_yaml
from distrain.errors import UserError
from distrain.launch.allocation import count_workers_per_node, describe_worker_request
from distrain.launch.job_request import (
    check_shared_paths,
    derive_job_id,
    read_user_files,
)

_BEGIN_MARKER, _END_MARKER = "# distrain: begin", "# distrain: end"
_CONFIG_DELIMITER = "END_OF_CONFIG"
# Not COMPLETING: such a job has ended but for its cleaning up.
_ACTIVE_STATES = "PENDING,CONFIGURING,RUNNING,SUSPENDED"


def render_script(
    config: Config,
    template: Path,
    files: Sequence[Path] = (),
    *,
    job_name: str | None = None,
    must_resume: bool = False,
) -> str:
    """A site's sbatch script with a run filled in.

    The number of nodes follows from `cluster.workers` and what the script asks for on each; with `auto` the script's
    own stays, and the run takes what GPUs it finds there.

    Args:
        config: the run; its paths must mean the same on all nodes.
        template: the site's script, with a place marked by `# distrain: begin` and `# distrain: end`.
        files: Python files, or folders of such, for a model or loss of one's own; on a disk that all nodes share.
        job: its name; None: one that follows from the run.
        must_resume: it is a mistake if there is no checkpoint.

    Raises:
        UserError: the template is none, or a path is of this machine.
    """
    check_shared_paths(config)
    text = _load_template(template)
    each = _parse_workers_per_node(config, text, template)
    if config.cluster.workers != "auto":
        few, many = (-(-workers // each) for workers in config.cluster.workers)
        text = _set_directive(
            text, "nodes", f"{few}-{many}" if few < many else str(few)
        )
    name = job_name or re.sub(r"[^\w.-]+", "-", derive_job_id(config))
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(
            f"{name!r} is no name of a job: letters, digits, dots, dashes and underscores"
        )
    text = _set_directive(text, "job-name", name)
    read_user_files(files)  # says what is wrong with them
    folders = ":".join(sorted({str(path.resolve().parent) for path in files}))
    python_path = [f"export PYTHONPATH={shlex.quote(folders)}"] if files else []
    filled = [
        _BEGIN_MARKER,
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        *python_path,
        "config=$(mktemp)",
        "trap 'rm -f \"$config\"' EXIT",
        f"cat > \"$config\" <<'{_CONFIG_DELIMITER}'",
        to_yaml(config).rstrip(),
        _CONFIG_DELIMITER,
        f"options=({'--resume' * must_resume})",
    ]
    begin, _, rest = text.partition(_BEGIN_MARKER)
    return (
        begin + "\n".join(filled) + "\n" + _END_MARKER + rest.partition(_END_MARKER)[2]
    )


def _load_template(path: Path) -> str:
    """Read a site's script. Raises UserError if it has no one place for the run."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the template {path}: {getattr(error, 'strerror', error)}"
        ) from None
    if text.count(_BEGIN_MARKER) != 1 or text.count(_END_MARKER) != 1:
        raise UserError(
            f"the template {path} must have one line {_BEGIN_MARKER!r} and one {_END_MARKER!r}: see cluster/slurm/train.sbatch"
        )
    return text


def submit_script(script: str) -> tuple[str, bool]:
    """Hand a script to Slurm, or find its job if it waits or runs: the job's number, and whether it was started now.

    Raises:
        UserError: there is no Slurm here, or it refuses.
    """
    name = re.findall(r"^#SBATCH --job-name=(.+)$", script, re.MULTILINE)[0]
    if found := _run_slurm_command(
        "squeue",
        "--me",
        "--noheader",
        "--format=%i",
        f"--name={name}",
        f"--states={_ACTIVE_STATES}",
    ).split():
        return found[0], False
    return _run_slurm_command("sbatch", "--parsable", script=script).strip().partition(
        ";"
    )[0], True


def _run_slurm_command(*command: str, script: str = "") -> str:
    if shutil.which(command[0]) is None:
        raise UserError(
            f"there is no Slurm here ({command[0]} is not in PATH): submit from a login node"
        )
    done = subprocess.run(  # noqa: S603
        command, input=script, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"Slurm refused: {' '.join(done.stderr.split())}")
    return done.stdout


def _set_directive(script: str, name: str, value: str) -> str:
    """A script in which `#SBATCH --name=value` says this value."""
    line = f"#SBATCH --{name}={value}"
    found, count = re.subn(
        rf"^#SBATCH --{name}[= ].*$", line, script, count=1, flags=re.MULTILINE
    )
    return found if count else script.replace("\n", f"\n{line}\n", 1)


def _parse_workers_per_node(config: Config, script: str, template: Path) -> int:
    """How many ranks a node of the job has room for."""
    cpus = _parse_option(script, r"(?:--cpus-per-task[= ]|-c ?)")
    gpus = _parse_option(script, r"--(?:gpus-per-node[= ]|gres[= ]gpu:)(?:[a-z]\w*:)?")
    room = count_workers_per_node(config, cpus, gpus)
    if room < 1:
        raise UserError(
            f"a worker asks for {describe_worker_request(config, gpus)}, and {template} for {cpus} CPUs and {gpus} GPUs on each node: "
            "raise --cpus-per-task and --gpus-per-node there, or lower cluster.cpus_per_worker"
        )
    return room


def _parse_option(script: str, option: str) -> int:
    """What a script asks for; of `--gpus-per-node=a100:4` the 4."""
    found = re.search(rf"^#SBATCH {option}(\d+)\s*(?:#.*)?$", script, re.MULTILINE)
    return int(found[1]) if found else 0
