"""`--workers N` starts a Ray of this machine's own, whatever the environment was set for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster


def test_a_ray_of_its_own_whatever_the_environment_says(tmp_path, plain):
    """Below something that Ray takes for `uv run`, inside of a job, in a long TMPDIR, behind a proxy."""
    long = tmp_path / ("l" * 60)
    long.mkdir()
    # Ray looks for an ancestor whose command line begins with uv, run.
    (tmp_path / "run").write_text('"$@"\nexit $?\n')
    (tmp_path / "shards.bin").write_bytes(os.urandom(1 << 20))
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}, "metadata": {}}
    environment = {
        **os.environ,
        **plain,
        "RAY_ADDRESS": "127.0.0.1:1",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job),
        "RAY_RUNTIME_ENV_HOOK": "nowhere.hook",
        "TMPDIR": str(long),
        "http_proxy": "http://127.0.0.1:1",
        "HTTP_PROXY": "http://127.0.0.1:1",
    }
    distrain = Path(sys.executable).parent / "distrain"
    words = f"{distrain} train quickstart --workers 2 epochs=1 metrics.port=null"
    done = subprocess.run(
        ["bash", "-c", f"exec -a uv sh run {words}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker group formed: 2 workers" in done.stdout
    assert "finished 22 steps" in done.stdout
    assert not list(long.iterdir())
