"""Measure each part of a step besides forward and backward, on the parameters of alexnet."""

import time
from collections.abc import Callable
from typing import Any

import torch
from common import DRY, TMP, Out
from device import DEVICE, milliseconds
from networks import CLASSES, NETWORKS, make_accumulator
from torch import Tensor, nn

from distrain.data.storage.store import Store
from distrain.distributed.lane_pool import LanePool
from distrain.distributed.world import World
from distrain.models.layers import Dropout, micro_batch_context
from distrain.models.response_norm import LocalResponseNorm
from distrain.monitor.meters import Meters
from distrain.optim.adam import Adam
from distrain.optim.lars import LARS
from distrain.optim.optimizer import Optimizer
from distrain.optim.sgd import SGD
from distrain.rundir.checkpoint import CheckpointManager, hash_tensors
from distrain.rundir.lease import acquire_lease
from distrain.training.forward_pass import count_correct

BATCH = 4 if DRY else 128
OPTIMIZERS = {
    "sgd": SGD(),
    "sgd clipped": SGD(clip_norm=1e9),
    "adam": Adam(),
    "lars": LARS(),
}


def parts(out: Out) -> None:
    """Measure each part; one that fails does not stop the others."""
    model = NETWORKS["alexnet"].build(CLASSES, 0).to(DEVICE)
    for mode in ("exact", "fast"):
        with out.guarded(f"sums, {mode}"):
            sums(out, list(model.parameters()), mode)
    with out.guarded("optimizers"):
        optimizers(out, model)
    with out.guarded("layers"):
        layers(out)
    with out.guarded("correct"):
        logits = torch.randn(BATCH, CLASSES, device=DEVICE)
        labels = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
        weights = torch.ones(BATCH, device=DEVICE)
        part(
            out,
            "correct, top 1 and 5",
            lambda: [count_correct(logits, labels, weights, k) for k in (1, 5)],
            0.1,
        )
    with out.guarded("checkpoint"):
        checkpoint(out, model)
    with out.guarded("digest"):
        began = time.perf_counter()
        hash_tensors(model.state_dict())
        out(
            "part",
            part="digest of the weights",
            ms=round(1000 * (time.perf_counter() - began), 1),
        )


def part(out: Out, name: str, work: Callable[[], object], seconds: float = 0.2) -> None:
    """Measure one part."""
    out("part", part=name, **milliseconds(work, seconds))


def sums(out: Out, parameters: list[nn.Parameter], mode: str) -> None:
    """Measure the sums over micro-batches, and the meters that read the totals."""
    gradients = [torch.randn_like(p) * 2.0**30 for p in parameters]
    loss = torch.zeros((), device=DEVICE)
    ones = torch.tensor(128.0, device=DEVICE)
    accumulator = make_accumulator(parameters, mode)

    def first() -> None:
        accumulator.begin_step()
        accumulator.add_micro_batch(gradients, loss, ones, ones, ones)

    part(out, f"add, first of a step, {mode}", first)
    first()
    part(
        out,
        f"add, {mode}",
        lambda: accumulator.add_micro_batch(gradients, loss, ones, ones, ones),
    )
    with LanePool(1, 1, DEVICE) as lanes:
        first()
        totals = accumulator.start_all_reduce(World(DEVICE))
        part(
            out,
            f"reduce and finish, {mode}",
            lambda: accumulator.write_gradients(
                accumulator.start_all_reduce(World(DEVICE)), lanes
            ),
        )
    meters = Meters(DEVICE, accumulator.loss_shift)
    part(out, f"meters, {mode}", lambda: meters.add_step(1, totals), 0.1)


def optimizers(out: Out, model: nn.Module) -> None:
    """Measure a step of each optimizer."""
    rate = torch.tensor(1e-6, device=DEVICE)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    for name in OPTIMIZERS:
        with out.guarded(name):
            part(out, f"optimizer {name}", stepping(make_optimizer(name, model), rate))


def make_optimizer(name: str, model: nn.Module) -> Optimizer:
    """Make an optimizer."""
    return Optimizer(OPTIMIZERS[name], dict(model.named_parameters()))


def stepping(made: Optimizer, rate: Tensor) -> Callable[[], None]:
    """Return a function that steps."""
    return lambda: made.step(rate)


def layers(out: Out) -> None:
    """Measure our own layers, forward and backward."""
    with micro_batch_context(0, 0, 0):
        for width in (9216, 4096):
            shape: tuple[int, ...] = (BATCH, width)
            part(
                out,
                f"dropout {BATCH} x {width}, forward and backward",
                forward_backward(Dropout(0.5, 0), shape),
                0.1,
            )
    for shape in ((BATCH, 96, 55, 55), (BATCH, 256, 27, 27)):
        work = forward_backward(LocalResponseNorm(groups=2), shape)
        part(out, f"response normalisation {shape}, forward and backward", work, 0.1)


def forward_backward(layer: nn.Module, shape: tuple[int, ...]) -> Callable[[], object]:
    """Return a function that runs a layer forward and backward on random numbers."""
    x = torch.randn(*shape, device=DEVICE, requires_grad=True)
    return lambda: torch.autograd.grad(layer(x).sum(), x)


def checkpoint(out: Out, model: nn.Module) -> None:
    """Measure how long a save holds up the training thread: the copy of all weights and moments to the CPU.

    The first save makes the room for its copies, later ones use it again.
    """
    state: dict[str, dict[str, Any]] = {
        "model": model.state_dict(),
        "optimizer": make_optimizer("adam", model).state_dict(),
    }
    store = Store(str(TMP / "checkpoint"))
    with acquire_lease(store, "sheet", lambda text: out("lease", text=text)) as lease:
        saves = CheckpointManager(
            store,
            lease,
            keep_latest=1,
            retry_seconds=0.0,
            warn=lambda text: out("checkpoint", text=text),
        )
        spent = []
        for _ in range(2 if DRY else 6):
            if not DRY:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for name, tensors in state.items():
                saves._copy_to_cpu(name, tensors)
            spent.append(round(1000 * (time.perf_counter() - began), 1))
    size = sum(
        tensor.nbytes for tensors in state.values() for tensor in tensors.values()
    )
    out(
        "part",
        part="checkpoint's copy, alexnet and Adam",
        first_ms=spent[0],
        ms=min(spent[1:]),
        MiB=size >> 20,
    )
