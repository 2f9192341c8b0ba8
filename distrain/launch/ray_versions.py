"""Versions of Ray and Python: those of this process, and those of a cluster."""

import platform
import re
from typing import NamedTuple

# Ray's message for versions that differ has those of the cluster first, then ours.
_MISMATCH_PATTERN = re.compile(
    r"Version mismatch: The cluster was started with:"
    r"\s*Ray: (?P<ray>\S+)\s*Python: (?P<python>\S+)"
)


class Versions(NamedTuple):
    """Versions of Ray and of Python."""

    ray: str
    python: str = ""
    """Empty: not known."""

    def __str__(self) -> str:
        """Return them in words."""
        python = f" and Python {self.python}" if self.python else ""
        return f"Ray {self.ray}{python}"


def get_own_versions() -> Versions:
    """Return the versions of this process."""
    # A dry run of a job needs no Ray.
    import ray

    return Versions(ray.__version__, platform.python_version())


def explain_version_mismatch(address: str, error: BaseException) -> str | None:
    """Return a sentence if Ray refused to connect since versions differ, else None.

    Args:
        address: of the cluster.
        error: what Ray raised.
    """
    found = _MISMATCH_PATTERN.search(str(error))
    if found is None:
        return None
    cluster = Versions(found["ray"], found["python"])
    own = get_own_versions()
    remedies = []
    if cluster.ray != own.ray:
        remedies.append(f"pip install 'ray=={cluster.ray}'")
    if cluster.python != own.python:
        remedies.append(f"use Python {cluster.python}")
    return (
        f"the cluster at {address} runs {cluster}, this "
        f"machine {own}, and the two must be equal: {' and '.join(remedies)} here, or "
        "install this machine's versions there"
    )


def describe_job_versions(address: str, cluster: Versions) -> str | None:
    """Return a note if a job will run with other versions than this machine's.

    Patch versions of Python make no difference to a job.

    Args:
        address: of the cluster.
        cluster: its versions.
    """
    own = get_own_versions()
    has_other_ray = cluster.ray != own.ray
    is_same_python = cluster.python.split(".")[:2] == own.python.split(".")[:2]
    has_other_python = cluster.python != "" and not is_same_python
    if not has_other_ray and not has_other_python:
        return None
    return (
        f"the cluster at {address} runs {cluster}, this machine {own}: the job uses "
        "the cluster's; install those here to try your code with them"
    )
