"""Runs what a step runs on a GPU on fake tensors, which have a device, a shape and a type, and no data.

So a machine without a GPU finds tensors on the wrong device, and what would make the host wait for the GPU. What
kernels compute it cannot tell. torch's fused optimizers and its backward have no fake, and end where they are launched.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distrain.config import Config, parse_config
from distrain.data.batch import BatchRequest, MicroBatch, PendingBatch
from distrain.data.decoding.decoder import DecodePlan
from distrain.data.order import Cursor
from distrain.distributed.lane_pool import LanePool
from distrain.distributed.world import World
from distrain.models.layers import (
    find_batch_norms,
    get_trainable_parameters,
    update_all_running_stats,
)
from distrain.monitor.meters import Meters
from distrain.optim.accumulate import GradientAccumulator
from distrain.optim.optimizer import Optimizer, compute_total_norm
from distrain.training.evaluate import compute_chunk_sums
from distrain.training.forward_pass import count_correct, forward

CUDA = torch.device("cuda", 0)
CLASSES = 10
BASE = {
    "data": {"train": "x"},
    "augment": {"crop": 64},
    "schedule": {"name": "constant", "lr": 0.1},
    "global_batch": 8,
    "virtual_workers": 4,
}
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Launches(TorchDispatchMode):
    """Counts operators on GPU tensors by name, and refuses what makes the host wait for the GPU.

    FakeTensorMode itself refuses what needs data: item, tolist, bool, nonzero, and an index by a mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            if function in _COPIES:
                source = (
                    args[1] if function is torch.ops.aten.copy_.default else args[0]
                )
                blocking = not (
                    args[2]
                    if len(args) > 2
                    else (kwargs or {}).get("non_blocking", False)
                )
                assert found.device == source.device or not blocking, (
                    f"{function} waits for {source.device}"
                )
            if found.device.type == "cuda" and not function.is_view:
                self.counts[function.name()] += 1
        return found


@contextmanager
def fake_gpu() -> Iterator[Launches]:
    """Inside, tensors on a GPU can be made, without data; what is done to them is counted."""
    patched = {
        (torch.cuda.amp.common, "amp_definitely_not_available"): lambda: False,
        (torch.cuda, "is_bf16_supported"): lambda *_, **__: True,
    }
    before = {key: getattr(*key) for key in patched}
    for key, stand_in in patched.items():
        setattr(*key, stand_in)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Launches() as launches:
            yield launches
    finally:
        for key, original in before.items():
            setattr(*key, original)


def config(**changes: Any) -> Config:
    """A small run; keywords replace whole top-level keys."""
    return parse_config({**BASE, **changes}, "fake")


def network(settings: Config) -> nn.Module:
    """The model of a config, its weights on the fake GPU."""
    model = settings.model.build_skeleton(CLASSES)
    state = {
        name: torch.empty(t.shape, dtype=t.dtype, device=CUDA)
        for name, t in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model


def micro_batch(settings: Config, size: int, *, bad: bool = False) -> MicroBatch:
    """A micro-batch as the loader hands it over, one sample of it bad."""
    crop = settings.augment.crop
    normalise = settings.data.normalise == "loader"
    graph = DecodePlan(
        size,
        crop,
        is_raw=False,
        resize=False,
        decode_full_image=False,
        normalize=normalise,
        std=np.ones(3, np.float32),
    )
    shape = (size, 3, crop, crop) if normalise else (size, crop, crop, 3)
    pixels = torch.empty(
        shape, dtype=torch.float32 if normalise else torch.uint8, device=CUDA
    )
    weights, labels = torch.ones(size), torch.zeros(size, dtype=torch.int64)
    request = BatchRequest(Cursor(0, 0), 0, np.arange(size), 0)
    draws = SimpleNamespace(mirror=np.zeros(size, np.int32))
    feed = SimpleNamespace(augment_params=draws, mean=np.zeros((size, 3), np.float32))
    blank = {0} if bad else set()
    pending = PendingBatch(request, labels, weights, {}, feed, blank)
    return pending.to_micro_batch(pixels, graph, CUDA)


def step(settings: Config, model: nn.Module, batches: list[MicroBatch]) -> None:
    """One step: forward, add, reduce, finish, meters, optimizer, running moments; then what a log step computes."""
    parameters, norms = get_trainable_parameters(model), find_batch_norms(model)
    optimizer = Optimizer(settings.optimizer, parameters)
    exact = settings.reduction.mode == "exact"
    accumulator = GradientAccumulator(
        list(parameters.values()),
        num_virtual_workers=settings.virtual_workers,
        micro_batch_size=settings.micro_batch_size,
        fraction_bits=settings.reduction.fraction_bits if exact else None,
        num_batch_stats=sum(2 * layer.num_features for layer in norms),
    )
    lanes, meters, world = (
        LanePool(1, 1, CUDA),
        Meters(CUDA, accumulator.loss_shift),
        World(CUDA),
    )
    accumulator.begin_step()
    for batch in batches:
        with (
            torch.no_grad()
        ):  # the autograd engine wants a real device for a device's tensors
            logits, loss, moments = forward(settings, model, 0, batch)
        assert logits.dtype == torch.float32
        gradients = [
            torch.empty_like(p, requires_grad=False) for p in parameters.values()
        ]
        top1, top5 = (
            count_correct(logits, batch.labels, batch.sample_weights, k) for k in (1, 5)
        )
        accumulator.add_micro_batch(
            gradients, loss.detach(), batch.sample_weights.sum(), top1, top5, moments
        )
    totals = accumulator.start_all_reduce(world)
    accumulator.write_gradients(totals, lanes)
    may_move = meters.add_step(0, totals)
    try:
        optimizer.step(may_move * 0.1, 1.0)
    except RuntimeError as error:  # torch's fused function would be launched now
        if "NVIDIA driver" not in str(error):
            raise
    update_all_running_stats(norms, accumulator.mean_batch_stats, may_move)
    assert compute_total_norm(list(parameters.values())).device == CUDA


def whole(settings: Config) -> Launches:
    """A step of two micro-batches, and a chunk of an evaluation, on the fake GPU."""
    with fake_gpu() as launches:
        model = network(settings)
        images = micro_batch(settings, settings.micro_batch_size)
        bad = micro_batch(settings, settings.micro_batch_size, bad=True)
        step(settings, model, [images, bad])
        model.eval()
        chunk = micro_batch(settings, 4, bad=True)
        assert compute_chunk_sums(settings, model, chunk).device == CUDA
    return launches
