"""What Ray's job interface answers, as sentences. A real cluster is in tests/cluster/test_submit.py."""

import http.server
import json
import platform
import socket
import threading
from contextlib import closing, contextmanager

import pytest
import ray

from distrain.errors import RunError, UserError
from distrain.launch.job_request import JobRequest
from distrain.launch.ray_jobs import JobInfo, RayJobClient, to_exit_code


@contextmanager
def head(version, *, port=0, metadata=None):
    """Answers as a cluster's head of a version does: asked for it, or given a job.

    Args:
        version: of its Ray.
        port: 0: any.
        metadata: what it says of the cluster.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answers = {
                "/api/version": {"version": "4", "ray_version": version},
                "/api/v0/cluster_metadata": metadata,
                "/api/jobs/": [],
            }
            self.answer(answers.get(self.path, {}))

        def do_POST(self):
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            job_id = body["submission_id"]
            self.answer({"job_id": job_id, "submission_id": job_id})

        def answer(self, value):
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)


def test_a_cluster_with_an_old_ray_is_refused():
    with (
        head("2.40.0") as address,
        pytest.raises(
            UserError,
            match=r"runs Ray 2\.40\.0, and distrain needs 2\.60.*: install 'ray\[default\]==2",
        ),
    ):
        RayJobClient(address)


@pytest.mark.parametrize(
    ("version", "python", "expected"),
    [
        ("2.61.0", "3.12.1", "runs Ray 2.61.0 and Python 3.12.1, this machine Ray "),
        (ray.__version__, "3.8.2", f"runs Ray {ray.__version__} and Python 3.8.2, "),
        (ray.__version__, platform.python_version(), None),
        # The patch version of Python does not matter.
        (ray.__version__, platform.python_version() + "1", None),
    ],
)
def test_a_job_on_other_versions_is_told_once(version, python, expected):
    told = []
    request = JobRequest(
        {}, b"", {"submission_id": "x", "entrypoint": "true", "runtime_env": {}}
    )
    with head(version, metadata={"data": {"pythonVersion": python}}) as address:
        job = RayJobClient(address, log=told.append).submit_job(request)
    assert job == ("x", True)
    if expected is None:
        assert told == []
        return
    own = f"Ray {ray.__version__} and Python {platform.python_version()}"
    (note,) = told
    assert expected in note
    assert f"this machine {own}: the job uses the cluster's; install" in note


@pytest.mark.parametrize("metadata", [None, {}, [], {"data": {}}])
def test_a_head_that_does_not_tell_its_python_takes_jobs(metadata):
    told = []
    request = JobRequest(
        {}, b"", {"submission_id": "x", "entrypoint": "true", "runtime_env": {}}
    )
    with head("2.61.0", metadata=metadata) as address:
        RayJobClient(address, log=told.append).submit_job(request)
    assert "runs Ray 2.61.0, this machine" in told[0]


def test_a_head_that_is_starting_is_waited_for():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started, over = threading.Event(), threading.Event()

    def late():
        started.wait()
        with head("2.60.0", port=port):
            over.wait(30)

    thread = threading.Thread(target=late)
    thread.start()
    threading.Timer(0.5, started.set).start()
    try:
        RayJobClient(f"http://127.0.0.1:{port}")
    finally:
        started.set()
        over.set()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_head_of_this_network_is_reached_around_proxies(proxy, host):
    with head("2.60.0") as address:
        RayJobClient(address.replace("127.0.0.1", host), patience=0.0)
    assert proxy == []


def test_nobody_there_is_a_sentence():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(
        UserError,
        match=f"no Ray cluster answers at http://127.0.0.1:{port}: pass the URL",
    ):
        RayJobClient(f"127.0.0.1:{port}", patience=0.0)
    told = []
    with pytest.raises(UserError, match="no Ray cluster answers"):
        RayJobClient(f"127.0.0.1:{port}", patience=0.1, log=told.append)
    assert told == [f"http://127.0.0.1:{port} does not answer yet: retrying for 0 s"]


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [
        ("SUCCEEDED", 0, 0),
        ("STOPPED", None, 143),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),
        ("FAILED", 1, 1),
    ],
)
def test_a_job_ends_with_the_code_of_its_program(status, code, wanted):
    assert to_exit_code(JobInfo("x", status, "run", 0.0, "message", code)) == wanted


def test_a_job_that_never_began_says_why():
    with pytest.raises(RunError, match="job x failed: no room"):
        to_exit_code(JobInfo("x", "FAILED", "run", 0.0, "no\nroom", None))
