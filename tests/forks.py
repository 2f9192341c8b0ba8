"""Processes that start at once: forked from one that has loaded torch already, which takes seconds in each."""

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ("one_rank", "one_peer", "one_command", "one_script")


def _ensure_server() -> None:
    """Start the process to fork from, which finds modules by the environment alone."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = ":".join(
        filter(None, [before.get("PYTHONPATH"), str(Path(__file__).parent)])
    )
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    try:
        _CONTEXT.set_forkserver_preload(list(_PRELOADED))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Fork:
    """`main` of a module in a process of its own; what it writes goes to files."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        out: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            module: one that is loaded already.
            arguments: its command line.
            out: where its output goes, and with `.err` in place of the suffix its errors.
            environment: variables beside those of this process.
        """
        _ensure_server()
        assert module in _PRELOADED
        self._out = out
        read, self._stdin = _CONTEXT.Pipe(duplex=False)
        child = (
            module,
            arguments,
            str(out),
            str(out.with_suffix(".err")),
            dict(environment or {}),
            read,
        )
        self._process = _CONTEXT.Process(target=_child, args=child)
        self._process.start()
        read.close()

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        return self._out.with_suffix(".err").read_text()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        os.write(self._stdin.fileno(), f"{line}\n".encode())

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Its exit code; below 0 the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """The same, when it has ended."""
        self._process.join(seconds)
        code = self._process.exitcode
        assert code is not None, (
            f"still running after {seconds:.0f} s: {self.out}{self.err}"
        )
        return code

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._stdin.close()


def _child(
    module: str,
    arguments: tuple[str, ...],
    out: str,
    err: str,
    environment: dict[str, str],
    stdin: Connection,
) -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # as in a process of a terminal's
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.dup2(stdin.fileno(), 0)
    stdin.close()
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()
