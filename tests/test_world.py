import os
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrain.errors import UserError
from distrain.lanes import Lanes, lanes_for
from distrain.world import World, environment, local_world, numerics

CPU = torch.device("cpu")


@given(st.integers(1, 64), st.data())
def test_hosted_deals_floor_or_ceil(v, data):
    ranks = data.draw(st.integers(1, v))
    dealt = [World(CPU, rank=r, ranks=ranks).hosted(v) for r in range(ranks)]
    assert [x for part in dealt for x in part] == list(range(v))
    assert {len(part) for part in dealt} <= {v // ranks, -(-v // ranks)}


@pytest.mark.parametrize("lanes", [1, 3])
def test_lanes_do_everything_once(lanes):
    seen, lock = [], threading.Lock()

    def work(i: int) -> None:
        with lock:
            seen.append((i, torch.get_num_threads()))

    with Lanes(lanes, 1, CPU) as pool:
        pool.run(work, iter(range(100)))
    assert sorted(seen) == [(i, 1) for i in range(100)]


def test_lanes_raise_the_error_and_stop():
    done = []

    def work(i: int) -> None:
        if i == 5:
            raise RuntimeError("five")
        done.append(i)

    with Lanes(2, 1, CPU) as pool, pytest.raises(RuntimeError, match="five"):
        pool.run(work, iter(range(10_000)))
    assert len(done) < 10_000


def test_numerics_are_set_and_set_back(narrow):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with numerics(narrow(), CPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_num_threads() == 1
    assert before == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    with numerics(narrow(reduction={"mode": "fast"}), CPU):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("loaded", [True, False])
def test_torchs_compiler_is_told_and_not_loaded_for_that(narrow, monkeypatch, loaded):
    told = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, **_: told.append(mode))
    monkeypatch.setattr(sys, "modules", {**sys.modules, **({"torch._inductor": torch} if loaded else {})})
    if not loaded:
        sys.modules.pop("torch._inductor", None)
    monkeypatch.delenv("TORCHINDUCTOR_DETERMINISTIC", raising=False)
    with numerics(narrow(), CPU):
        assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1", "for a model that loads it later"
        assert told == [True] * loaded
        assert torch.are_deterministic_algorithms_enabled() == (not loaded)
    assert told == [True, False] * loaded


def test_lanes_never_exceed_what_is_hosted(narrow):
    assert lanes_for(narrow(lanes=9), World(CPU)) == 4
    assert lanes_for(narrow(lanes=9), World(CPU, rank=0, ranks=3)) == 1


def test_a_missing_gpu_is_the_users_to_know(narrow):
    if torch.cuda.is_available():
        assert local_world(narrow(device="auto")).device.type == "cuda"
        return
    assert local_world(narrow(device="auto")).device == CPU
    with pytest.raises(UserError, match="torch finds no GPU"):
        local_world(narrow(device="cuda"))
    with pytest.raises(UserError, match="tf32 exists on NVIDIA GPUs only"), numerics(narrow(precision="tf32"), CPU):
        pass


def test_environment_names_versions():
    found = environment(CPU)
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert {"python", "numpy", "device", "cpu_capability"} <= set(found)
