"""What Ray would take from the environment against what the user asked distrain for."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray

from distrain.errors import UserError

_ADDRESS_VARIABLE = "RAY_ADDRESS"
# With these a Ray of this machine's own would be part of something else: of a cluster,
# of the job that this process belongs to, or of the user's hook.
_FOREIGN_VARIABLES = (
    _ADDRESS_VARIABLE,
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_RUNTIME_ENV_HOOK",
)
# Below `uv run`, Ray would send the current folder, data and all, to its workers, and
# start each of them through uv.
_UV_VARIABLE = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
# A path of a Unix socket has at most 107 bytes. Ray's are 64 longer than its folder:
# "/session_", time, process number and "/sockets/plasma_store".
_MAX_FOLDER_BYTES = 107 - 64
_FOLDER_PREFIX = "distrain-ray-"
_SHORT_FOLDER = Path("/tmp")  # noqa: S108


@contextmanager
def ignore_foreign_settings(address: str | None) -> Iterator[None]:
    """Keep settings that were meant for other programs from Ray, for the block.

    Args:
        address: of the cluster to connect to; None: Ray is to be this machine's own,
            which belongs to nothing else.
    """
    changes: dict[str, str | None] = {_UV_VARIABLE: "0"}
    if address is None:
        changes.update(dict.fromkeys(_FOREIGN_VARIABLES))
    # The dashboard's, for `ray job submit`: nothing that Ray can connect to.
    if os.environ.get(_ADDRESS_VARIABLE, "").startswith(("http://", "https://")):
        changes[_ADDRESS_VARIABLE] = None
    with _change_environment(changes), _disable_uv_hook():
        yield


@contextmanager
def _change_environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables for the block; None: remove it."""
    previous = {name: os.environ.get(name) for name in changes}
    _update_environment(changes)
    try:
        yield
    finally:
        _update_environment(previous)


def _update_environment(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _disable_uv_hook() -> Iterator[None]:
    """Set what Ray has made of `_UV_VARIABLE` when it was imported, for the block.

    If a later Ray keeps it elsewhere, nothing is changed here.
    """
    constants = ray._private.ray_constants
    previous = getattr(constants, _UV_VARIABLE, None)
    if previous is None:
        yield
        return
    setattr(constants, _UV_VARIABLE, False)
    try:
        yield
    finally:
        setattr(constants, _UV_VARIABLE, previous)


def make_ray_folder() -> str:
    """Make a temporary folder whose path is short enough for the sockets of Ray.

    It is in TMPDIR unless that is too long.

    Raises:
        UserError: no folder is short enough.
    """
    for parent in (Path(tempfile.gettempdir()), _SHORT_FOLDER):
        # mkdtemp appends eight characters.
        num_bytes = len(os.fsencode(parent / f"{_FOLDER_PREFIX}12345678"))
        if num_bytes <= _MAX_FOLDER_BYTES and os.access(parent, os.W_OK | os.X_OK):
            return tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=parent)
    raise UserError(
        f"TMPDIR is {tempfile.gettempdir()}, too long for the sockets of Ray, and "
        f"{_SHORT_FOLDER} cannot be written: set TMPDIR to a path of at most "
        f"{_MAX_FOLDER_BYTES - len(_FOLDER_PREFIX) - 9} bytes"
    )
