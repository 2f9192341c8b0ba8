"""The loop in one process: what changes no bit, what stops a run, what is left behind."""

import gc
import json

import numpy as np
import pytest
import torch
import torchvision
import yaml
from narrow import loader_sections
from sets import SetWriter

import distrain.training.hardware_check
import distrain.training.resume
import distrain.training.validate
from distrain.config import load_config
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.stats import ColorStatistics
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import AttemptError, LostRankError, RunError, UserError
from distrain.models.alexnet import AlexNet
from distrain.monitor.meters import Meters
from distrain.monitor.prometheus import Metrics
from distrain.monitor.sinks import read_metrics
from distrain.optim.accumulate import GradientAccumulator
from distrain.rundir.checkpoint import (
    CheckpointManager,
    hash_tensors,
    read_best_name,
)
from distrain.rundir.checkpoint_loading import load_newest_checkpoint
from distrain.trainer import Summary, train

CPU = torch.device("cpu")


def run(config, console, **options):
    return train(config, World(CPU), console, **options)


@pytest.fixture
def weights_of(narrow, few_digits, tmp_path, console):
    """The weights after one epoch of 5 steps, with some settings changed."""
    count = 0

    def weights(**changes):
        nonlocal count
        count += 1
        data = {"train": str(few_digits / "train"), **changes.pop("data", {})}
        config = narrow(run=str(tmp_path / f"run{count}"), data=data, **changes)
        summary = run(config, console)
        assert summary.status == "finished"
        return summary.weights

    return weights


def test_virtual_workers_one_by_one_side_by_side_or_in_any_order(
    weights_of, monkeypatch
):
    wanted = weights_of(lanes=1)
    assert weights_of(lanes=2) == wanted
    assert weights_of(lanes=4) == wanted
    monkeypatch.setattr(World, "local_virtual_workers", lambda self, v: [2, 0, 3, 1])
    assert weights_of(lanes=1) == wanted
    assert weights_of(lanes=2, seed=1) != wanted


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ({"name": "alexnet", "width": 0.04}, "sgd"),
        ({"name": "alexnet", "width": 0.04}, "lars"),
        ({"name": "alexnet2012", "width": 0.04}, "adam"),
        (
            {"name": "alexnet2012", "width": 0.04, "layers": "paper", "lrn": "paper"},
            "sgd",
        ),
        ({"name": "alexnet_bn", "width": 0.04}, "sgd"),
        (
            {
                "name": "alexnet_bn",
                "width": 0.04,
                "place": "after_pool",
                "hidden": True,
                "affine": False,
            },
            "lars",
        ),
        ({"name": "torchvision:shufflenet_v2_x0_5"}, "adam"),
        ({"name": "own_models:Small", "options": {"channels": 4}}, "sgd"),
        ({"name": "own_models:Frozen"}, "sgd"),
    ],
    ids=lambda x: x if isinstance(x, str) else x["name"],
)
def test_every_model_and_optimizer_keeps_the_promise(weights_of, model, rule):
    """One virtual worker after another, or three side by side."""
    # LARS's steps are so small at that rate that rounding is lost in five of them.
    lr = 1.0 if rule == "lars" else 1e-3
    settings = {
        "model": model,
        "optimizer": {"name": rule},
        "schedule": {"name": "constant", "lr": lr},
    }
    assert weights_of(lanes=1, **settings) == weights_of(lanes=3, **settings)


def test_running_moments_are_learned_and_come_back_with_a_checkpoint(
    narrow, few_digits, console, tmp_path
):
    """Stopped in the middle of an epoch and taken up again, the run ends with the same moments, to the bit."""
    config = narrow(
        model={"name": "alexnet_bn", "width": 0.04, "hidden": True},
        data={"train": str(few_digits / "train")},
        log={"every": 1},
    )
    whole = config.model_copy(update={"run": str(tmp_path / "whole")})
    wanted = run(whole, console).weights
    loaded = load_newest_checkpoint(Store(whole.run))[0].model_state_dict
    assert loaded["norm1.running_mean"].abs().min() > 0
    assert not torch.equal(
        loaded["norm7.running_var"], torch.ones_like(loaded["norm7.running_var"])
    )
    world = World(CPU)
    console.set_step = lambda step: world.stop_requested.set() if step == 2 else None
    assert train(config, world, console).status == "stopped"
    del console.set_step
    assert run(config, console).weights == wanted


def test_batch_normalisation_wants_two_samples(narrow, console):
    with pytest.raises(
        UserError,
        match="leaves one sample to each, which has no variance: lower virtual_workers",
    ):
        run(
            narrow(model={"name": "alexnet_bn", "width": 0.04}, virtual_workers=64),
            console,
        )


def test_operation_settings_change_no_bit(weights_of):
    data = {"decode_threads": 3, "read_ahead": 4, "memory": 1000}
    assert weights_of() == weights_of(
        data=data, log={"every": 3}, checkpoint={"every": 2, "keep": 1}
    )


def test_fast_mode_is_equal_to_rounding(narrow, few_digits, tmp_path, console):
    states = []
    for mode in ("exact", "fast"):
        config = narrow(
            run=str(tmp_path / mode),
            data={"train": str(few_digits / "train")},
            reduction={"mode": mode},
            lanes=1,
        )
        run(config, console)
        states.append(load_newest_checkpoint(Store(config.run))[0].model_state_dict)
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-3, atol=1e-5)


def test_bf16_trains_and_keeps_the_promise(weights_of):
    assert weights_of(precision="bf16", lanes=1) == weights_of(
        precision="bf16", lanes=2
    )


def test_five_steps_equal_torch_on_the_same_batches(narrow, console, digits):
    """The whole path at full width against torchvision's model in a plain torch loop: the same batches, autograd on the
    global batch, torch's own SGD."""
    from distrain.data.batch import iter_training_requests
    from distrain.data.loader import Loader
    from distrain.data.shards.dataset import Dataset
    from distrain.data.shards.manifest import Manifest
    from distrain.training.run_data import build_order

    rate = {"name": "constant", "lr": 1e-2}
    model = {"name": "alexnet", "dropout": 0.0}
    config = narrow(model=model, global_batch=16, virtual_workers=2, schedule=rate)
    store = Store(str(digits / "train"))
    dataset = Dataset(
        store, Manifest.load(store), memory_bytes=1 << 26, retry_seconds=0
    )
    order = build_order(config, dataset.manifest.rows_per_group)
    model = torchvision.models.alexnet(num_classes=10, dropout=0.0)
    first = config.model.build(10, config.seed).state_dict()
    model.load_state_dict(first)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-2, momentum=0.9, weight_decay=5e-4
    )
    requests = iter_training_requests(order, range(5), range(2))
    options = {"batch_size": 8, "device": CPU, "use_augmentation": True}
    with Loader(
        dataset,
        dataset.manifest.statistics,
        requests,
        **loader_sections(config),
        **options,
    ) as loader:
        for _ in range(5):
            batches = [next(loader) for _ in range(2)]
            images, labels = (
                torch.cat([getattr(b, k) for b in batches])
                for k in ("images", "labels")
            )
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    world = World(CPU)
    console.set_step = lambda step: world.stop_requested.set() if step == 4 else None
    assert train(config, world, console).step == 5
    ours = load_newest_checkpoint(Store(config.run))[0].model_state_dict
    # Of how far they went, by layer: a ReLU that rounding turns off or on shifts it by 0.3 %, and single biases by more
    # than a bound on each would allow; without weight decay it would be over 20 %.
    for name, p in model.state_dict().items():
        assert (ours[name] - p).norm() < 0.005 * (p - first[name]).norm(), name


def test_the_full_width_model(narrow, console, tmp_path, damaged_set):
    """One test of this path at width 1: save, take over in the middle, end with the same bits."""
    damaged_set(tmp_path / "few", bad=set(), classes=10, rows=32)
    settings = {
        "model": {"name": "alexnet"},
        "global_batch": 16,
        "virtual_workers": 2,
        "checkpoint": {"every": 1},
    }
    config = narrow(
        **settings,
        data={"train": str(tmp_path / "few")},
        schedule={"name": "constant", "lr": 0.01},
    )
    summary = run(config, console)
    assert (summary.status, summary.steps) == ("finished", 2)
    store = Store(config.run)
    assert (
        sum(
            t.numel()
            for t in load_newest_checkpoint(store)[0].model_state_dict.values()
        )
        == 61_100_840 - 990 * 4097
    )
    store.remove("checkpoints/step-00000002-attempt-001")
    assert run(config, console).weights == summary.weights
    assert "resumed from step 1 (step-00000001-attempt-001)" in console.events


def test_a_record_has_the_rate_of_its_last_step(narrow, console):
    config = narrow(
        schedule={"name": "polynomial", "lr": 0.05, "warmup_epochs": 0.2},
        log={"every": 5},
    )
    run(config, console)
    rates = {r.step: r.lr for r in console.records if r.kind == "train"}
    assert rates == {
        step: config.schedule.get_lr(step - 1, 22, 22) for step in (5, 10, 15, 20, 22)
    }


def test_what_a_run_leaves_behind(narrow, console, digits):
    config = narrow(
        epochs=2,
        data={"val": str(digits / "val")},
        checkpoint={"keep": 1},
        log={"every": 11},
    )
    summary = run(config, console)
    store = Store(config.run)
    resolved = yaml.safe_load(store.read("config.yaml"))
    assert len(resolved["data"]["fingerprint"]) == 64
    records = read_metrics(store)
    assert [(r.kind, r.step) for r in records] == [
        ("train", 11), ("eval", 22), ("train", 22), ("train", 33), ("eval", 44), ("train", 44),
    ]  # fmt: skip
    assert all(r.samples == 359 for r in records if r.kind == "eval")
    images = [r.seconds * r.images_per_second for r in records if r.kind == "train"]
    assert images == [pytest.approx(11 * 64)] * 4
    assert summary.eval.top1_count == records[4].top1_count
    assert Summary.from_dict(json.loads(json.dumps(summary.to_dict()))) == summary, (
        "as another process gets it"
    )
    loaded, problems = load_newest_checkpoint(store)
    assert (loaded.step, problems) == (44, [])
    assert loaded.state["cursor"] == {"epoch": 2, "step": 0}
    assert loaded.state["reduction"] == "exact"
    assert loaded.state["config"] == resolved
    assert console.records[-1].kind == "eval"
    assert console.step == 44
    assert json.loads(store.read("checkpoints/best.json"))["top1"] == max(
        r.top1_count for r in records if r.kind == "eval"
    )


def test_a_saved_config_starts_the_same_run(narrow, console, tmp_path):
    config = narrow()
    weights = run(config, console).weights
    again = load_config(tmp_path / "run" / "config.yaml", [f"run={tmp_path / 'again'}"])
    assert run(again, console).weights == weights


def test_a_finished_run_says_so(narrow, console):
    first = run(narrow(), console)
    console.events.clear()
    second = run(narrow(metrics={"port": 9477}), console)
    assert (second.status, second.weights, second.step) == (
        "already finished",
        first.weights,
        22,
    )
    assert not Store(second.run).exists("metrics-002.jsonl")
    told = [e for e in console.events if e.startswith(("metrics at", "resumed from"))]
    assert told == []


def test_a_run_in_a_bucket(narrow, console):
    config = narrow(run="memory://bucket/run")
    weights = run(config, console).weights
    store = Store(config.run)
    assert {"config.yaml", "metrics-001.jsonl", "checkpoints"} <= set(
        store.list_names()
    )
    assert [r.step for r in read_metrics(store)] == [10, 20, 22]
    assert run(config, console).weights == weights


def test_the_garbage_collector_is_spared_what_lives_on(narrow, console):
    frozen = []
    console.set_step = lambda step: frozen.append(gc.get_freeze_count())
    run(narrow(), console)
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0, "and has it back afterwards"


class TellingWorld(World):
    """A world that notes what it is asked, in order."""

    def __init__(self, calls):
        super().__init__(CPU)
        object.__setattr__(self, "calls", calls)

    def all_reduce_ints(self, values):
        self.calls.append("word")
        return super().all_reduce_ints(values)

    def synchronize_device(self):
        self.calls.append("settled")
        super().synchronize_device()


def test_ranks_have_a_word_before_any_of_them_waits_for_its_gpu(
    narrow, console, digits, monkeypatch
):
    """The word goes by gloo, which raises where a rank is lost; for a reduction of NCCL it would wait."""
    calls = []

    def noting(what, name):
        original = getattr(what, name)
        monkeypatch.setattr(
            what,
            name,
            lambda *args, **options: calls.append(name) or original(*args, **options),
        )

    for what, name in (
        (GradientAccumulator, "start_all_reduce"),
        (Meters, "read_and_reset"),
        (CheckpointManager, "save"),
        (Metrics, "record_norms"),
    ):
        noting(what, name)
    noting(distrain.training.validate, "evaluate")
    changes = {
        "log": {"every": 5},
        "checkpoint": {"every": 4},
        "evaluate": {"every": 7},
        "epochs": 1,
    }
    train(
        narrow(data={"val": str(digits / "val")}, **changes),
        TellingWorld(calls),
        console,
    )
    waits = {"read_and_reset", "save", "record_norms", "evaluate"}
    assert waits <= set(calls)
    for i, name in enumerate(calls):
        if name in waits:
            since = calls[i - calls[:i][::-1].index("start_all_reduce") : i]
            assert "settled" in since, f"{name} after {since}"
            assert "word" in since[: since.index("settled")], f"{name} after {since}"


def test_what_was_reduced_without_a_lost_rank_is_never_saved(narrow, console, tmp_path):
    """NCCL's communicator was aborted: the sums on the GPU are half done, and look like any others."""
    world = World(CPU)
    console.set_step = lambda step: world.peer_lost.set() if step == 12 else None
    with pytest.raises(LostRankError):
        train(narrow(checkpoint={"every": 6}), world, console)
    assert load_newest_checkpoint(Store(str(tmp_path / "run")))[0].step == 6


def test_stop_saves_and_goes_on_to_the_same_weights(narrow, console, tmp_path):
    wanted = run(narrow(run=str(tmp_path / "whole")), console).weights
    world = World(CPU)
    console.set_step = lambda step: world.stop_requested.set() if step == 7 else None
    summary = train(narrow(), world, console)
    assert (summary.status, summary.step) == ("stopped", 8)
    del console.set_step
    summary = run(narrow(), console, must_resume=True)
    assert summary.weights == wanted
    assert "resumed from step 8 (step-00000008-attempt-001)" in console.events


def test_resume_refuses_other_results_and_takes_other_operations(narrow, console):
    run(narrow(), console)
    with pytest.raises(UserError) as caught:
        run(narrow(seed=3, global_batch=32, log={"every": 1}), console)
    text = str(caught.value)
    assert "global_batch: 64 before, 32 now" in text
    assert "seed: 0 before, 3 now" in text
    assert "log.every" not in text


def test_resume_without_a_checkpoint(narrow, console):
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        run(narrow(), console, must_resume=True)


def test_other_hardware_is_refused_unless_it_is_accepted(narrow, console, monkeypatch):
    """The bits that a kernel computes change: here those of a gradient, as with another instruction set."""
    run(narrow(), console)
    real = distrain.training.hardware_check.forward

    def other(*arguments):
        found = real(*arguments)
        return found._replace(loss=found.loss * (1 + 2**-20))

    monkeypatch.setattr(distrain.training.hardware_check, "forward", other)
    environment = distrain.training.resume.collect_environment
    monkeypatch.setattr(
        distrain.training.resume,
        "collect_environment",
        lambda device: {**environment(device), "torch": "9.9"},
    )
    with pytest.raises(
        UserError,
        match=r"does not reproduce the checkpoint.*torch .* -> 9.9.*--accept-other-hardware",
    ):
        run(narrow(), console)
    run(narrow(), console, accept_other_hardware=True)
    assert any("results are not bit-identical" in e for e in console.events)


def test_other_versions_that_compute_the_same_bits_are_no_matter(
    narrow, console, monkeypatch
):
    run(narrow(), console)
    environment = distrain.training.resume.collect_environment
    monkeypatch.setattr(
        distrain.training.resume,
        "collect_environment",
        lambda device: {**environment(device), "torch": "9.9"},
    )
    assert run(narrow(), console).status == "already finished"
    assert not [e for e in console.events if e.startswith("warning")]


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    narrow, console, tmp_path
):
    config = narrow(checkpoint={"every": 10, "keep": 3})
    wanted = run(config, console).weights
    path = tmp_path / "run/checkpoints/step-00000022-attempt-001/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert run(config, console).weights == wanted
    assert any(
        "model.safetensors have changed" in e and "using an older one" in e
        for e in console.events
    )
    assert "resumed from step 20 (step-00000020-attempt-001)" in console.events


def test_divergence_stops_before_the_weights_move_and_leaves_evidence(
    narrow, console, monkeypatch
):
    made, build = [], AlexNet.build
    monkeypatch.setattr(AlexNet, "build", lambda *a: made.append(build(*a)) or made[-1])
    config = narrow(
        schedule={"name": "constant", "lr": 1e12},
        checkpoint={"every": 1, "keep": 99},
        log={"every": 1},
    )
    with pytest.raises(RunError, match="training diverged at step") as caught:
        run(config, console)
    store = Store(config.run)
    (name,) = [n for n in store.list_names() if n.startswith("not-finite")]
    evidence = json.loads(store.read(name))
    step = evidence["step"]
    assert name in str(caught.value)
    assert set(evidence["virtual_workers"]) == {"0", "1", "2", "3"}
    assert all(len(v["sample_ids"]) == 16 for v in evidence["virtual_workers"].values())
    assert all("gradient_norm" in v for v in evidence["virtual_workers"].values())
    newest = load_newest_checkpoint(store)[0]
    assert newest.step == step - 1, "nothing is kept of a step that failed"
    assert hash_tensors(made[0].state_dict()) == hash_tensors(
        newest.model_state_dict
    ), "the weights have not moved"


def test_bad_samples_are_named_and_their_list_is_no_input(
    narrow, console, tmp_path, damaged_set
):
    damaged_set(tmp_path / "data", bad={3, 17, 30})
    changes = {
        "data": {"train": str(tmp_path / "data")},
        "global_batch": 8,
        "virtual_workers": 2,
        "epochs": 4,
    }
    wanted = run(narrow(**changes, run=str(tmp_path / "whole")), console).weights
    listed = [
        json.loads(text)
        for text in (tmp_path / "whole/bad_samples.jsonl").read_text().splitlines()
    ]
    assert [entry["id"] for entry in listed] == [3, 17, 30]
    assert listed[1]["where"] == "shard-00000.parquet row group 2 row 1"
    assert "image format is not recognized" in listed[1]["reason"]
    assert sum("bad sample 17" in e for e in console.events) == 1

    world = World(CPU)
    console.set_step = lambda step: world.stop_requested.set() if step == 12 else None
    train(narrow(**changes), world, console)
    (tmp_path / "run/bad_samples.jsonl").unlink()
    del console.set_step
    threads = {"data": {**changes["data"], "decode_threads": 1}}
    assert run(narrow(**{**changes, **threads}), console).weights == wanted


def test_too_many_bad_samples_stop_the_run(narrow, console, tmp_path, damaged_set):
    damaged_set(tmp_path / "data", bad={3, 17, 30})
    data = {"train": str(tmp_path / "data"), "max_bad_samples": 2}
    with pytest.raises(
        RunError, match=r"3 bad samples are more than data.max_bad_samples = 2"
    ):
        run(
            narrow(data=data, global_batch=8, virtual_workers=2, log={"every": 1}),
            console,
        )


def test_a_step_of_bad_samples_only(narrow, console, tmp_path, damaged_set):
    damaged_set(tmp_path / "data", bad=set(range(40)))
    with pytest.raises(RunError, match="all samples of step 1 are bad"):
        run(
            narrow(
                data={"train": str(tmp_path / "data")},
                global_batch=8,
                virtual_workers=2,
            ),
            console,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": "/nowhere/at/all"}}, "no data set at /nowhere/at/all"),
        (
            {"global_batch": 2048, "virtual_workers": 2},
            "has 1438 samples, fewer than one global batch of 2048",
        ),
        (
            {"augment": {"crop": 100}},
            "crop = 100 does not fit the 72 x 72 pixel images",
        ),
        ({"data": {"fingerprint": "0" * 64}}, "data.fingerprint is 000"),
        ({"run": "/proc/nothing/here"}, "cannot be written to"),
        ({"run": ""}, "run is empty: name a run directory"),
        ({"data": {"pack": "digits"}}, "also packs a validation set"),
        ({"run": __file__}, "cannot be written to or read"),
        ({"data": {"train": __file__}}, "is a file: name its folder"),
    ],
)
def test_what_does_not_fit(narrow, console, changes, message):
    with pytest.raises(UserError, match=message):
        run(narrow(**changes), console)


def test_a_disk_that_is_full_at_the_start_is_waited_for(narrow, console, full_disk):
    def event(text):
        console.events.append(text)
        if text.endswith("retrying"):
            make_room()

    console.log = event
    config = narrow()
    with full_disk(0) as make_room:
        run(config, console)
    assert sum("cannot be written to or read" in text for text in console.events) == 1
    assert Store(config.run).list_names("attempts") == ["001.json"]


def test_a_disk_that_stays_full_ends_the_attempt(narrow, console, full_disk):
    with (
        full_disk(0),
        pytest.raises(
            AttemptError, match=r"File too large.*free space or fix the storage"
        ),
    ):
        run(narrow(checkpoint={"patience": 1.0}), console)


def test_a_list_of_bad_samples_that_cannot_be_written_is_a_warning(
    narrow, console, tmp_path, damaged_set
):
    damaged_set(tmp_path / "data", bad={3})
    config = narrow(
        data={"train": str(tmp_path / "data")},
        global_batch=8,
        virtual_workers=2,
        epochs=1,
    )
    (tmp_path / "run/bad_samples.jsonl/in the way").mkdir(parents=True)
    assert run(config, console).status == "finished"
    assert any(
        "warning: bad_samples.jsonl could not be written" in text
        for text in console.events
    )
    assert any(text.startswith("bad sample 3") for text in console.events)


def test_the_best_is_named_again_after_a_kill_just_before(narrow, console, digits):
    config = narrow(data={"val": str(digits / "val")})
    run(config, console)
    store = Store(config.run)
    store.remove("checkpoints/best.json")
    run(config, console)
    assert read_best_name(store) == "step-00000022-attempt-001"


def test_the_best_of_another_validation_set_says_nothing(
    narrow, console, few_digits, tmp_path
):
    first, second = (
        {"train": str(few_digits / "train"), "val": str(few_digits / name)}
        for name in ("train", "val")
    )
    summary = run(narrow(data=first), console)
    assert summary.eval.samples == 320
    world = World(CPU)
    console.set_step = lambda step: world.stop_requested.set() if step == 7 else None
    path = tmp_path / "second"
    two = {"run": str(path), "epochs": 2}
    train(narrow(**two, data=first), world, console)
    del console.set_step
    run(narrow(**two, data=second), console)
    assert json.loads((path / "checkpoints/best.json").read_text())["samples"] == 80


def test_streams_that_do_not_fit_the_memory_are_said(narrow, console):
    run(narrow(data={"memory": "100kB"}), console)
    assert any("row groups are read many times" in e for e in console.events)


def test_a_validation_set_of_some_classes_in_another_order(
    narrow, console, digits, tmp_path
):
    """It evaluates as the same images do under the training set's numbers."""
    val = Dataset.open(digits / "val")
    found = [row for row in val if row.label > 2]
    results = []
    for name, classes in (("as", val.classes), ("other", tuple("9457683"))):
        writer = SetWriter(Store(str(tmp_path / name)), classes, (72, 72))
        for i, row in enumerate(found):
            label = classes.index(val.classes[row.label])
            writer.add(bytes(row.data), label, f"{i}.jpg")
        writer.finish(val.manifest.statistics)
        config = narrow(
            run=str(tmp_path / f"run-{name}"), data={"val": str(tmp_path / name)}
        )
        results.append(run(config, console).eval)
    assert results[0].samples == len(found) == 277
    assert results[0].classes == 10
    assert results[0].top5_count not in (0, len(found))
    keep = ("loss", "top1_count", "top5_count", "samples", "classes")
    first, second = ([getattr(result, name) for name in keep] for result in results)
    assert first == second


@pytest.mark.parametrize(
    ("classes", "label", "name"), [(["0", "one"], 1, "one"), (["0", "17"], 1, "17")]
)
def test_validation_of_other_classes(
    narrow, console, tmp_path, damaged_set, classes, label, name
):
    damaged_set(tmp_path / "other", bad=set())
    manifest = tmp_path / "other" / "manifest.json"
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**tree, "classes": classes}))
    with pytest.raises(
        UserError,
        match=f"class {label} of .*other, '{name}', is not one of the 10 classes of .*train",
    ):
        run(narrow(data={"val": str(tmp_path / "other")}), console)


def test_an_empty_set_and_one_class(narrow, console, tmp_path, damaged_set):
    SetWriter(Store(str(tmp_path / "empty")), ["a", "b"], (72, 72)).finish(
        ColorStatistics.from_covariance(np.zeros(3), np.eye(3))
    )
    with pytest.raises(UserError, match="is empty"):
        run(narrow(data={"train": str(tmp_path / "empty")}), console)
    damaged_set(tmp_path / "one", bad=set(), classes=1)
    with pytest.raises(UserError, match="has fewer than two classes"):
        run(narrow(data={"train": str(tmp_path / "one")}), console)


def test_a_loss_for_two_classes_on_ten_is_refused(narrow, console):
    with pytest.raises(
        UserError,
        match="loss.form = binary is for two classes, and the data set has 10",
    ):
        train(narrow(loss={"name": "hinge", "form": "binary"}), World(CPU), console)


def test_the_papers_form_differs_after_a_drop_of_the_rate_and_not_before(
    narrow, few_digits, console, tmp_path
):
    def weights(form, drop):
        schedule = {"name": "step", "lr": 0.05, "drop_epochs": [drop]}
        optimizer = {"name": "sgd", "form": form}
        config = narrow(
            run=str(tmp_path / f"{form}-{drop}"),
            data={"train": str(few_digits / "train")},
            epochs=2,
            schedule=schedule,
            optimizer=optimizer,
        )
        return train(config, World(CPU), console).weights

    assert weights("paper", 5) == weights("torch", 5)
    assert weights("paper", 1) != weights("torch", 1)


def plateau(narrow, few_digits, **changes):
    """A run whose rate is so small that validation stalls at once: it drops after each epoch (5 steps) but one."""
    schedule = {"name": "plateau", "lr": 1e-9, "patience": 1, "drops": 2}
    return narrow(
        schedule=schedule,
        epochs=5,
        log={"every": 1},
        data={name: str(few_digits / name) for name in ("train", "val")},
        **changes,
    )


def test_the_rate_drops_when_validation_stalls(narrow, console, few_digits):
    run(plateau(narrow, few_digits), console)
    rates = {r.step: r.lr for r in console.records if r.kind == "train"}
    counts = [r.top1_count for r in console.records if r.kind == "eval"]
    assert len(set(counts)) == 1, "it does stall"
    assert [rates[s] for s in (1, 5, 10, 11, 15, 16, 25)] == pytest.approx(
        [1e-9, 1e-9, 1e-9, 1e-10, 1e-10, 1e-11, 1e-11]
    )
    told = [e for e in console.events if "stalled" in e]
    assert told == [
        "validation has stalled for 1 epoch: the learning rate is now 1e-10",
        "validation has stalled for 1 epoch: the learning rate is now 1e-11",
    ]


def test_a_warm_up_is_no_stall(narrow, console, few_digits):
    config = plateau(narrow, few_digits)
    config = config.model_copy(
        update={"schedule": config.schedule.model_copy(update={"warmup_epochs": 3.0})}
    )
    run(config, console)
    assert len([e for e in console.events if "stalled" in e]) == 1, (
        "after epoch 5: epoch 4 was the first to count"
    )


def test_the_plateau_comes_back_with_a_checkpoint_and_its_clock_is_the_epoch(
    narrow, console, few_digits, tmp_path
):
    """Neither a stop in mid-epoch nor how often a run is evaluated changes the steps at which the rate drops."""
    sgd = {"name": "sgd", "form": "paper"}
    wanted = run(
        plateau(narrow, few_digits, run=str(tmp_path / "whole"), optimizer=sgd), console
    ).weights
    config = plateau(narrow, few_digits, optimizer=sgd, evaluate={"every": 3})
    for stop in (7, 10, 12, 15):  # 10 and 15: just before and after a drop
        world = World(CPU)
        console.set_step = lambda step, stop=stop, world=world: (
            world.stop_requested.set() if step >= stop - 1 else None
        )
        assert train(config, world, console).step in (stop, stop + 1)
    del console.set_step
    assert run(config, console).weights == wanted


def test_a_plateau_follows_one_validation_set(
    narrow, console, few_digits, tmp_path, damaged_set
):
    config = plateau(narrow, few_digits)
    world = World(CPU)
    console.set_step = lambda step: world.stop_requested.set() if step == 3 else None
    train(config, world, console)
    del console.set_step
    damaged_set(tmp_path / "other", bad=set(), classes=10)
    with pytest.raises(
        UserError, match="trained with another validation set, and its plateau"
    ):
        run(
            config.model_copy(
                update={
                    "data": config.data.model_copy(
                        update={"val": str(tmp_path / "other")}
                    )
                }
            ),
            console,
        )
