"""Jobs on a Ray cluster through Ray's job interface: submit, follow, list, stop.

The interface is HTTP on the port of the head's dashboard. A job is `distrain train` on
the head; it keeps running when the user who submitted it disconnects.
"""

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from distrain.data.storage.proxies import must_bypass_proxies
from distrain.data.storage.retry import call_with_retries
from distrain.errors import RunError, UserError
from distrain.launch.job_request import JobRequest
from distrain.launch.ray_versions import Versions, describe_job_versions
from distrain.monitor.consoles import replay_line
from distrain.monitor.sinks import Console

_MIN_RAY_VERSION = (2, 60)
_TERMINAL_STATUSES = ("SUCCEEDED", "FAILED", "STOPPED")
# Seconds without a line after which the connection for the log is opened anew.
_LOG_TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 0.5
_RETRY_SECONDS = 2.0
# Refusals in a row after which one counts as final.
_MAX_REFUSALS = 15
# Seconds to connect to the head, and to wait for its answer.
_HTTP_TIMEOUTS = (5, 60)


class JobInfo(NamedTuple):
    """A job of distrain's on a cluster."""

    id: str
    status: str
    run: str
    start_time: float
    """Unix time in seconds."""
    message: str
    exit_code: int | None


class RayJobClient:
    """Client for the jobs of a cluster."""

    def __init__(
        self,
        address: str,
        *,
        patience: float = 30.0,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Connect to the head of a cluster.

        Args:
            address: of the head's dashboard, as host:port or URL.
            patience: seconds for which a head that does not answer yet is retried.
            log: gets a line when the first try has failed, and one if a submitted job
                will run with other versions of Ray or Python than this machine's.

        Raises:
            UserError: no cluster answers there, the token is wrong, or its Ray is too
                old.
        """
        # Explicitly: if it is unset, parts of Ray use the token file and others do not.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        self._address = address if "://" in address else f"http://{address}"
        self._log = log

        def try_connect() -> Any:
            with self._translate_errors():
                return _create_client(self._address)

        def log_first_failure(_: OSError, failures: int) -> None:
            if failures == 1:
                seconds = f"{patience:.0f} s"
                log(f"{self._address} does not answer yet: retrying for {seconds}")

        try:
            self._client = call_with_retries(
                try_connect,
                patience,
                should_retry=lambda error: isinstance(error, ConnectionError),
                on_retry=log_first_failure,
            )
        except ConnectionError:
            raise UserError(
                f"no Ray cluster answers at {self._address}: pass the URL of the "
                "head's dashboard with --address or RAY_API_SERVER_ADDRESS (usually "
                "port 8265; the head needs ray[default])"
            ) from None

    def submit_job(self, request: JobRequest) -> tuple[str, bool]:
        """Start a job, unless the same request is pending or running.

        If a job of that id has ended, a number is appended to the id.

        Returns:
            The job's id, and True if it was started now.

        Raises:
            UserError: the cluster refuses it.
        """
        with self._translate_errors():
            # Find an id that is free or that of a job that has not ended.
            jobs = {job.id: job for job in self.list_jobs()}
            requested_id = request.body["submission_id"]
            job_id = requested_id
            number = 1
            while job_id in jobs and jobs[job_id].status in _TERMINAL_STATUSES:
                number += 1
                job_id = f"{requested_id}-{number}"
            if job_id in jobs:
                return job_id, False
            if note := describe_job_versions(self._address, self._fetch_versions()):
                self._log(note)

            # Ray's client uploads the archive from a file.
            with tempfile.TemporaryDirectory(prefix="distrain-") as folder:
                archive = Path(folder) / "job.zip"
                archive.write_bytes(request.archive)
                runtime_env = {
                    **request.body["runtime_env"],
                    "working_dir": str(archive),
                }
                body = {
                    **request.body,
                    "submission_id": job_id,
                    "runtime_env": runtime_env,
                }
                self._client.submit_job(**body)
        return job_id, True

    def _fetch_versions(self) -> Versions:
        """Return the cluster's versions: of Ray, and of Python if its head tells it."""
        response = self._client._do_request("GET", "/api/v0/cluster_metadata")
        python_version = ""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            python_version = response.json()["data"]["pythonVersion"]
        return Versions(str(self._client._server_ray_version), python_version)

    def list_jobs(self) -> list[JobInfo]:
        """List the jobs that distrain submitted, oldest first."""
        with self._translate_errors():
            jobs = [
                _to_job_info(details)
                for details in self._client.list_jobs()
                if (details.metadata or {}).get("distrain")
            ]
        return sorted(jobs, key=lambda job: job.start_time)

    def get_job_info(self, job_id: str) -> JobInfo:
        """Return a job. Raises UserError if no job has that id."""
        with self._translate_errors():
            return _to_job_info(self._client.get_job_info(job_id))

    def stop_job(self, job_id: str, console: Console) -> JobInfo:
        """Ask a job to save and stop, and wait until it has ended."""
        job = self.get_job_info(job_id)
        if job.status not in _TERMINAL_STATUSES:
            with self._translate_errors():
                self._client.stop_job(job_id)
            console.log(f"{job_id}: asked to save and stop")
        while (job := self.get_job_info(job_id)).status not in _TERMINAL_STATUSES:
            time.sleep(_POLL_SECONDS)
        return job

    def read_log_lines(self, job_id: str) -> Iterator[str]:
        """Yield the lines that a job has written so far."""
        # Raises if no job has that id.
        self.get_job_info(job_id)
        with self._translate_errors():
            yield from str(self._client.get_job_logs(job_id)).splitlines()

    def follow_job(self, job_id: str, console: Console) -> JobInfo:
        """Show what a job writes until it has ended; reconnect if needed.

        Raises:
            UserError: no job has that id, now or after the cluster has restarted.
        """
        log_replayer = _LogReplayer(console)
        is_disconnected = False
        num_refusals = 0
        # Outside of the loop: an id that does not exist from the start is final.
        self.get_job_info(job_id)
        while True:
            try:
                # Ask for something small first, to know that the connection is back.
                self.get_job_info(job_id)
                if is_disconnected:
                    console.log("reconnected")
                is_disconnected = False
                log_replayer.replay(_tail_job_log(self._client, job_id))
                job = self.get_job_info(job_id)
                num_refusals = 0
            except (UserError, OSError, RuntimeError, asyncio.TimeoutError) as error:
                # A head that is restarting may refuse for a while.
                num_refusals += isinstance(error, UserError)
                if num_refusals > _MAX_REFUSALS:
                    raise
                # A log without news is not a broken connection: reconnect silently.
                is_silent = isinstance(error, asyncio.TimeoutError)
                if not is_disconnected and not is_silent:
                    console.log(
                        "lost the connection to the cluster: retrying (the job keeps "
                        "running)"
                    )
                    is_disconnected = True
                time.sleep(_RETRY_SECONDS)
                continue
            if job.status in _TERMINAL_STATUSES:
                log_replayer.finish()
                return job
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Translate errors of Ray's, and those of the HTTP connection.

        Raises:
            UserError: the token is wrong, the job does not exist, or Ray refused.
            ConnectionError: the connection failed.
        """
        from ray.exceptions import AuthenticationError
        from requests.exceptions import RequestException

        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"the cluster at {self._address} requires a token, and yours is "
                "missing or wrong: put the cluster's into RAY_AUTH_TOKEN or "
                "~/.ray/auth_token"
            ) from None
        except RequestException as error:
            raise ConnectionError(type(error).__name__) from None
        except RuntimeError as error:
            # Ray has one class for the rest: its text tells the cases apart.
            text = " ".join(str(error).split())
            if "does not exist" in text:
                raise UserError(
                    f"there is no such job on {self._address}: list them with "
                    "`distrain jobs`"
                ) from None
            raise UserError(
                f"the cluster at {self._address} refused the request: {text[:300]}"
            ) from None


class _LogReplayer:
    """Shows the lines of a log that is read from its beginning after each reconnect."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._num_chars_seen = 0
        self._unfinished_line = ""

    def replay(self, chunks: Iterable[str]) -> None:
        """Show the whole lines in a log that were not shown before.

        Args:
            chunks: the log from its beginning. If reading them raises, the next call
                resumes after the last chunk.
        """
        num_to_skip = self._num_chars_seen
        for chunk in chunks:
            new_text = chunk[num_to_skip:]
            num_to_skip = max(0, num_to_skip - len(chunk))
            self._num_chars_seen += len(new_text)
            # The text after the last newline waits for its rest.
            text = self._unfinished_line + new_text
            *lines, self._unfinished_line = text.split("\n")
            for line in lines:
                replay_line(line, self._console)

    def finish(self) -> None:
        """Show the last line, if it does not end with a newline."""
        if self._unfinished_line:
            replay_line(self._unfinished_line, self._console)


def _create_client(address: str) -> Any:
    """Connect Ray's client for jobs.

    Raises:
        UserError: Ray is not installed here with its job client, or the cluster's Ray
            is too old.
    """
    try:
        import ray
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UserError(
            f"jobs need Ray on this machine too ({error}): pip install 'distrain[jobs]'"
        ) from None

    # Keep Ray's own lines on uploads and connections off the user's terminal.
    for name in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)

    # Ray's client would wait forever for a head that does not answer.
    request_options: dict[str, Any] = {"timeout": _HTTP_TIMEOUTS}
    if must_bypass_proxies(address):
        request_options["proxies"] = {"no_proxy": "*"}

    class ClientWithTimeout(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            options = {**request_options, **options}
            return super()._do_request(*arguments, **options)

    client = ClientWithTimeout(address)
    version = str(client._server_ray_version)
    if tuple(int(part) for part in version.split(".")[:2]) < _MIN_RAY_VERSION:
        min_version = ".".join(map(str, _MIN_RAY_VERSION))
        raise UserError(
            f"the cluster at {address} runs Ray {version}, and distrain needs "
            f"{min_version} or newer (here: {ray.__version__}): install "
            f"'ray[default]=={ray.__version__}' on the cluster"
        )
    return client


def _tail_job_log(client: Any, job_id: str) -> Iterator[str]:
    """Yield the log of a job from its beginning, as it grows, until the job ends.

    Raises:
        asyncio.TimeoutError: a minute has passed without a line.
        OSError, RuntimeError: the log cannot be read, usually because the connection
            broke.
    """
    # Ray's log is an asynchronous generator: an event loop of its own drives it here.
    loop = asyncio.new_event_loop()
    try:
        tail = client.tail_job_logs(job_id)
        while True:
            try:
                yield loop.run_until_complete(
                    asyncio.wait_for(anext(tail), _LOG_TIMEOUT_SECONDS)
                )
            except StopAsyncIteration:
                return
            except Exception as error:
                if isinstance(error, (OSError, RuntimeError, asyncio.TimeoutError)):
                    raise
                # One of aiohttp's own errors.
                raise ConnectionError(str(error)) from None
    finally:
        with contextlib.suppress(Exception):
            loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _to_job_info(details: Any) -> JobInfo:
    """Convert Ray's details of a job. Its times are in milliseconds."""
    metadata = details.metadata or {}
    return JobInfo(
        id=details.submission_id or details.job_id,
        status=str(getattr(details.status, "value", details.status)),
        run=metadata.get("run", ""),
        start_time=(details.start_time or 0) / 1000,
        message=details.message or "",
        exit_code=details.driver_exit_code,
    )


def to_exit_code(job: JobInfo) -> int:
    """Return the exit code that `distrain train` would have had on this machine.

    Raises:
        RunError: the job never began.
    """
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return 128 + signal.SIGTERM
    if job.exit_code is None:
        raise RunError(f"job {job.id} failed: {' '.join(job.message.split())[:500]}")
    # A negative code is the signal that ended the program: shells add it to 128.
    return job.exit_code if job.exit_code >= 0 else 128 - job.exit_code
