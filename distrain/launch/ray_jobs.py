"""Jobs on a Ray cluster, by Ray's job interface (HTTP, the dashboard's port): submit, follow, list, stop.

The job is `distrain train` on the cluster's head; it lives on when whoever submitted it goes.
"""

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from distrain.data.storage.retry import call_with_retries
from distrain.errors import RunError, UserError
from distrain.launch.job_request import JobRequest
from distrain.monitor.consoles import replay_line
from distrain.monitor.sinks import Console

_MIN_RAY_VERSION = (2, 60)
_TERMINAL_STATUSES = ("SUCCEEDED", "FAILED", "STOPPED")
# Seconds without a line after which the connection that brings them is made anew.
_LOG_TIMEOUT_SECONDS = 60.0
_RETRY_SECONDS = 2.0
_MAX_REFUSALS = 15


class JobInfo(NamedTuple):
    """A job of distrain's on a cluster."""

    id: str
    status: str
    run: str
    start_time: float
    """Unix time."""
    message: str
    exit_code: int | None


class RayJobClient:
    """The jobs of a cluster."""

    def __init__(
        self,
        address: str,
        *,
        patience: float = 30.0,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Connect. A head that does not answer yet is asked again for `patience` seconds; `tell` is told of that.

        Raises:
            UserError: nobody answers there, the token is wrong, or its Ray is too old.
        """
        # Explicitly: unset, parts of Ray follow the token file and others do not.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        self._address = address if "://" in address else f"http://{address}"

        def try_connect() -> Any:
            with self._translate_errors():
                return _create_client(self._address)

        def log_first_failure(_: OSError, failures: int) -> None:
            if failures == 1:
                log(f"{self._address} does not answer yet: asking for {patience:.0f} s")

        try:
            self._client = call_with_retries(
                try_connect,
                patience,
                should_retry=lambda e: isinstance(e, ConnectionError),
                on_retry=log_first_failure,
            )
        except ConnectionError:
            raise UserError(
                f"no Ray cluster answers at {self._address}: check the address; it is that of the head's dashboard, "
                "port 8265 as a rule, and the head needs ray[default]"
            ) from None

    def submit_job(self, request: JobRequest) -> tuple[str, bool]:
        """Start a job, or find it if it is there already; its id, and whether it was started now.

        The same request whose job has ended before gets a new number behind its id.

        Raises:
            UserError: the cluster refuses it.
        """
        with self._translate_errors():
            known = {job.id: job for job in self.list_jobs()}
            wanted = name = request.body["submission_id"]
            number = 1
            while name in known and known[name].status in _TERMINAL_STATUSES:
                number += 1
                name = f"{wanted}-{number}"
            if name in known:
                return name, False
            with tempfile.TemporaryDirectory(prefix="distrain-") as folder:
                archive = Path(folder) / "job.zip"
                archive.write_bytes(request.archive)
                environment = {
                    **request.body["runtime_env"],
                    "working_dir": str(archive),
                }
                self._client.submit_job(
                    **{
                        **request.body,
                        "submission_id": name,
                        "runtime_env": environment,
                    }
                )
        return name, True

    def list_jobs(self) -> list[JobInfo]:
        """The jobs that distrain submitted, oldest first."""
        with self._translate_errors():
            found = [
                info
                for info in self._client.list_jobs()
                if (info.metadata or {}).get("distrain")
            ]
        return sorted(
            (_to_job_info(info) for info in found), key=lambda job: job.start_time
        )

    def get_job_info(self, job_id: str) -> JobInfo:
        """A job. Raises UserError if there is none of that id."""
        with self._translate_errors():
            return _to_job_info(self._client.get_job_info(job_id))

    def stop_job(self, job_id: str, console: Console) -> JobInfo:
        """Have a job save and end, and wait for that."""
        job = self.get_job_info(job_id)
        if job.status not in _TERMINAL_STATUSES:
            with self._translate_errors():
                self._client.stop_job(job_id)
            console.log(f"{job_id}: asked to save and stop")
        while (job := self.get_job_info(job_id)).status not in _TERMINAL_STATUSES:
            time.sleep(0.5)
        return job

    def read_log_lines(self, job_id: str) -> Iterator[str]:
        """What a job has written so far."""
        self.get_job_info(job_id)
        with self._translate_errors():
            yield from str(self._client.get_job_logs(job_id)).splitlines()

    def follow_job(self, job_id: str, console: Console) -> JobInfo:
        """Show what a job writes until it has ended; a connection that breaks is made anew.

        Raises:
            UserError: there is no such job, or not any more.
        """
        seen, rest, lost, refused = 0, "", False, 0
        self.get_job_info(job_id)
        while True:
            try:
                job = self.get_job_info(job_id)
                if lost:
                    console.log("connected again")
                lost = False
                skip = seen
                for text in _tail_job_log(self._client, job_id):
                    part, skip = text[skip:], max(0, skip - len(text))
                    seen += len(part)
                    *whole, rest = (rest + part).split("\n")
                    for line in whole:
                        replay_line(line, console)
                job = self.get_job_info(job_id)
                refused = 0
            except (
                UserError,
                ConnectionError,
                OSError,
                RuntimeError,
                asyncio.TimeoutError,
            ) as error:
                refused += isinstance(
                    error, UserError
                )  # a head that is coming up again may do so for a while
                if refused > _MAX_REFUSALS:
                    raise
                if not lost and not isinstance(error, asyncio.TimeoutError):
                    console.log(
                        "the connection to the cluster is lost: trying again (the job goes on)"
                    )
                    lost = True
                time.sleep(_RETRY_SECONDS)
                continue
            if job.status in _TERMINAL_STATUSES:
                if rest:
                    replay_line(rest, console)
                return job
            time.sleep(0.5)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Ray's errors as sentences; a connection that fails stays a ConnectionError."""
        from ray.exceptions import AuthenticationError
        from requests.exceptions import RequestException

        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"the cluster at {self._address} wants a token, and takes none or another one than yours: put the "
                "cluster's into RAY_AUTH_TOKEN or ~/.ray/auth_token"
            ) from None
        except RequestException as error:
            raise ConnectionError(type(error).__name__) from None
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if "does not exist" in text:
                raise UserError(
                    f"no such job on {self._address}: see `distrain jobs`"
                ) from None
            raise UserError(
                f"the cluster at {self._address} refused: {text[:300]}"
            ) from None


def _create_client(address: str) -> Any:
    try:
        import ray
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UserError(
            f"jobs need Ray on this machine too ({error}): pip install 'distrain[jobs]'"
        ) from None

    for name in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)

    class ClientWithTimeout(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": (5, 60), **options})

    client = ClientWithTimeout(address)
    theirs = str(client._server_ray_version)
    if tuple(int(part) for part in theirs.split(".")[:2]) < _MIN_RAY_VERSION:
        raise UserError(
            f"the cluster at {address} runs Ray {theirs}, and distrain needs {'.'.join(map(str, _MIN_RAY_VERSION))} or newer "
            f"(here: {ray.__version__}): upgrade the cluster"
        )
    return client


def _tail_job_log(client: Any, job_id: str) -> Iterator[str]:
    """The log of a job from its begin, as it grows. Raises TimeoutError after a while without a line."""
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
                raise ConnectionError(str(error)) from None  # aiohttp's own
    finally:
        with contextlib.suppress(Exception):
            loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _to_job_info(details: Any) -> JobInfo:
    metadata = details.metadata or {}
    status = str(getattr(details.status, "value", details.status))
    started = (details.start_time or 0) / 1000
    name = details.submission_id or details.job_id
    return JobInfo(
        name,
        status,
        metadata.get("run", ""),
        started,
        details.message or "",
        details.driver_exit_code,
    )


def to_exit_code(job: JobInfo) -> int:
    """What `distrain train` would have ended with here.

    Raises:
        RunError: the job never began.
    """
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return 128 + signal.SIGTERM
    if job.exit_code is None:
        raise RunError(f"job {job.id} failed: {' '.join(job.message.split())[:500]}")
    return job.exit_code if job.exit_code >= 0 else 128 - job.exit_code
