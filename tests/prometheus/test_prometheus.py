"""A run as a real Prometheus sees it: its numbers, every shipped query, and an alert that arrives."""

import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from readme_commands import shown
from servers import Alertmanager, Prometheus, free_port
from waiting import await_that

from distrain.config import to_yaml
from distrain.data.storage.store import Store
from distrain.monitor.metric_specs import COUNTERS, GAUGES, HISTOGRAMS
from distrain.monitor.sinks import read_metrics

pytestmark = pytest.mark.prometheus

ROOT = Path(__file__).parents[2] / "cluster"
RULES = (ROOT / "prometheus/rules.yml").read_text()
DASHBOARDS = sorted((ROOT / "grafana/dashboards").glob("*.json"))
# What a healthy run on CPU cores does not have.
ABSENT = ("distrain_gpu_", "distrain_store_errors_total", "ALERTS{")


def quick(text):
    """The same with the times of a run of seconds: windows of 10 s, no waiting, a stall after 5 s."""
    text = re.sub(r"\[(1|5|10)m\]", "[10s]", text)
    return re.sub(r"for: \d+m", "for: 0s", text).replace("> 120)", "> 5)")


@pytest.fixture(scope="module", autouse=True)
def installed():
    for program in ("prometheus", "promtool", "prometheus-alertmanager"):
        if shutil.which(program) is None:
            pytest.skip(
                f"no {program}: apt-get install prometheus prometheus-alertmanager"
            )


@pytest.fixture
def followed(narrow, digits, command, tmp_path):
    """A run of a minute or so as a process, the Prometheus that follows it, and its Alertmanager."""
    servers = []

    def start(**changes):
        metrics = {"port": free_port(), "linger": 30.0}
        settings = {
            "epochs": 100,
            "log": {"every": 1},
            "data": {"val": str(digits / "val")},
            **changes,
        }
        config = narrow(metrics=metrics, **settings)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(to_yaml(config))
        alertmanager = Alertmanager(tmp_path)
        servers.append(alertmanager)
        targets = Path(config.run) / "targets.json"
        prometheus = Prometheus(tmp_path, targets, quick(RULES), alertmanager.target)
        servers.append(prometheus)
        # Nobody reads what it prints, and a full pipe would stop it.
        with (tmp_path / "run.log").open("w") as log:
            process = command("train", str(recipe), stdout=log)
        return config, process, prometheus, alertmanager

    yield start
    for server in reversed(servers):
        server.stop()


patiently = partial(await_that, seconds=90)


def shipped():
    """Every expression of the dashboards and the rules: (where, expression, whether it is an alert's)."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield (
                    f"{path.stem}: {panel['title']}",
                    target["expr"].replace("$run", "run"),
                    False,
                )
    for group in yaml.safe_load(RULES)["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"], "alert" in rule


def test_what_is_shipped_passes_promtool():
    rules = shown(
        "promtool check rules rules.yml && promtool test rules rules_test.yml"
    )
    for words in (rules, ["promtool", "check", "config", "prometheus.yml"]):
        done = subprocess.run(
            ["bash", "-ec", " ".join(words)],
            cwd=ROOT / "prometheus",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test_and_says_what_to_do():
    tested = (ROOT / "prometheus/rules_test.yml").read_text()
    for group in yaml.safe_load(RULES)["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert f"alertname: {rule['alert']}" in tested
                assert rule["annotations"].keys() == {"summary", "cause", "action"}
                assert rule["labels"]["severity"] in ("warning", "critical")


def test_queries_name_metrics_that_there_are():
    names = {f"distrain_{n}" for n in GAUGES} | {
        f"distrain_{n}_total" for n in COUNTERS
    }
    names |= {
        f"distrain_{n}_{part}"
        for n in HISTOGRAMS
        for part in ("sum", "count", "bucket")
    }
    for where, expression, _ in shipped():
        unknown = set(re.findall(r"(?<![:\w])distrain_\w+", expression)) - names
        assert not unknown, where


def test_dashboards_are_as_grafana_takes_them():
    uids = set()
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        uids.add(board["uid"])
        assert {
            "title",
            "uid",
            "schemaVersion",
            "panels",
            "templating",
            "time",
        } <= board.keys()
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
        taken = set()
        for panel in board["panels"]:
            place = panel["gridPos"]
            assert 0 <= place["x"] < place["x"] + place["w"] <= 24
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, f"{panel['title']} lies over another"
            taken |= cells
            assert panel["targets"]
            assert all(
                t["datasource"]["uid"] == "${datasource}" for t in panel["targets"]
            )
    assert len(uids) == len(DASHBOARDS) == 3


def test_a_run_as_it_is_seen(followed):
    """While it trains every query answers; after its end Prometheus has the last numbers, and nothing fires."""
    config, process, prometheus, alertmanager = followed(epochs=60)
    patiently(
        lambda: (prometheus.number("distrain_step") or 0) >= 44, while_alive=process
    )
    patiently(
        lambda: prometheus.query('rate(distrain_samples_total{outcome="good"}[10s])'),
        while_alive=process,
    )
    patiently(lambda: prometheus.query("run:distrain_unfinished"), while_alive=process)
    for where, expression, is_alert in shipped():
        found = prometheus.query(quick(expression))
        if is_alert:
            assert not found, f"{where} is true of a healthy run: {found}"
        if not is_alert and not any(name in expression for name in ABSENT):
            patiently(
                partial(prometheus.query, quick(expression)),
                f"{where} has data: {expression}",
                while_alive=process,
            )
    assert process.wait(240) == 0
    last = read_metrics(Store(config.run))
    training, evaluation = (
        [r for r in last if r.kind == kind][-1] for kind in ("train", "eval")
    )
    seen = {
        name: prometheus.number(f"last_over_time({name}[5m])")
        for name in ("distrain_step", "distrain_finished")
    }
    assert seen == {"distrain_step": training.step, "distrain_finished": 1}
    assert (
        prometheus.number("last_over_time(distrain_steps_total[5m])") == training.step
    )
    assert (
        prometheus.number('last_over_time(distrain_samples_total{outcome="good"}[5m])')
        == 64 * training.step
    )
    assert (
        prometheus.number('last_over_time(distrain_loss{split="val"}[5m])')
        == evaluation.loss
    )
    assert (
        prometheus.number('last_over_time(distrain_loss{split="train"}[5m])')
        == training.loss
    )
    assert not [
        alert
        for alert in alertmanager.alerts()
        if alert["labels"]["alertname"] == "DistrainStalled"
    ]


def test_alertmanager_hears_of_a_run_that_is_stopped(followed):
    """SIGSTOP: the page does not answer any more; the alert comes all the same, and goes when the run goes on."""
    _, process, prometheus, alertmanager = followed(epochs=10_000)

    def stalled():
        return [
            a
            for a in alertmanager.alerts()
            if a["labels"]["alertname"] == "DistrainStalled"
        ]

    patiently(
        lambda: (prometheus.number("distrain_step") or 0) > 5, while_alive=process
    )
    assert not stalled()
    process.send_signal(signal.SIGSTOP)
    patiently(stalled)
    (alert,) = stalled()
    assert alert["labels"]["run"] == "run"
    assert "has made no progress for" in alert["annotations"]["summary"]
    process.send_signal(signal.SIGCONT)
    patiently(
        lambda: not prometheus.query('ALERTS{alertname="DistrainStalled"}'),
        while_alive=process,
    )
