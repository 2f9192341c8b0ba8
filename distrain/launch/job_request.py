"""Build the job that is sent to a Ray cluster.

It holds distrain's own source, the config and the Python files that the user named;
nothing else of this machine is sent.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distrain
from distrain.config import Config, to_yaml
from distrain.errors import UserError
from distrain.result_fields import get_result_fields

JOB_CONFIG_NAME = "run.yaml"
_MAX_ARCHIVE_BYTES = 100 << 20
# Earliest time that a zip file can hold. With it the same files make the same archive,
# which Ray then does not need to receive again.
_ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class JobRequest:
    """A job as it is sent: the archive, and the rest of the request."""

    files: dict[str, bytes]
    archive: bytes
    body: dict[str, Any]
    """Arguments of Ray's job interface."""

    def format_lines(self) -> list[str]:
        """List size and SHA-256 of all that is sent, then the request as JSON."""
        lines = [
            f"{len(data):>9,}  {hashlib.sha256(data).hexdigest()}  {name}"
            for name, data in self.files.items()
        ]
        archive_hash = hashlib.sha256(self.archive).hexdigest()
        lines.append(
            f"{len(self.archive):>9,}  {archive_hash}  (the archive of these files)"
        )
        lines.append(json.dumps(self.body, indent=2))
        return lines


def build_job_request(
    config: Config,
    files: Sequence[Path] = (),
    *,
    job_id: str | None = None,
    train_options: Sequence[str] = (),
) -> JobRequest:
    """Build the request that starts a run on a Ray cluster.

    Args:
        config: the run; its paths must mean the same on all nodes.
        files: Python files, or folders of them, to send along for the user's own model,
            loss, optimizer or schedule.
        job_id: Ray's submission id; None: derive it from the run.
        train_options: options of `distrain train`, e.g. --resume.

    Raises:
        UserError: a path is local to this machine, a file is missing or is not a Python
            file, or the archive is larger than Ray accepts.
    """
    check_shared_paths(config)

    # Pack the files.
    sent_files = {
        **_read_package_source(),
        **read_user_files(files),
        JOB_CONFIG_NAME: to_yaml(config).encode(),
    }
    archive = _build_archive(sent_files)
    if len(archive) > _MAX_ARCHIVE_BYTES:
        raise UserError(
            f"the files to send are {len(archive):,} bytes, more than the "
            f"{_MAX_ARCHIVE_BYTES:,} that Ray takes: send only code, and keep data in "
            "a bucket"
        )

    # Describe the job. Ray names an archive by its SHA-1: a name, not a safeguard.
    archive_hash = hashlib.sha1(archive, usedforsecurity=False).hexdigest()
    command = f"python -m distrain train {JOB_CONFIG_NAME} --address auto"
    body = {
        "entrypoint": " ".join([command, *train_options]),
        "submission_id": job_id or derive_job_id(config),
        "runtime_env": {
            "working_dir": f"gcs://_ray_pkg_{archive_hash}.zip",
            "env_vars": build_job_env(config),
        },
        "metadata": build_job_metadata(config),
    }
    return JobRequest(sent_files, archive, body)


def derive_job_id(config: Config) -> str:
    """Derive a job id from the run: the same run always has the same id."""
    run_name = str(config.run).rstrip("/").rpartition("/")[2]
    # All that decides the result of the run; keys sorted, so that the order in which
    # fields are declared does not matter.
    identity = json.dumps([config.run, get_result_fields(config)], sort_keys=True)
    return f"{run_name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def build_job_env(config: Config) -> dict[str, str]:
    """Return the environment variables of a job."""
    return {
        "DISTRAIN_CONSOLE": "json",
        "DISTRAIN_VERSION": distrain.__version__,
        "PYTHONUNBUFFERED": "1",
        # A stopped job saves a checkpoint first; by default Ray kills it after 3 s.
        "RAY_JOB_STOP_WAIT_TIME_S": str(round(config.checkpoint.patience) + 60),
    }


def build_job_metadata(config: Config) -> dict[str, str]:
    """Return the metadata that marks a job as distrain's and names its run."""
    return {"distrain": distrain.__version__, "run": str(config.run)}


def check_shared_paths(config: Config) -> None:
    """Check that other machines can find the data, the run and the first weights.

    Raises:
        UserError: one of them is a relative path.
    """
    paths = {
        "run": config.run,
        "data.train": config.data.train,
        "data.val": config.data.val,
        "model.init_from": config.model.init_from,
    }
    relative_paths = [
        f"{key} = {path}"
        for key, path in paths.items()
        if path is not None and "://" not in path and not path.startswith("/")
    ]
    if relative_paths:
        raise UserError(
            f"relative paths mean nothing on other machines "
            f"({', '.join(relative_paths)}): use URLs of a bucket, or absolute paths "
            "that all nodes of the cluster share"
        )


def _read_package_source() -> dict[str, bytes]:
    """Read distrain as installed here, so that the cluster runs the same version."""
    root = Path(distrain.__file__).parent
    return {
        f"distrain/{path.relative_to(root).as_posix()}": path.read_bytes()
        for path in sorted(root.rglob("*.py"))
    }


def read_user_files(paths: Sequence[Path]) -> dict[str, bytes]:
    """Read Python files to send along, by the paths that they get in the job.

    Raises:
        UserError: a file is missing or is not a Python file.
    """
    contents = {}
    for path in paths:
        if path.suffix != ".py" and not path.is_dir():
            raise UserError(
                f"{path} is not a Python file: --with takes .py files and folders of "
                "them"
            )
        # Of a folder only the Python files: secrets or data beside them stay here.
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            try:
                contents[file.relative_to(path.parent).as_posix()] = file.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {file}: {error.strerror}") from None
    return contents


def _build_archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _ZIP_TIMESTAMP)
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
