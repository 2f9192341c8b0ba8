"""Ray's refusals of a connection whose versions differ, as sentences."""

import platform

import pytest
import ray
from ray._private import utils

from distrain.errors import UserError
from distrain.launch.ray_cluster import connect_to_ray

OWN_PYTHON = platform.python_version()


@pytest.fixture
def cluster(monkeypatch):
    """Versions of a cluster, against which Ray's own function compares ours."""
    versions = {"ray_version": ray.__version__, "python_version": OWN_PYTHON}

    def init(*, address, **_):
        # As its worker and its client call it.
        if address.startswith("ray://"):
            utils.check_version_info(
                versions, "Ray Client", python_version_match_level="minor"
            )
        else:
            utils.check_version_info(versions, "node 10.0.0.3")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr("distrain.launch.ray_cluster._probe_address", lambda _: None)
    return versions


@pytest.mark.parametrize("address", ["auto", "head:6379", "ray://head:10001"])
@pytest.mark.parametrize(
    ("ray_version", "python", "remedy"),
    [
        ("2.61.0", OWN_PYTHON, "pip install 'ray==2.61.0' here"),
        (ray.__version__, "3.8.2", "use Python 3.8.2 here"),
        ("2.9.3", "3.8.2", "pip install 'ray==2.9.3' and use Python 3.8.2 here"),
    ],
)
def test_both_sides_of_a_mismatch_are_named(
    console, cluster, address, ray_version, python, remedy
):
    cluster.update(ray_version=ray_version, python_version=python)
    with pytest.raises(UserError) as caught, connect_to_ray(address, console):
        pass
    assert str(caught.value) == (
        f"the cluster at {address} runs Ray {ray_version} and Python {python}, this "
        f"machine Ray {ray.__version__} and Python {OWN_PYTHON}, and the two must be "
        f"equal: {remedy}, or install this machine's versions there"
    )


@pytest.mark.parametrize("address", ["auto", "head:6379", "ray://head:10001"])
def test_equal_versions_connect(console, cluster, address):
    with connect_to_ray(address, console):
        pass
