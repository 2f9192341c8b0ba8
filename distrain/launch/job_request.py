"""What is sent with a job: distrain's own source, the config, and Python files that are named. Nothing else."""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distrain
from distrain.config import Config, get_result_fields, to_yaml
from distrain.errors import UserError

JOB_CONFIG_NAME = "run.yaml"
_MAX_ARCHIVE_BYTES = 100 << 20
# Earliest time that a zip can hold: the same files make the same archive, which Ray then has already.
_ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class JobRequest:
    """A job as it is sent: the archive, and the rest of the request."""

    files: dict[str, bytes]
    archive: bytes
    body: dict[str, Any]
    """As Ray's job interface takes it."""

    def format_lines(self) -> list[str]:
        """What is sent, for a person: each file with size and SHA-256, and the request as JSON."""
        listed = [
            f"{len(data):>9,}  {hashlib.sha256(data).hexdigest()}  {name}"
            for name, data in self.files.items()
        ]
        whole = f"{len(self.archive):>9,}  {hashlib.sha256(self.archive).hexdigest()}  (the archive of these files)"
        return [*listed, whole, json.dumps(self.body, indent=2)]


def build_job_request(
    config: Config,
    files: Sequence[Path] = (),
    *,
    job_id: str | None = None,
    must_resume: bool = False,
) -> JobRequest:
    """The request that starts a run on a Ray cluster.

    Args:
        config: the run; its paths must mean the same on all nodes.
        files: Python files, or folders of such, to send along, for a model, loss, optimizer or schedule of one's own.
        job: the submission id; None: one that follows from the run.
        must_resume: it is a mistake if there is no checkpoint.

    Raises:
        UserError: a path is of this machine, a file is no Python file or not there, or it is too much.
    """
    check_shared_paths(config)
    sent = {
        **_read_package_source(),
        **read_user_files(files),
        JOB_CONFIG_NAME: to_yaml(config).encode(),
    }
    archive = _build_archive(sent)
    if len(archive) > _MAX_ARCHIVE_BYTES:
        raise UserError(
            f"the files to send are {len(archive):,} bytes, more than the {_MAX_ARCHIVE_BYTES:,} that Ray takes: "
            "send code alone, and keep data in a bucket"
        )
    # Ray names an archive by its SHA-1; as a name, not for safety.
    package = (
        f"gcs://_ray_pkg_{hashlib.sha1(archive, usedforsecurity=False).hexdigest()}.zip"
    )
    body = {
        "entrypoint": f"python -m distrain train {JOB_CONFIG_NAME} --address auto"
        + " --resume" * must_resume,
        "submission_id": job_id or derive_job_id(config),
        "runtime_env": {
            "working_dir": package,
            "env_vars": build_job_env(config),
        },
        "metadata": build_job_metadata(config),
    }
    return JobRequest(sent, archive, body)


def derive_job_id(config: Config) -> str:
    """The id of a run's job where none is given: the same run has the same."""
    name = str(config.run).rstrip("/").rpartition("/")[2]
    decides = hashlib.sha256(
        json.dumps([config.run, get_result_fields(config)], sort_keys=True).encode()
    ).hexdigest()
    return f"{name}-{decides[:8]}"


def build_job_env(config: Config) -> dict[str, str]:
    """The environment of a job."""
    return {
        "DISTRAIN_CONSOLE": "json",
        "DISTRAIN_VERSION": distrain.__version__,
        "PYTHONUNBUFFERED": "1",
        # A job that is stopped saves first; Ray would kill it after 3 s.
        "RAY_JOB_STOP_WAIT_TIME_S": str(round(config.checkpoint.patience) + 60),
    }


def build_job_metadata(config: Config) -> dict[str, str]:
    """What a job is found by."""
    return {"distrain": distrain.__version__, "run": str(config.run)}


def check_shared_paths(config: Config) -> None:
    """Raises UserError where data or the run directory are named by a path that other machines do not share."""
    places = {
        "run": config.run,
        "data.train": config.data.train,
        "data.val": config.data.val,
    }
    for key, place in places.items():
        if place is not None and "://" not in place and not place.startswith("/"):
            raise UserError(
                f"{key} = {place} is a path in a folder of this machine: name a bucket's URL, or an absolute path "
                "that all nodes of the cluster share"
            )


def _read_package_source() -> dict[str, bytes]:
    """distrain as it is installed here, so that the cluster runs the same version."""
    root = Path(distrain.__file__).parent
    return {
        f"distrain/{path.relative_to(root).as_posix()}": path.read_bytes()
        for path in sorted(root.rglob("*.py"))
    }


def read_user_files(paths: Sequence[Path]) -> dict[str, bytes]:
    """Python files to send along, by the names they have there.

    Raises:
        UserError: a file is no Python file, or not there.
    """
    found = {}
    for path in paths:
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        if path.suffix != ".py" and not path.is_dir():
            raise UserError(
                f"{path} is no Python file: --with takes .py files, and folders of such"
            )
        for file in files:
            try:
                found[file.relative_to(path.parent).as_posix()] = file.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {file}: {error.strerror}") from None
    return found


def _build_archive(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(
                zipfile.ZipInfo(name, _ZIP_TIMESTAMP), data, zipfile.ZIP_DEFLATED
            )
    return target.getvalue()
