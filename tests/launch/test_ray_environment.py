import os
import tempfile
from pathlib import Path

import pytest
import ray

from distrain.errors import UserError
from distrain.launch import ray_environment
from distrain.launch.ray_cluster import connect_to_ray

FOREIGN = {
    "RAY_ADDRESS": "10.1.2.3:6379",
    "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {"working_dir": "gcs://x.zip"}}',
    "RAY_RUNTIME_ENV_HOOK": "site.hooks.hook",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1",
}


@pytest.fixture
def started(monkeypatch):
    """What Ray is started with, and what it would find in the environment."""
    found = {}

    def init(**options):
        found.update(options)
        found["environment"] = dict(os.environ)
        constants = ray._private.ray_constants
        found["uv"] = constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    # connect_to_ray sets defaults, which the test must not leave behind.
    for name in list(os.environ):
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    return found


def test_a_ray_of_its_own_is_part_of_nothing_else(console, started):
    with connect_to_ray(None, console, cpus=1):
        pass
    assert started["address"] == "local"
    environment = started["environment"]
    assert not {"RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"} & set(environment)
    assert "RAY_RUNTIME_ENV_HOOK" not in environment
    assert environment["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"
    assert started["uv"] is False
    # Afterwards all is as before.
    assert {name: os.environ[name] for name in FOREIGN} == FOREIGN
    assert ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV is True


def test_a_cluster_keeps_its_jobs_settings_but_nothing_of_uv(console, started):
    with connect_to_ray("auto", console):
        pass
    environment = started["environment"]
    assert environment["RAY_ADDRESS"] == FOREIGN["RAY_ADDRESS"]
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment
    assert environment["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"
    assert started["uv"] is False


@pytest.mark.parametrize("url", ["http://head:8265", "https://head"])
def test_the_dashboards_address_is_none_to_connect_to(
    console, started, monkeypatch, url
):
    monkeypatch.setenv("RAY_ADDRESS", url)
    with connect_to_ray("auto", console):
        pass
    assert "RAY_ADDRESS" not in started["environment"]


def test_the_folder_is_in_tmpdir_unless_that_is_too_long(monkeypatch, tmp_path):
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setattr(ray_environment, "_SHORT_FOLDER", short)
    try:
        for name, is_long in (("s", False), ("l" * 60, True)):
            folder = short / name
            folder.mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(folder))
            made = Path(ray_environment.make_ray_folder())
            assert made.parent == (short if is_long else folder)
            made.rmdir()
            folder.rmdir()
    finally:
        short.rmdir()


def test_no_folder_is_short_enough(monkeypatch, tmp_path):
    long = tmp_path / ("l" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(ray_environment, "_SHORT_FOLDER", tmp_path / "none")
    message = r"TMPDIR is .*, too long for the sockets of Ray, .*: set TMPDIR to a path"
    with pytest.raises(UserError, match=message):
        ray_environment.make_ray_folder()
