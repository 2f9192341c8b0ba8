"""A run over several nodes as a real Prometheus on the cluster sees it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from hosts import HEAD, PYTHON
from waiting import PATIENCE, await_that

pytestmark = pytest.mark.cluster

QUERY = """
import sys, urllib.parse, urllib.request
url = "http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": sys.argv[1]})
print(urllib.request.urlopen(url, timeout=10).read().decode())
"""


@pytest.fixture
def query(hosts, tmp_path, paced):
    """The value of an expression, by instance, of a Prometheus on the head that reads the run's targets."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus: apt-get install prometheus")
    folder = tmp_path / "prometheus"
    folder.mkdir()
    discovery = {
        "files": [str(Path(str(paced.run)) / "targets.json")],
        "refresh_interval": "1s",
    }
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "distrain", "file_sd_configs": [discovery]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    flags = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": "127.0.0.1:9090",
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in flags.items())]
    server = hosts.popen(
        HEAD, *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def ask(expression):
        try:
            result = json.loads(hosts.run(HEAD, PYTHON, "-c", QUERY, expression))[
                "data"
            ]["result"]
        except (subprocess.CalledProcessError, ValueError):  # it is still starting
            return {}
        return {
            each["metric"].get("instance"): float(each["value"][1]) for each in result
        }

    yield ask
    hosts.kill(HEAD, "prometheus --config.file")
    server.wait(timeout=10)


@pytest.mark.namespaces
def test_prometheus_follows_the_nodes_of_a_run(start, paced, reference, hosts, query):
    """Three pages, and what a killed worker had counted stays counted."""
    config = paced.model_copy(update={"epochs": 2})
    steps = 2 * (1438 // 30)
    settings = ["metrics.port=9477", "metrics.address=0.0.0.0", "metrics.linger=30"]
    run = start("--workers=3", *settings, config=config)
    nodes = {f"{hosts.address[node]}:9477" for node in ("n1", "n2", "n3")}
    await_that(
        lambda: query("up == 1").keys() == nodes, "all three pages to be read", PATIENCE
    )
    run.wait_for_step(30)
    before = sum(query('distrain_samples_total{outcome="good"}').values())
    assert before > 0
    seen = sum(query("distrain_steps_total").values())
    hosts.kill("n2", "ray::RayTrainWorker")
    run.wait_for("training resumed after")
    reference.check(run, config)
    await_that(
        lambda: query("up == 1").keys() == nodes,
        "all three pages to be read again",
        PATIENCE,
    )
    run.end()
    assert max(query("last_over_time(distrain_step[10m])").values()) == steps
    assert max(query("last_over_time(distrain_finished[10m])").values()) == 1
    assert max(query("last_over_time(distrain_attempt[10m])").values()) == 2
    assert max(query("last_over_time(distrain_restarts[10m])").values()) == 1
    assert max(query("last_over_time(distrain_resizes[10m])").values()) == 0
    done, again = (
        sum(query(f"last_over_time(distrain_steps{name}_total[10m])").values())
        for name in ("", "_recomputed")
    )
    # What increase() makes of it may be off by what a lead does within one scrape, at its begin and at its end.
    assert abs(sum(query("increase(distrain_steps_total[10m])").values()) - done) <= 40
    resumed = int(re.search(r"training resumed after .* from step (\d+)", run.text)[1])
    assert done >= seen + steps - resumed, "nothing that was seen is lost"
    # A log line every 10 steps says how far an attempt came; a lead that is killed takes its last second along.
    assert steps - 30 <= done - again <= steps + 10
    samples = sum(
        query('last_over_time(distrain_samples_total{outcome="good"}[10m])').values()
    )
    assert 30 * (steps - 10) <= samples <= 30 * (done + 40)
    assert not query('resets(distrain_samples_total{outcome="good"}[10m]) > 0'), (
        "no counter ever went back"
    )
