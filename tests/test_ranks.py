"""Several ranks as processes with gloo between them, without Ray: the weights are those of one process."""

import json
import re
import signal
import socket
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
import torchvision
from forks import Fork
from prometheus_client.parser import text_string_to_metric_families
from waiting import await_that

from distrain.config import EvaluateConfig, to_yaml
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.models.alexnet import AlexNet, AlexNetBN
from distrain.models.model import ImportedModel
from distrain.rundir.checkpoint_loading import load_newest_checkpoint
from distrain.trainer import train


class Ranks:
    """The processes of one world."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._started: list[Fork] = []

    def start(
        self, config, ranks: int, *, environment=None, own=None, **settings
    ) -> list[Fork]:
        """`environment` and `own`: extra variables and settings by rank; `settings` are everyone's."""
        self._number += 1
        path = self._folder / f"ranks-{self._number}.yaml"
        path.write_text(to_yaml(config))
        overrides = [f"{k}={v}" for k, v in settings.items()]
        processes = []
        for rank in range(ranks):
            arguments = [
                str(path),
                str(rank),
                str(ranks),
                str(path.with_suffix(".address")),
                *overrides,
            ]
            arguments += (own or {}).get(rank, [])
            out = self._folder / f"ranks-{self._number}-{rank}.out"
            processes.append(
                Fork(
                    "one_rank",
                    *arguments,
                    out=out,
                    environment=(environment or {}).get(rank),
                )
            )
        self._started += processes
        return processes

    def results(self, processes) -> list[dict]:
        """What each rank ended with, its console lines under `told`; an exit code where it printed nothing."""
        found = []
        for process in processes:
            code = process.wait(180)
            lines = process.out.splitlines()
            try:
                found.append({**json.loads(lines[-1]), "told": lines[:-1]})
            except (ValueError, IndexError):
                found.append({"status": code, "told": lines, "stderr": process.err})
        return found

    def stop(self) -> None:
        for process in self._started:
            process.end()


@pytest.fixture
def ranks(tmp_path):
    found = Ranks(tmp_path)
    yield found
    found.stop()


@pytest.fixture
def config(narrow, digits):
    return narrow(
        epochs=2,
        global_batch=60,
        virtual_workers=5,
        data={"val": str(digits / "val")},
        evaluate={"every": 23, "batch": 50},
        checkpoint={"every": 10},
    )


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def undisturbed(config, console, tmp_path, known):
    """What one process makes of the config as it is, for all tests that train it."""
    if not known:
        known["summary"] = alone(config, console, tmp_path)
    return known["summary"]


def alone(config, console, tmp_path):
    changed = config.model_copy(update={"run": str(tmp_path / "alone")})
    return train(changed, World(torch.device("cpu")), console)


@pytest.mark.parametrize(
    ("model", "n"),
    [
        (AlexNet(width=0.04), 2),
        (AlexNetBN(width=0.04, hidden=True), 3),
        (ImportedModel(name="own_models:Small"), 3),
    ],
    ids=["alexnet", "alexnet_bn", "own"],
)
def test_any_number_of_ranks_gives_the_same_weights_and_scores(
    config, ranks, console, tmp_path, model, n
):
    """Weights, and the running moments of batch normalisation."""
    config = config.model_copy(update={"model": model})
    wanted = alone(config, console, tmp_path)
    found = ranks.results(ranks.start(config, n))
    assert [r["weights"] for r in found] == [wanted.weights] * n, found
    assert [(r["eval"]["top1_count"], r["eval"]["loss"]) for r in found] == [
        (wanted.eval.top1_count, wanted.eval.loss)
    ] * n
    assert found[0]["train"]["loss"] == wanted.train.loss
    assert [r["needless"] for r in found] == [[]] * n, (
        "torch's compiler takes a second of every start"
    )
    assert [line for line in found[1]["told"] if line != "joined"] == [
        f"saved {s} None" for s in (10, 20, 23, 30, 40, 46)
    ], "followers tell nothing else"
    assert "saved 46 step-00000046-attempt-001" in found[0]["told"]


def test_a_resume_on_another_number_of_ranks(
    config, ranks, console, tmp_path, undisturbed
):
    """Two ranks, one of which is told to stop; then three; then one."""
    for n in (2, 3):
        before = max(
            [
                0,
                *(
                    int(p.name.split("-")[1])
                    for p in (tmp_path / "run/checkpoints").glob("step-*")
                ),
            ]
        )
        processes = ranks.start(config, n, **{"log.every": 1})
        await_step(tmp_path / "run", before + 4)
        processes[1].send_signal(signal.SIGUSR1)
        found = ranks.results(processes)
        assert {r["status"] for r in found} == {"stopped"}, found
        assert len({(r["step"], r["weights"]) for r in found}) == 1, (
            "all ranks stop after the same step"
        )
        assert before < found[0]["step"] < 46
    assert (
        train(config, World(torch.device("cpu")), console, must_resume=True).weights
        == undisturbed.weights
    )


def test_one_more_epoch_on_another_number_of_ranks(config, ranks, console, tmp_path):
    """All ranks take the same best: that of the end of the first epoch, which 10 does not divide, counts no more."""
    config = config.model_copy(update={"evaluate": EvaluateConfig(every=10, batch=50)})
    wanted = alone(config, console, tmp_path).weights
    train(config.model_copy(update={"epochs": 1}), World(torch.device("cpu")), console)
    found = ranks.results(ranks.start(config, 2))
    assert [(r["status"], r["step"], r["weights"]) for r in found] == [
        ("finished", 46, wanted)
    ] * 2, found


@pytest.mark.parametrize("serving", ["the lead", "another"])
def test_one_page_has_the_sums_over_all_ranks(config, ranks, serving):
    """What they say in their last second is what the metrics file says, whichever rank serves."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    others = {
        rank: {"NEVER_SERVE": "1"}
        for rank in ((1, 2) if serving == "the lead" else (0,))
    }
    settings = {"metrics.port": port, "metrics.linger": 60, "log.every": 1}
    processes = ranks.start(config, 3, environment=others, **settings)
    last: dict[tuple[str, ...], float] = {}
    while any(process.poll() is None for process in processes):
        with (
            suppress(OSError),
            urllib.request.urlopen(
                f"http://127.0.0.1:{port}/metrics", timeout=5
            ) as answer,
        ):
            samples = [
                s
                for f in text_string_to_metric_families(answer.read().decode())
                for s in f.samples
            ]
            last = {
                (
                    s.name,
                    *(
                        s.labels.get(k)
                        for k in ("phase", "rank", "outcome")
                        if k in s.labels
                    ),
                ): s.value
                for s in samples
            }
        time.sleep(0.1)
    found = ranks.results(processes)
    assert {r["status"] for r in found} == {"finished"}, found
    told = [line for r in found for line in r["told"] if "metrics at" in line]
    assert told == [f"metrics at http://127.0.0.1:{port}/metrics"], (
        "one rank serves, and says so"
    )
    steps = found[0]["train"]["step"]
    assert last["distrain_steps_total",] == last["distrain_step",] == steps == 46
    assert last["distrain_samples_total", "good"] == 60 * steps
    assert last["distrain_phase_seconds_count", "forward"] == 3 * steps
    assert {key for key in last if key[0] == "distrain_rank_arrival_seconds_total"} == {
        ("distrain_rank_arrival_seconds_total", str(rank)) for rank in range(3)
    }
    assert last["distrain_workers",] == 3
    assert last["distrain_finished",] == 1


def test_a_slow_rank_is_named(config, ranks, tmp_path):
    """By the time at which it comes to the reduction: the others' backward is no shorter than its own."""
    processes = ranks.start(
        config, 3, environment={1: {"SLOW": "0.2"}}, **{"log.every": 5, "epochs": 1}
    )
    found = ranks.results(processes)
    assert {r["status"] for r in found} == {"finished"}, found
    (warning,) = [line for line in found[0]["told"] if "is slow" in line]
    assert re.fullmatch(
        r"warning: rank 1 is slow: it reaches the all-reduce after \d+ ms per step, \d+% of it waiting for data; .*",
        warning,
    )


def test_fast_is_equal_within_rounding(config, ranks, console, tmp_path):
    fast = config.model_copy(
        update={
            "reduction": config.reduction.model_copy(update={"mode": "fast"}),
            "epochs": 1,
        }
    )
    alone(fast, console, tmp_path)
    found = ranks.results(ranks.start(fast, 2))
    assert len({r["weights"] for r in found}) == 1, (
        "the ranks agree with each other to the bit"
    )
    one, two = (
        load_newest_checkpoint(Store(str(tmp_path / name)))[0].model_state_dict
        for name in ("alone", "run")
    )
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_bad_samples_of_all_ranks_are_merged_and_counted(
    config, ranks, console, tmp_path, damaged_set
):
    damaged_set(tmp_path / "damaged", bad={5, 77, 201, 310}, classes=10, rows=400)
    data = config.data.model_copy(
        update={"train": str(tmp_path / "damaged"), "val": None}
    )
    config = config.model_copy(update={"data": data, "epochs": 5})
    wanted = alone(config, console, tmp_path).weights
    found = ranks.results(ranks.start(config, 3))
    assert [r["weights"] for r in found] == [wanted] * 3, found
    listed = [
        json.loads(text)["id"]
        for text in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()
    ]
    assert listed == [5, 77, 201, 310]
    found = ranks.results(
        ranks.start(config, 2, run=tmp_path / "strict", **{"data.max_bad_samples": 3})
    )
    assert [r["status"] for r in found] == ["RunError"] * 2
    assert all(
        "4 bad samples are more than data.max_bad_samples = 3" in r["text"]
        for r in found
    )


def test_divergence_is_agreed_on(config, ranks, tmp_path):
    schedule = config.schedule.model_copy(update={"lr": 1e9})
    found = ranks.results(
        ranks.start(config.model_copy(update={"schedule": schedule}), 2)
    )
    assert [r["status"] for r in found] == ["RunError"] * 2, found
    assert all("training diverged at step" in r["text"] for r in found)
    evidence = json.loads(
        next((tmp_path / "run").glob("not-finite-step-*.json")).read_text()
    )
    assert sorted(evidence["virtual_workers"]) == ["0", "1", "2", "3", "4"]


def test_a_dead_rank_takes_the_others_out_at_once(config, ranks, tmp_path, undisturbed):
    processes = ranks.start(config, 3, **{"log.every": 1, "evaluate.every": 1000})
    await_step(tmp_path / "run", 14)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    first = ranks.results([processes[0]])[0]
    assert first["status"] == "LostRankError", first
    assert time.monotonic() - killed < 30, (
        "not after the minutes that a collective may take"
    )
    assert ranks.results([processes[2]])[0]["status"] == "LostRankError"
    found = ranks.results(ranks.start(config, 2))
    assert [r["weights"] for r in found] == [undisturbed.weights] * 2
    assert any("resumed from step 10" in line for line in found[0]["told"])


def test_a_hanging_rank_is_named_with_its_stack(config, ranks, tmp_path):
    processes = ranks.start(
        config, 2, environment={1: {"HANG_AT": "20"}}, **{"cluster.stall": 8}
    )
    found = ranks.results(processes)
    assert found[1]["status"] == 70, found
    line = next(line for line in found[1]["told"] if "hangs" in line)
    assert re.match(
        r"rank 1 hangs: no progress for 8 s in loading the data of step \d+; the stacks of all its threads are in",
        line,
    )
    stacks = (tmp_path / "run/stuck-attempt-001-rank-1.txt").read_text()
    assert "one_rank.py" in stacks
    assert "in rows" in stacks
    assert found[0]["status"] == "LostRankError", (
        "it waited longer than the one that hangs"
    )


def test_what_one_host_alone_lacks_ends_all_ranks(config, ranks):
    """A loss of one's own, say, that is not installed there: with one sentence, not by a timeout."""
    found = ranks.results(ranks.start(config, 3, own={1: ["loss.name=nowhere:Focal"]}))
    assert [rank["status"] for rank in found] == ["UserError"] * 3, found
    assert len({rank["text"] for rank in found}) == 1
    assert (
        "loss.name=nowhere:Focal: nowhere:Focal cannot be imported (ModuleNotFoundError"
        in found[0]["text"]
    )


@pytest.mark.parametrize("what", ["config", "data", "hardware"])
def test_a_rank_that_does_not_fit_is_named(config, ranks, tmp_path, damaged_set, what):
    environment, own = {}, {}
    if what == "hardware":  # another instruction set computes other bits
        environment = {
            1: {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"}
        }
        named = ["ONEDNN_MAX_CPU_ISA", "SSE41", "computed bits"]
    elif what == "config":
        own, named = {1: ["seed=1"]}, ["seed: 0 on rank 0, 1 on rank 1"]
    else:
        damaged_set(tmp_path / "other", bad=set(), classes=10, rows=100)
        own, named = (
            {1: [f"data.train={tmp_path}/other", "data.val=null"]},
            ["data.fingerprint"],
        )
    found = ranks.results(ranks.start(config, 2, environment=environment, own=own))
    assert [r["status"] for r in found] == ["UserError"] * 2, found
    assert len({r["text"] for r in found}) == 1
    assert "rank 1 of 2 differs from rank 0" in found[0]["text"]
    for text in named:
        assert text in found[0]["text"]


def await_step(run: Path, step: int) -> None:
    """Wait until a run has told of a step."""

    def reached() -> bool:
        lines = [
            t
            for file in run.glob("metrics-*.jsonl")
            for t in file.read_text().splitlines()
            if t.endswith("}")
        ]
        return any(json.loads(text)["step"] >= step for text in lines)

    await_that(reached, f"step {step}", 120)


def test_fine_tuning_survives_a_kill_on_any_number_of_ranks(
    narrow, ranks, console, tmp_path, few_digits
):
    """From torchvision's own state dict to a new head, with frozen normalization; the file is gone at the resume."""
    given = torchvision.models.shufflenet_v2_x0_5(num_classes=1000).state_dict()
    path = tmp_path / "shufflenet.pth"
    torch.save(given, path)
    frozen = ("conv1", "stage2", "stage3")
    config = narrow(
        global_batch=30,
        virtual_workers=3,
        data={name: str(few_digits / name) for name in ("train", "val")},
        model={
            "name": "torchvision:shufflenet_v2_x0_5",
            "init_from": str(path),
            "freeze": list(frozen),
        },
        optimizer={"name": "sgd", "lr_scale": {"fc": 10}},
        loss={"name": "cross_entropy", "class_weights": "balanced"},
        stop={"patience": 1},
        checkpoint={"every": 1},
        schedule={"name": "constant", "lr": 0.001},
    )
    wanted = alone(config, console, tmp_path)
    assert any(
        line
        == f"init: 280 tensors from {path}; fc.weight, fc.bias are new: 10 classes, "
        "not 1000"
        for line in console.events
    ), console.events

    # Three ranks, all killed early in 10 steps; then one.
    processes = ranks.start(config, 3, **{"log.every": 1})
    await_step(tmp_path / "run", 4)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    ranks.results(processes)
    path.unlink()
    resumed = train(config, World(torch.device("cpu")), console, must_resume=True)
    assert (resumed.status, resumed.weights) == (wanted.status, wanted.weights)
    found = load_newest_checkpoint(Store(config.run))[0].model_state_dict
    for name, tensor in given.items():
        if name in found:
            is_same = torch.equal(found[name], tensor)
            assert is_same == name.startswith(frozen), name
