import json

import pytest
import torch

from distrain.checkpoint import Checkpoints, best_name, checkpoint_attempts, digest, load, load_newest
from distrain.data.store import Store
from distrain.errors import RunError


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 5, generator=generator), "b": torch.randn(3, generator=generator)}


def save(store, step, *, attempt=1, keep=2, best=False, wait=True):
    checkpoints = Checkpoints(store, attempt=attempt, keep=keep)
    checkpoints.save(step, tensors(step), tensors(-step), {"best": {"top1": step}, "note": step}, best=best)
    if wait:
        checkpoints.wait()


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path) if request.param == "local" else f"memory://checkpoints/{tmp_path.name}")


def test_save_load_save(store):
    save(store, 5)
    loaded, problems = load_newest(store)
    assert problems == []
    assert (loaded.step, loaded.state["note"], loaded.name) == (5, 5, "step-00000005-attempt-001")
    assert digest(loaded.model) == digest(tensors(5))
    assert digest(loaded.optimizer) == digest(tensors(-5))
    assert all(loaded.model[k].dtype == torch.float32 for k in loaded.model)


def test_a_copy_is_saved_not_what_changes_later(store):
    model = tensors(1)
    checkpoints = Checkpoints(store, attempt=1, keep=2)
    checkpoints.save(1, model, {}, {"best": {}}, best=False)
    model["a"].zero_()
    checkpoints.wait()
    assert digest(load_newest(store)[0].model) == digest(tensors(1))


def test_the_newest_and_the_best_are_kept(store):
    for step in range(1, 7):
        save(store, step, best=step == 2)
    names = [n for n in store.list("checkpoints") if n.startswith("step")]
    assert names == [f"step-0000000{s}-attempt-001" for s in (2, 5, 6)]
    assert best_name(store) == "step-00000002-attempt-001"
    assert load(store, best_name(store)).step == 2


def test_one_without_a_manifest_does_not_exist(store):
    save(store, 1)
    store.write("checkpoints/step-00000009-attempt-001/model.safetensors", b"half")
    assert load_newest(store)[0].step == 1
    assert checkpoint_attempts(store) == [1]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
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
    loaded, problems = load_newest(store)
    assert loaded.step == 1
    assert digest(loaded.model) == digest(tensors(1))
    if (file, fault) == ("manifest.json", "missing"):
        assert problems == [], "without a manifest it does not exist"
    else:
        assert len(problems) == 1
        assert "step-00000002-attempt-001 is damaged" in problems[0]
        assert file == "manifest.json" or file in problems[0]


def test_nothing_whole_is_an_error_not_a_fresh_start(store):
    save(store, 1)
    store.write("checkpoints/step-00000001-attempt-001/state.json", b"{}")
    with pytest.raises(RunError, match="no checkpoint in .* is whole"):
        load_newest(store)


def test_damaged_ones_of_an_older_attempt_do_not_push_out_new_ones(store):
    for step in (80, 90, 100):
        save(store, step, keep=3)
    for step in (90, 100):
        store.write(f"checkpoints/step-{step:08d}-attempt-001/state.json", b"{}")
    save(store, 85, attempt=2)
    loaded, problems = load_newest(store)
    assert (loaded.step, len(problems)) == (85, 1)
    save(store, 90, attempt=2)
    assert load_newest(store)[0].name == "step-00000090-attempt-002"
    assert store.list("checkpoints") == ["step-00000085-attempt-002", "step-00000090-attempt-002"]


def test_a_failed_clean_up_keeps_what_was_saved(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    for step in (1, 2):
        save(store, step)

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(store, "remove", refuse)
    told = []
    checkpoints = Checkpoints(store, attempt=1, keep=2, tell=told.append)
    checkpoints.save(3, tensors(3), {}, {"best": {}}, best=False)
    checkpoints.wait()
    assert len(told) == 1
    assert "step-00000003-attempt-001 is saved, but older ones could not be cleaned up" in told[0]
    monkeypatch.undo()
    assert load_newest(store)[0].step == 3


def test_a_broken_pointer_to_the_best_is_no_obstacle(store):
    store.write("checkpoints/best.json", b"")
    save(store, 1)
    assert best_name(store) is None
    assert load_newest(store)[0].step == 1


def test_no_checkpoint_at_all(store):
    assert load_newest(store) == (None, [])


def test_another_format_is_refused(store):
    save(store, 1)
    folder = "checkpoints/step-00000001-attempt-001"
    state = json.loads(store.read(f"{folder}/state.json"))
    text = json.dumps({**state, "format": 99}).encode()
    import hashlib

    manifest = json.loads(store.read(f"{folder}/manifest.json"))
    manifest["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    store.write(f"{folder}/state.json", text)
    store.write(f"{folder}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(RunError, match="has format 99"):
        load_newest(store)


def test_a_failed_save_is_told_and_leaves_the_one_before(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    save(store, 1)
    original = store.write

    def full(path, data):
        if path.endswith("optimizer.safetensors"):
            raise OSError(28, "No space left on device")
        original(path, data)

    monkeypatch.setattr(store, "write", full)
    checkpoints = Checkpoints(store, attempt=1, keep=2)
    checkpoints.save(2, tensors(2), tensors(3), {"best": {}}, best=False)
    with pytest.raises(RunError, match="could not be saved .*No space left.*The one before is untouched"):
        checkpoints.wait()
    assert store.list("checkpoints") == ["step-00000001-attempt-001"]
    assert load_newest(store)[0].step == 1
