"""Profile a step: how many kernels, the longest, and how busy the GPU is: `profiling.py profile SECONDS`."""

import time
from typing import Any

import torch
from common import DRY, Out, main
from device import DEVICE, sync
from networks import CLASSES, Case, MicroBatch, make_accumulator
from torch.profiler import ProfilerActivity, profile

from distrain.distributed.lane_pool import LanePool
from distrain.distributed.world import World
from distrain.optim.optimizer import Optimizer
from distrain.optim.sgd import SGD
from distrain.training.forward_pass import count_correct

CASES = [  # and virtual workers
    (Case(precision="fp32", batch=16), 8),
    (Case(precision="bf16", batch=128), 1),
    (Case(precision="bf16", batch=1024), 1),
]
if DRY:
    CASES = [(Case(precision="fp32", batch=2), 2)]
WARM_UP, TIMED, PROFILED = (1, 1, 1) if DRY else (3, 5, 3)
"""Steps: before anything is measured, without the profiler, and with it."""


class Step:
    """A training step on images that are there."""

    def __init__(self, case: Case, workers: int) -> None:
        """Use it under `numerics` of the case."""
        batch = case.batch
        self._workers = workers
        self._gradients = MicroBatch(case)
        self._accumulator = make_accumulator(
            self._gradients.parameters, "exact", batch, workers
        )
        self._optimizer = Optimizer(
            SGD(), dict(self._gradients.model.named_parameters())
        )
        self._loss = torch.zeros((), device=DEVICE)
        self._ones = torch.tensor(float(batch), device=DEVICE)
        self._rate = torch.tensor(0.0, device=DEVICE)
        self._logits = torch.randn(batch, CLASSES, device=DEVICE)
        self._labels = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        self._weights = torch.ones(batch, device=DEVICE)

    def __call__(self, lanes: LanePool) -> None:
        self._accumulator.begin_step()
        for worker in range(self._workers):
            gradients = self._gradients(worker)
            top1, top5 = (
                count_correct(self._logits, self._labels, self._weights, k)
                for k in (1, 5)
            )
            self._accumulator.add_micro_batch(
                gradients, self._loss, self._ones, top1, top5
            )
        self._accumulator.write_gradients(
            self._accumulator.start_all_reduce(World(DEVICE)), lanes
        )
        self._optimizer.step(self._rate)


def kernels(out: Out) -> None:
    """Profile a step of the default recipe, and large ones."""
    for case, workers in CASES:
        if not out.has(6, case):
            return
        with out.guarded(" ".join(map(str, case))), case.numerics():
            measure(out, case, workers)


def measure(out: Out, case: Case, workers: int) -> None:
    """Measure a step with the profiler off, then list the kernels of some with it on."""
    step = Step(case, workers)
    with LanePool(1, 1, DEVICE) as lanes:
        for _ in range(WARM_UP):
            step(lanes)
        sync()
        began = time.perf_counter()
        for _ in range(TIMED):
            step(lanes)
        sync()
        wall = 1000 * (time.perf_counter() - began) / TIMED
        activities = [ProfilerActivity.CPU, *([] if DRY else [ProfilerActivity.CUDA])]
        with profile(activities=activities) as seen:
            for _ in range(PROFILED):
                step(lanes)
            sync()
    events = [
        event for event in seen.events() if str(event.device_type).endswith("CUDA")
    ]
    out(
        "profile",
        precision=case.precision,
        batch=case.batch,
        virtual_workers=workers,
        wall_ms=round(wall, 2),
        busy_ms=round(
            sum(event.time_range.elapsed_us() for event in events) / PROFILED / 1000, 2
        ),
        kernels=round(len(events) / PROFILED),
        images_per_second=round(1000 * case.batch * workers / wall),
        top=longest(events),
    )


def longest(events: list[Any]) -> list[tuple[str, float, int]]:
    """Return the 30 kernels that take most of a step: name, times per step, microseconds per step."""
    counts: dict[str, float] = {}
    spent: dict[str, float] = {}
    for event in events:
        name = event.name[:90]
        counts[name] = counts.get(name, 0.0) + 1 / PROFILED
        spent[name] = spent.get(name, 0.0) + event.time_range.elapsed_us() / PROFILED
    names = sorted(spent, key=spent.__getitem__, reverse=True)[:30]
    return [(name, round(counts[name], 1), round(spent[name])) for name in names]


if __name__ == "__main__":
    main({"profile": kernels})
