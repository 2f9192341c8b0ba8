import json
from contextlib import contextmanager

import pytest
import torch

from distrain.data.storage.store import Store
from distrain.errors import AttemptError, RunError
from distrain.rundir.checkpoint import (
    CheckpointManager,
    hash_tensors,
    read_best_name,
)
from distrain.rundir.checkpoint_loading import (
    load_checkpoint,
    load_newest_checkpoint,
)
from distrain.rundir.lease import Lease


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(4, 5, generator=generator),
        "b": torch.randn(3, generator=generator),
    }


@contextmanager
def checkpoints(store, *, attempt=1, keep=2, start=0, patience=0, told=None):
    """Those of an attempt that started from a step."""
    record = {"session": str(attempt), "from_step": start, "counter": 0, "ended": False}
    with Lease(store, attempt, record) as lease:
        lease.record_start(start, 1)
        yield CheckpointManager(
            store,
            lease,
            keep_latest=keep,
            retry_seconds=patience,
            warn=([] if told is None else told).append,
        )


def save(store, step, *, best=False, **options):
    with checkpoints(store, **options) as found:
        found.save(
            step,
            tensors(step),
            tensors(-step),
            {"note": step},
            best={"top1": step} if best else None,
        )
        found.wait()


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(
        str(tmp_path)
        if request.param == "local"
        else f"memory://checkpoints/{tmp_path.name}"
    )


def test_save_load_save(store):
    save(store, 5)
    loaded, problems = load_newest_checkpoint(store)
    assert problems == []
    assert (loaded.step, loaded.state["note"], loaded.name) == (
        5,
        5,
        "step-00000005-attempt-001",
    )
    assert hash_tensors(loaded.model_state_dict) == hash_tensors(tensors(5))
    assert hash_tensors(loaded.optimizer_state_dict) == hash_tensors(tensors(-5))
    assert all(
        loaded.model_state_dict[k].dtype == torch.float32
        for k in loaded.model_state_dict
    )


def test_any_type_and_shape_is_read_back_by_the_library(store):
    generator = torch.Generator().manual_seed(0)
    odd = {
        "scalar": torch.tensor(3.5),
        "bf16": torch.randn(3, 5, 7, generator=generator).bfloat16(),
        "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        "count": torch.arange(5),
        "strided": torch.randn(6, 4, generator=generator).t(),
    }
    with checkpoints(store) as found:
        found.save(1, odd, {}, {}, best=None)
        found.wait()
    loaded = load_newest_checkpoint(store)[0].model_state_dict
    assert loaded.keys() == odd.keys()
    for name, tensor in odd.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_copy_is_saved_not_what_changes_later(store):
    model = tensors(1)
    with checkpoints(store) as found:
        found.save(1, model, {}, {}, best=None)
        model["a"].zero_()
        found.wait()
    assert hash_tensors(
        load_newest_checkpoint(store)[0].model_state_dict
    ) == hash_tensors(tensors(1))


def test_the_newest_and_the_best_are_kept(store):
    for step in range(1, 7):
        save(store, step, best=step == 2)
    names = [n for n in store.list_names("checkpoints") if n.startswith("step")]
    assert names == [f"step-0000000{s}-attempt-001" for s in (2, 5, 6)]
    assert read_best_name(store) == "step-00000002-attempt-001"
    assert load_checkpoint(store, read_best_name(store)).step == 2


def test_one_without_a_manifest_does_not_exist(store):
    save(store, 1)
    store.write("checkpoints/step-00000009-attempt-001/model.safetensors", b"half")
    assert load_newest_checkpoint(store)[0].step == 1


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"],
)
@pytest.mark.parametrize("fault", ["flip", "cut", "missing"])
def test_damage_is_named_and_the_one_before_is_used(store, file, fault):
    save(store, 1)
    save(store, 2)
    path = f"checkpoints/step-00000002-attempt-001/{file}"
    data = bytearray(store.read(path))
    if fault == "missing":
        store.remove(path)
    else:
        data[len(data) // 2] ^= 1
        store.write(path, bytes(data if fault == "flip" else data[:-9]))
    loaded, problems = load_newest_checkpoint(store)
    assert loaded.step == 1
    assert hash_tensors(loaded.model_state_dict) == hash_tensors(tensors(1))
    if (file, fault) == ("manifest.json", "missing"):
        assert problems == [], "without a manifest it does not exist"
    else:
        assert len(problems) == 1
        assert "step-00000002-attempt-001 is damaged" in problems[0]
        assert file == "manifest.json" or file in problems[0]


def test_nothing_whole_is_an_error_not_a_fresh_start(store):
    save(store, 1)
    store.write("checkpoints/step-00000001-attempt-001/state.json", b"{}")
    with pytest.raises(RunError, match="all checkpoints in .* are damaged"):
        load_newest_checkpoint(store)


def test_damaged_ones_of_an_older_attempt_do_not_push_out_new_ones(store):
    for step in (80, 90, 100):
        save(store, step, keep=3)
    for step in (90, 100):
        store.write(f"checkpoints/step-{step:08d}-attempt-001/state.json", b"{}")
    save(store, 85, attempt=2, start=80)
    loaded, problems = load_newest_checkpoint(store)
    assert (loaded.step, problems) == (85, []), (
        "what was given up is not even looked at"
    )
    save(store, 90, attempt=2, start=80)
    assert load_newest_checkpoint(store)[0].name == "step-00000090-attempt-002"
    assert store.list_names("checkpoints") == [
        "step-00000085-attempt-002",
        "step-00000090-attempt-002",
    ]


def test_a_failed_clean_up_keeps_what_was_saved(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    for step in (1, 2):
        save(store, step)

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(store, "remove", refuse)
    told = []
    with checkpoints(store, told=told) as found:
        found.save(3, tensors(3), {}, {}, best=None)
        found.wait()
    assert len(told) == 1
    assert (
        "step-00000003-attempt-001 is saved, but naming the best one or removing old ones failed"
        in told[0]
    )
    monkeypatch.undo()
    assert load_newest_checkpoint(store)[0].step == 3


def test_a_broken_pointer_to_the_best_is_no_obstacle(store):
    store.write("checkpoints/best.json", b"")
    save(store, 1)
    assert read_best_name(store) is None
    assert load_newest_checkpoint(store)[0].step == 1


def test_no_checkpoint_at_all(store):
    assert load_newest_checkpoint(store) == (None, [])


def test_another_format_is_refused(store):
    save(store, 1)
    folder = "checkpoints/step-00000001-attempt-001"
    state = json.loads(store.read(f"{folder}/state.json"))
    text = json.dumps({**state, "format": 99}).encode()
    import hashlib

    manifest = json.loads(store.read(f"{folder}/manifest.json"))
    manifest["state.json"] = {
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    store.write(f"{folder}/state.json", text)
    store.write(f"{folder}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(RunError, match="has format 99"):
        load_newest_checkpoint(store)


def filling(store, monkeypatch, *, refusals):
    """Let the disk be full for the first so many writes of optimizers."""
    original, left = store.write, [refusals]

    def write(path, *parts):
        if path.endswith("optimizer.safetensors") and left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        original(path, *parts)

    monkeypatch.setattr(store, "write", write)


@pytest.mark.parametrize(
    ("steps", "left"), [([1], "step-00000001-attempt-001"), ([], None)]
)
def test_a_failed_save_is_told_and_leaves_the_one_before(
    tmp_path, monkeypatch, steps, left
):
    store = Store(str(tmp_path))
    for step in steps:
        save(store, step)
    filling(store, monkeypatch, refusals=-1)
    with checkpoints(store) as found:
        found.save(2, tensors(2), tensors(3), {}, best=None)
        with pytest.raises(
            AttemptError,
            match=r"could not be saved in \S+ \(No space left on device; "
            + (f"{left} is untouched" if left else "none was saved before")
            + r"\): free space",
        ):
            found.wait()
    assert store.list_names("checkpoints") == [left] * len(steps)
    loaded = load_newest_checkpoint(store)[0]
    assert (loaded and loaded.name) == left


def test_a_save_is_tried_again_until_there_is_room(tmp_path, monkeypatch):
    store, told = Store(str(tmp_path)), []
    filling(store, monkeypatch, refusals=2)
    with checkpoints(store, patience=60, told=told) as found:
        found.save(2, tensors(2), tensors(3), {}, best=None)
        found.wait()
    assert load_newest_checkpoint(store)[0].step == 2
    assert len(told) == 1
    assert "could not be saved yet" in told[0]


def test_what_an_attempt_saves_after_it_was_given_up_does_not_count(store):
    save(store, 10)
    save(store, 12, attempt=2, start=10)
    # A manifest of attempt 1 that was under way when attempt 2 began, and comes late.
    for file in (
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    ):
        data = store.read(f"checkpoints/step-00000010-attempt-001/{file}")
        store.write(f"checkpoints/step-00000020-attempt-001/{file}", data)
    assert load_newest_checkpoint(store)[0].name == "step-00000012-attempt-002"


def test_an_attempt_that_was_cut_off_writes_no_manifest_and_removes_nothing(store):
    save(store, 1)
    with checkpoints(store, keep=1) as old:
        save(store, 2, attempt=2, start=1, keep=5)
        old.save(9, tensors(9), {}, {}, best={"top1": 1})
        with pytest.raises(
            AttemptError,
            match=r"attempt 2 has taken over .*, since attempt 1 \(this one\)",
        ):
            old.wait()
    assert [n for n in store.list_names("checkpoints") if "step" in n] == [
        "step-00000001-attempt-001",
        "step-00000002-attempt-002",
    ]
    assert read_best_name(store) is None
