"""Runs on Slurm: fill a run into a site's sbatch script, and submit it.

The script is the site's own, with its partitions, limits and environment;
cluster/slurm/train.sbatch is one to start from.
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
from distrain.launch.sbatch_options import (
    count_cpus_per_task,
    count_gpus_per_node,
    get_option,
    set_number_of_nodes,
    set_option,
)

_BEGIN_MARKER = "# distrain: begin"
_END_MARKER = "# distrain: end"
_CONFIG_DELIMITER = "END_OF_CONFIG"
# Without COMPLETING: the run of such a job has ended, only its cleanup is left.
_ACTIVE_STATES = "PENDING,CONFIGURING,RUNNING,SUSPENDED"


def render_script(
    config: Config,
    template: Path,
    files: Sequence[Path] = (),
    *,
    job_name: str | None = None,
    train_options: Sequence[str] = (),
) -> str:
    """Fill a run into a site's sbatch script.

    The number of nodes follows from `cluster.workers` and from what the script requests
    per node. With `cluster.workers` = auto, the script's number of nodes stays, and the
    run uses the GPUs that it finds on the nodes.

    Args:
        config: the run; its paths must mean the same on all nodes.
        template: the site's script, in which `# distrain: begin` and `# distrain: end`
            mark the lines to replace.
        files: Python files, or folders of them, for the user's own model or loss; on a
            file system that all nodes share.
        job_name: the job's name; None: derive it from the run.
        train_options: options of `distrain train`, e.g. --resume.

    Raises:
        UserError: the template or the name is invalid, a path is local to this machine,
            or the script requests too little for a worker.
    """
    check_shared_paths(config)
    script = _load_template(template)

    # Set the directives: number of nodes, rounded up, and name.
    workers_per_node = _parse_workers_per_node(config, script, template)
    if config.cluster.workers != "auto":
        min_workers, max_workers = config.cluster.workers
        min_nodes = -(-min_workers // workers_per_node)
        max_nodes = -(-max_workers // workers_per_node)
        nodes = f"{min_nodes}-{max_nodes}" if min_nodes < max_nodes else str(min_nodes)
        script = set_number_of_nodes(script, nodes)
    name = job_name or re.sub(r"[^\w.-]+", "-", derive_job_id(config))
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(
            f"{name!r} is not a valid Slurm job name: use only letters, digits, dots, "
            "dashes and underscores"
        )
    script = set_option(script, "job-name", name)

    # Replace what is between the markers; they stay, so that the result is a template
    # again.
    before, _, rest = script.partition(_BEGIN_MARKER)
    after = rest.partition(_END_MARKER)[2]
    run_lines = _format_run_lines(config, files, train_options)
    return before + "\n".join([_BEGIN_MARKER, *run_lines, _END_MARKER]) + after


def _format_run_lines(
    config: Config, files: Sequence[Path], train_options: Sequence[str]
) -> list[str]:
    """Return the lines of the script that set up environment, config and options."""
    # Let the nodes import the user's files where they are. They are read here only to
    # report what is wrong with them.
    read_user_files(files)
    lines = [f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]
    if files:
        folders = sorted({str(path.resolve().parent) for path in files})
        lines.append(f"export PYTHONPATH={shlex.quote(':'.join(folders))}")

    # The job writes the config to a temporary file when it starts.
    lines += [
        "config=$(mktemp)",
        "trap 'rm -f \"$config\"' EXIT",
        f"cat > \"$config\" <<'{_CONFIG_DELIMITER}'",
        to_yaml(config).rstrip(),
        _CONFIG_DELIMITER,
        f"options=({' '.join(train_options)})",
    ]
    return lines


def _load_template(path: Path) -> str:
    """Read a site's script.

    Raises:
        UserError: it cannot be read, or does not have exactly one pair of markers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"cannot read the template {path}: {reason}") from None
    if text.count(_BEGIN_MARKER) != 1 or text.count(_END_MARKER) != 1:
        raise UserError(
            f"the template {path} must have one line {_BEGIN_MARKER!r} and one "
            f"{_END_MARKER!r}: see cluster/slurm/train.sbatch"
        )
    return text


def submit_script(script: str) -> tuple[str, bool]:
    """Submit a script, unless a job of its name is pending or running.

    Returns:
        The job ID, and True if it was submitted now.

    Raises:
        UserError: Slurm is missing on this machine, or refuses.
    """
    name = get_option(script, "job-name")
    active_jobs = _run_slurm_command(
        "squeue",
        "--me",
        "--noheader",
        "--format=%i",
        f"--name={name}",
        f"--states={_ACTIVE_STATES}",
    ).split()
    if active_jobs:
        return active_jobs[0], False
    # Prints the job ID, followed on some sites by a semicolon and the cluster.
    # The name again, since SBATCH_JOB_NAME would count before the script's.
    output = _run_slurm_command(
        "sbatch", "--parsable", f"--job-name={name}", script=script
    )
    return output.strip().partition(";")[0], True


def _run_slurm_command(*command: str, script: str = "") -> str:
    """Run a command of Slurm's with a script as its input; return its output."""
    if shutil.which(command[0]) is None:
        raise UserError(
            f"Slurm is not available here ({command[0]} is not in PATH): submit from a "
            "login node"
        )
    process = subprocess.run(  # noqa: S603
        command, input=script, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise UserError(f"Slurm refused: {' '.join(process.stderr.split())}")
    return process.stdout


def _parse_workers_per_node(config: Config, script: str, template: Path) -> int:
    """Return how many ranks fit into what a script requests per node.

    One task per node is assumed, so --cpus-per-task is what a node gives.

    Raises:
        UserError: not even one fits, or the script does not say how many GPUs a node
            gives.
    """
    num_cpus = count_cpus_per_task(script)
    num_gpus = count_gpus_per_node(script, str(template))
    num_workers = count_workers_per_node(config, num_cpus, num_gpus)
    if num_workers < 1:
        raise UserError(
            f"a worker needs {describe_worker_request(config, num_gpus)}, but "
            f"{template} requests {num_cpus} CPUs and {num_gpus} GPUs per node: raise "
            "--cpus-per-task and --gpus-per-node there, or lower "
            "cluster.cpus_per_worker"
        )
    return num_workers
