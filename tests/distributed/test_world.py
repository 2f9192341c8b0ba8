import math
import os
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import distrain.distributed.numerics
import distrain.distributed.world
from distrain.distributed.lane_pool import LanePool, count_lanes
from distrain.distributed.world import World, make_local_world, open_process_group
from distrain.errors import AttemptError, LostRankError, UserError

CPU = torch.device("cpu")
GPU = torch.device("cuda", 3)
"""Asked for, and never there."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@given(st.integers(1, 64), st.data())
def test_hosted_deals_floor_or_ceil(v, data):
    ranks = data.draw(st.integers(1, v))
    dealt = [
        World(CPU, rank=r, world_size=ranks).local_virtual_workers(v)
        for r in range(ranks)
    ]
    assert [x for part in dealt for x in part] == list(range(v))
    assert {len(part) for part in dealt} <= {v // ranks, -(-v // ranks)}


def test_gathered_values_have_been_through_json_on_a_single_rank_too():
    value = {1: (2, None), "loss": float("inf")}
    assert World(CPU).all_gather_object(value) == [{"1": [2, None], "loss": math.inf}]


@pytest.mark.parametrize("lanes", [1, 3])
def test_lanes_do_everything_once(lanes):
    seen, lock = [], threading.Lock()

    def work(i: int) -> None:
        with lock:
            seen.append((i, torch.get_num_threads()))

    with LanePool(lanes, 1, CPU) as pool:
        pool.for_each(work, iter(range(100)))
    assert sorted(seen) == [(i, 1) for i in range(100)]


def test_lanes_raise_the_error_and_stop():
    done = []

    def work(i: int) -> None:
        if i == 5:
            raise RuntimeError("five")
        done.append(i)

    with LanePool(2, 1, CPU) as pool, pytest.raises(RuntimeError, match="five"):
        pool.for_each(work, iter(range(10_000)))
    assert len(done) < 10_000


def test_lanes_never_exceed_what_is_hosted():
    assert count_lanes(World(CPU), 4, 9) == 4
    assert count_lanes(World(CPU, rank=0, world_size=3), 4, 9) == 1


def test_a_missing_gpu_is_the_users_to_know():
    if torch.cuda.is_available():
        assert make_local_world("auto").device.type == "cuda"
        return
    assert make_local_world("auto").device == CPU
    with pytest.raises(UserError, match="torch finds no GPU"):
        make_local_world("cuda")


def test_lanes_on_a_gpu_compute_on_that_of_the_rank(cuda):
    with LanePool(2, 1, GPU) as lanes:
        lanes.for_each(lambda _: None, range(8))
    assert set(cuda.made) == {("set_device", GPU)}


@pytest.fixture
def joining(monkeypatch, cuda):
    """Rank 0 of two that have GPUs: what it asks of torch, in order, and its communicator's stand-in."""

    class Watch:
        def __init__(self, group, rank, world_size, on_peer_lost):
            cuda.made.append(("watch", group, rank, world_size))
            cuda.lose = on_peer_lost

        def leave_ring(self, *, failed, timeout):
            cuda.made.append(("leave", failed))

    class Communicator:
        @staticmethod
        def abort():
            cuda.made.append(("abort", cuda.world.peer_lost.is_set()))
            raise RuntimeError("not in time")

    def init(backend, *, device_id, **_):
        cuda.made.append(("init", backend, device_id))

    for name in (
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
        *INTERFACES,
    ):
        monkeypatch.setenv(
            name, ""
        )  # noted, so that it is as before when the test ends
        monkeypatch.delenv(name)
    monkeypatch.setattr(distrain.distributed.world, "PeerMonitor", Watch)
    monkeypatch.setattr(
        distrain.distributed.world, "_get_nccl_backend", lambda device: Communicator
    )
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "new_group", cuda.noting("new_group", "a gloo group"))
    monkeypatch.setattr(dist, "is_initialized", lambda: "init" in cuda.names)
    monkeypatch.setattr(dist, "destroy_process_group", cuda.noting("destroy"))
    options = {"timeout": 5.0, "num_cores": 1, "launch_id": "s"}
    return lambda: open_process_group(GPU, 0, 2, lambda address: address, **options)


def test_gpus_join_by_number_and_leave_in_order(joining, cuda):
    with joining() as world:
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0", (
            "torch's watch would end the process"
        )
        assert world.desired_world_size == 2
    assert cuda.names == [
        "set_device",
        "init",
        "new_group",
        "watch",
        "leave",
        "destroy",
    ]
    assert cuda.made[0] == ("set_device", GPU)
    assert cuda.made[1] == ("init", "cpu:gloo,cuda:nccl", GPU)
    assert cuda.made[2] == ("new_group", "gloo", timedelta(seconds=5)), (
        "who does not come to it counts as lost"
    )
    assert cuda.made[-2] == ("leave", False)


def test_a_rank_that_fails_tells_the_others(joining, cuda):
    with pytest.raises(AttemptError), joining():
        raise AttemptError("no space left")
    assert cuda.made[-2] == ("leave", True)


def test_a_lost_peer_aborts_nccl_and_voids_what_was_reduced(joining, cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", cuda.noting("synchronize"))
    with joining() as world:
        cuda.world = world
        world.synchronize_device()
        cuda.lose()
        with pytest.raises(LostRankError):
            world.synchronize_device()
    assert cuda.names[4:] == ["synchronize", "abort", "synchronize", "leave", "destroy"]
    assert cuda.made[5] == ("abort", True), (
        "who waits for the GPU must find it out as soon as the abort frees it"
    )


def test_gpus_that_cannot_be_connected_are_no_lost_rank(joining, cuda, monkeypatch):
    def fail(backend, **_):
        cuda.made.append(("init", backend))
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(dist, "init_process_group", fail)
    sentence = "the ranks. GPUs could not be connected: CUDA error: out of memory"
    with pytest.raises(AttemptError, match=sentence) as caught, joining():
        pass
    assert not isinstance(caught.value, LostRankError)
    assert cuda.names == ["set_device", "init", "destroy"]
