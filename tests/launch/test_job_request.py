"""What is sent with a job, and what is not."""

import hashlib
import io
import json
import subprocess
import sys
import zipfile

import pytest

from distrain.config import load_config, to_yaml
from distrain.errors import UserError
from distrain.launch import job_request
from distrain.launch.job_request import build_job_request
from distrain.result_fields import get_result_fields


@pytest.fixture
def config(narrow, tmp_path):
    return narrow(run="s3://bucket/runs/mine")


def test_the_archive_has_the_source_the_config_and_nothing_else(config, tmp_path):
    found = build_job_request(config)
    with zipfile.ZipFile(io.BytesIO(found.archive)) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "there")
    assert "run.yaml" in names
    assert {name for name in names if not name.startswith("distrain/")} == {"run.yaml"}
    assert all(name.endswith(".py") for name in names if name != "run.yaml")
    assert load_config(tmp_path / "there/run.yaml") == config
    code = "import distrain.trainer, sys; print(distrain.__file__)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "there",
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.startswith(str(tmp_path / "there")), (
        "it is whole, and comes before what is installed"
    )


def test_the_same_run_is_the_same_request(config):
    assert build_job_request(config) == build_job_request(config)
    other = build_job_request(config.model_copy(update={"seed": 3}))
    assert (
        other.body["submission_id"] != build_job_request(config).body["submission_id"]
    )
    assert build_job_request(config, job_id="mine").body["submission_id"] == "mine"
    assert (
        build_job_request(config, train_options=["--resume"])
        .body["entrypoint"]
        .endswith(" --resume")
    )


def test_the_package_is_named_as_ray_names_it(config, tmp_path):
    from ray._private.runtime_env.packaging import get_uri_for_package

    found = build_job_request(config)
    (tmp_path / "job.zip").write_bytes(found.archive)
    assert found.body["runtime_env"]["working_dir"] == get_uri_for_package(
        tmp_path / "job.zip"
    )


def test_no_variable_of_this_machine_is_sent(config, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    found = build_job_request(config)
    assert b"hunter2" not in found.archive
    assert "hunter2" not in json.dumps(found.body)
    assert set(found.body["runtime_env"]["env_vars"]) == {
        "DISTRAIN_CONSOLE",
        "DISTRAIN_VERSION",
        "PYTHONUNBUFFERED",
        "RAY_JOB_STOP_WAIT_TIME_S",
    }


def test_own_files_go_along_and_others_are_refused(config, tmp_path):
    (tmp_path / "nets/.git").mkdir(parents=True)
    (tmp_path / "nets/wide.py").write_text("x = 1")
    (tmp_path / "nets/.env").write_text("SECRET=hunter2")
    (tmp_path / "one.py").write_text("y = 2")
    found = build_job_request(config, [tmp_path / "nets", tmp_path / "one.py"])
    assert {name for name in found.files if not name.startswith("distrain/")} == {
        "nets/wide.py",
        "one.py",
        "run.yaml",
    }
    with pytest.raises(UserError, match="is not a Python file"):
        build_job_request(config, [tmp_path / "nets/.env"])
    with pytest.raises(UserError, match="cannot read"):
        build_job_request(config, [tmp_path / "none.py"])


@pytest.mark.parametrize("key", ["run", "data.train", "data.val", "model.init_from"])
def test_a_path_of_this_machine_is_refused(narrow, key):
    section, _, name = key.rpartition(".")
    config = narrow(run="s3://bucket/run")
    if section:
        changed = getattr(config, section).model_copy(update={name: "data/here"})
        config = config.model_copy(update={section: changed})
    else:
        config = config.model_copy(update={"run": "runs/here"})
    with pytest.raises(
        UserError, match=rf"relative paths mean nothing .*{key} = (data|runs)/here[,)]"
    ):
        build_job_request(config)


def test_too_much_is_refused(config, monkeypatch):
    monkeypatch.setattr(job_request, "_MAX_ARCHIVE_BYTES", 1000)
    with pytest.raises(UserError, match="more than the 1,000 that Ray takes"):
        build_job_request(config)


def test_a_dry_run_prints_what_would_be_sent_and_needs_no_ray(config, tmp_path):
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    code = (
        "import sys; sys.modules['ray'] = None; sys.argv[0] = 'distrain'; from distrain.cli.main import main; main();"
        "assert not {'torch', 'pyarrow'} & set(sys.modules)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "submit",
        str(tmp_path / "recipe.yaml"),
        "--dry-run",
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = build_job_request(config)
    lines, body = out[: out.index("{")].splitlines(), json.loads(out[out.index("{") :])
    assert body == found.body
    wanted = {
        name: hashlib.sha256(data).hexdigest() for name, data in found.files.items()
    }
    assert {line.split()[2]: line.split()[1] for line in lines[:-1]} == wanted
    assert hashlib.sha256(found.archive).hexdigest() in lines[-1]


def test_the_id_of_a_job_does_not_depend_on_the_order_of_fields(narrow, monkeypatch):
    config, before = narrow(), job_request.derive_job_id(narrow())
    monkeypatch.setattr(
        job_request,
        "get_result_fields",
        lambda c: dict(reversed(get_result_fields(c).items())),
    )
    assert job_request.derive_job_id(config) == before
