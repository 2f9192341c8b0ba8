"""Where ranks are placed when GPUs are counted by themselves: a real Ray whose GPUs are only claimed."""

import json
import threading

import pytest

from distrain.launch import ray_trainer
from distrain.launch.ray_cluster import connect_to_ray
from distrain.launch.ray_driver import _RayDriver

# What Ray says of itself, in this process, is not ours to change.
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
CPUS, GPUS = 16, 3


def test_a_rank_on_every_gpu(narrow, console, monkeypatch, tmp_path):
    """Each holds one of them, and its share of the cores; what stays idle is said."""

    def run_rank(order):  # a function of this function's: it travels by value
        import json

        import ray
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        cpus = ray.get_runtime_context().get_assigned_resources()["CPU"]
        with open(f"{order['found']}-{rank}.json", "w") as file:
            json.dump([*ray.get_gpu_ids(), cpus, *order["allocation"]], file)

    monkeypatch.setattr(ray_trainer, "train_loop_per_worker", run_rank)
    with connect_to_ray(None, console, cpus=CPUS, gpus=GPUS):
        config = narrow(device="auto", virtual_workers=8)
        driver = _RayDriver(config, console, None, {}, stop=threading.Event())
        workers, allocation = driver._capacity.wait_for_capacity()
        order = {"launch_id": "gpus", "fit": 1, "found": str(tmp_path / "found")}
        ray_trainer.build_trainer(
            config, workers, allocation, order, driver._mailbox
        ).fit()
        told = [json.loads(path.read_text()) for path in tmp_path.glob("found-*.json")]
        assert len({gpu for gpu, *_ in told}) == len(told) == GPUS
        assert [rest for _, *rest in told] == [
            [CPUS // GPUS, 1, GPUS, CPUS // GPUS, 1]
        ] * GPUS
        driver = _RayDriver(
            narrow(device="auto", virtual_workers=1),
            console,
            None,
            {},
            stop=threading.Event(),
        )
        assert driver._capacity.wait_for_capacity()[0] == 1
    idle = [event for event in console.events if "idle" in event]
    assert idle == [
        "2 of 3 GPUs stay idle: a run has at most virtual_workers = 1 workers (fixed for the whole run)"
    ]
