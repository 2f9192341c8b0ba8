"""A Prometheus and an Alertmanager as processes of their own, in a folder of their own."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import yaml


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


class Server:
    """One process, which answers at a URL."""

    def __init__(self, folder: Path, command: list[str], ready: str) -> None:
        self._log = (folder / f"{command[0]}.log").open("w")
        self._process = subprocess.Popen(
            command, cwd=folder, stdout=self._log, stderr=self._log
        )
        end = time.monotonic() + 60
        while True:
            with suppress(OSError), urllib.request.urlopen(ready, timeout=5):
                return
            assert self._process.poll() is None, (
                folder / f"{command[0]}.log"
            ).read_text()
            assert time.monotonic() < end, "it does not answer"
            time.sleep(0.1)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Alertmanager(Server):
    """Keeps alerts, and sends them nowhere."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.target = f"127.0.0.1:{port}"
        config = {
            "route": {"receiver": "nobody", "group_wait": "0s"},
            "receivers": [{"name": "nobody"}],
        }
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
        flags = {
            "config.file": "alertmanager.yml",
            "storage.path": "alerts",
            "web.listen-address": self.target,
            "cluster.listen-address": "",
        }
        command = [
            "prometheus-alertmanager",
            *(f"--{name}={value}" for name, value in flags.items()),
        ]
        super().__init__(folder, command, f"http://{self.target}/-/ready")

    def alerts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = fetch(f"http://{self.target}/api/v2/alerts")
        return found


class Prometheus(Server):
    """Scrapes every second, what a file names."""

    def __init__(
        self, folder: Path, targets: Path, rules: str, alertmanager: str
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        (folder / "rules.yml").write_text(rules)
        config = {
            "global": {
                "scrape_interval": "1s",
                "evaluation_interval": "1s",
                "scrape_timeout": "1s",
            },
            "rule_files": ["rules.yml"],
            "alerting": {
                "alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]
            },
            "scrape_configs": [
                {
                    "job_name": "distrain",
                    "file_sd_configs": [
                        {"files": [str(targets)], "refresh_interval": "1s"}
                    ],
                }
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        listen = ["--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"]
        super().__init__(
            folder,
            ["prometheus", "--config.file=prometheus.yml", *listen],
            f"{self.url}/-/ready",
        )

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of an expression, which must be valid."""
        try:
            answer = fetch(
                f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
            )
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        assert answer["status"] == "success", answer
        result = answer["data"]["result"]
        return (
            result
            if answer["data"]["resultType"] == "vector"
            else [{"metric": {}, "value": result}]
        )

    def number(self, expression: str) -> float | None:
        """The one value of an expression; None where there is none."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else None
