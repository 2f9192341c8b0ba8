"""What the science costs and reaches here: `python tests/bench/science.py [optimizer|reduction|lrn|converge]...`.

All but `converge` take times, on the GPU where there is one and else on one thread, as a training step is computed, in
interleaved rounds (`optimizer` on two threads as well); printed is JSON with medians in milliseconds and their ratios.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distrain.config import parse_config
from distrain.distributed.lane_pool import LanePool
from distrain.distributed.world import World
from distrain.losses import CrossEntropy
from distrain.models.alexnet import AlexNet
from distrain.models.layers import micro_batch_context
from distrain.models.response_norm import LocalResponseNorm
from distrain.optim.accumulate import GradientAccumulator
from distrain.optim.adam import Adam
from distrain.optim.lars import LARS
from distrain.optim.optimizer import Optimizer
from distrain.optim.sgd import SGD
from distrain.trainer import train

CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU
RATE = torch.tensor(1e-4, device=DEVICE)


def medians(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each part, in interleaved rounds after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds + 1):
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            found[name].append(1000 * (time.perf_counter() - began))
    return {
        name: round(statistics.median(times[1:]), 1) for name, times in found.items()
    }


def copy(tensors: int, like: torch.Tensor) -> Callable[[], object]:
    """A plain copy that reads and writes as many bytes as passes over `tensors` tensors of the model's size."""
    half = torch.empty(like.numel() * tensors // 2, device=DEVICE)
    other = torch.zeros_like(half)
    return lambda: half.copy_(other)


def optimizer() -> dict[str, Any]:
    """A step on 61.1 million parameters, ours and torch's, on one thread and on two."""
    flat = torch.zeros(61_100_840, device="meta")

    def parameters() -> dict[str, nn.Parameter]:
        found = dict(AlexNet().build(1000, 0).to(DEVICE).named_parameters())
        for p in found.values():
            p.grad = torch.full_like(p, 1e-3)
        return found

    def ours(rule: Any) -> Callable[[], object]:
        made = Optimizer(rule, parameters())
        return lambda: made.step(RATE)

    def torchs(kind: Any, **options: Any) -> Callable[[], object]:
        made = kind(list(parameters().values()), lr=RATE.clone(), fused=True, **options)
        return lambda: made.step()

    decay = {"weight_decay": 5e-4}
    parts = {
        "torch SGD fused": torchs(torch.optim.SGD, momentum=0.9, **decay),
        "sgd": ours(SGD(**decay)),
        "sgd, paper's form": ours(SGD(form="paper", **decay)),
        "sgd, clipped": ours(SGD(clip_norm=1e9, **decay)),
        "lars": ours(LARS(**decay)),
        "copy of 5 tensors": copy(5, flat),
        "torch Adam fused": torchs(torch.optim.Adam, **decay),
        "adam": ours(Adam(**decay)),
        "copy of 7 tensors": copy(7, flat),
    }
    found: dict[str, Any] = {}
    for threads in (1, 2) if DEVICE.type == "cpu" else (1,):
        torch.set_num_threads(threads)
        found[f"{threads} threads"] = times = medians(parts, 7)
        for name in ("sgd", "sgd, paper's form", "sgd, clipped", "lars"):
            found[f"{name} / torch SGD, {threads}"] = round(
                times[name] / times["torch SGD fused"], 3
            )
            found[f"{name} / copy, {threads}"] = round(
                times[name] / times["copy of 5 tensors"], 2
            )
        found[f"adam / torch Adam, {threads}"] = round(
            times["adam"] / times["torch Adam fused"], 3
        )
        found[f"adam / copy, {threads}"] = round(
            times["adam"] / times["copy of 7 tensors"], 2
        )
    return found


LEAST = {"data": {"train": ""}, "schedule": {"name": "constant", "lr": 1.0}}


def reduction() -> dict[str, Any]:
    """A training step of four micro-batches at 224 pixels: forward, backward, and what exact sums cost beside.

    32 samples each on a CPU, 256 on a GPU.
    """
    torch.set_num_threads(1)
    batch = 32 if DEVICE.type == "cpu" else 256
    model = AlexNet().build(1000, 0).to(DEVICE)
    parameters = list(model.parameters())
    images, labels = (
        torch.randn(batch, 3, 224, 224, device=DEVICE),
        torch.arange(batch, device=DEVICE),
    )
    made = Optimizer(SGD(), dict(model.named_parameters()))
    accumulators = {
        mode: GradientAccumulator(
            parameters,
            num_virtual_workers=4,
            micro_batch_size=batch,
            fraction_bits=bits,
        )
        for mode, bits in (("exact", 48), ("fast", None))
    }
    gradients: list[tuple[torch.Tensor, ...]] = []

    def compute(scale: float) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        with micro_batch_context(0, 0, 0):
            loss = CrossEntropy()(model(images), labels).sum()
        return torch.autograd.grad(loss * scale, parameters), loss.detach()

    def bare() -> None:
        for _ in range(4):
            gradients[:] = [compute(1.0)[0]]

    def summed(mode: str, lanes: LanePool, only: bool = False) -> Callable[[], object]:
        accumulator, ones = accumulators[mode], torch.tensor(batch, device=DEVICE)

        def step() -> None:
            accumulator.begin_step()
            for _ in range(4):
                computed, loss = (
                    (gradients[0], torch.zeros((), device=DEVICE))
                    if only
                    else compute(accumulator.loss_scale)
                )
                accumulator.add_micro_batch(computed, loss, ones, ones, ones)
            accumulator.write_gradients(
                accumulator.start_all_reduce(World(DEVICE)), lanes
            )

        return step

    with LanePool(1, 1, DEVICE) as lanes:
        parts = {
            "forward and backward": bare,
            "exact step": summed("exact", lanes),
            "fast step": summed("fast", lanes),
            "exact sums alone": summed("exact", lanes, only=True),
            "fast sums alone": summed("fast", lanes, only=True),
            "optimizer": lambda: made.step(RATE),
            "copy of the gradients": copy(2, torch.zeros(61_100_840, device="meta")),
        }
        found: dict[str, Any] = medians(parts, 5)
    whole = found["exact step"] + found["optimizer"]
    found["share of exact sums in the step"] = round(
        found["exact sums alone"] / whole, 3
    )
    found["exact step / fast step"] = round(found["exact step"] / found["fast step"], 3)
    return found


def lrn() -> dict[str, Any]:
    """Forward and backward of both response normalisations of 2012, beside the convolution before each, batch 32."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    layers = {
        "layer 1": (
            nn.Conv2d(3, 96, 11, stride=4),
            torch.randn(32, 3, 227, 227, device=DEVICE),
        ),
        "layer 2": (
            nn.Conv2d(96, 256, 5, padding=2, groups=2),
            torch.randn(32, 96, 27, 27, device=DEVICE).requires_grad_(),
        ),
    }
    for name, (convolution, x) in layers.items():
        convolution.to(DEVICE)
        wanted = [
            convolution.weight,
            convolution.bias,
            *([x] if x.requires_grad else []),
        ]
        y = convolution(x).detach().requires_grad_()
        g = torch.randn_like(y)

        def there_and_back(
            layer: nn.Module, y: torch.Tensor = y, g: torch.Tensor = g
        ) -> Callable[[], object]:
            return lambda: torch.autograd.grad(layer(y), y, g)

        def convolve(
            c: nn.Module = convolution, x: Any = x, w: Any = wanted, g: torch.Tensor = g
        ) -> object:
            return torch.autograd.grad(c(x), w, g)

        times = medians(
            {
                "convolution": convolve,
                "ours": there_and_back(LocalResponseNorm(groups=2)),
                "torch's": there_and_back(
                    nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)
                ),
            },
            7,
        )
        found[name] = times
        found[f"{name}: ours / convolution"] = round(
            times["ours"] / times["convolution"], 2
        )
        found[f"{name}: ours / torch's"] = round(times["ours"] / times["torch's"], 2)
    return found


RULES: dict[str, tuple[dict[str, Any], float]] = {
    "sgd": ({"name": "sgd"}, 0.01),
    "sgd, paper's form": ({"name": "sgd", "form": "paper"}, 0.01),
    "sgd, nesterov": ({"name": "sgd", "nesterov": True}, 0.01),
    "adam": ({"name": "adam"}, 1e-3),
    "adam, decoupled decay": (
        {"name": "adam", "decoupled": True, "weight_decay": 0.01},
        1e-3,
    ),
    "lars": ({"name": "lars"}, 0.6),
}
NORMED = {"name": "alexnet_bn", "width": 0.125, "dropout": 0.2}
# Distances to a one-hot vector want outputs that are small at first, or a softmax is saturated.
PLAIN = {"name": "alexnet", "width": 0.125}
BINARY = {"name": "hinge", "form": "binary", "one_vs_rest": True}
LOSSES: dict[str, tuple[dict[str, Any], float, dict[str, Any]]] = {
    "cross-entropy": ({"name": "cross_entropy"}, 1e-3, NORMED),
    "cross-entropy, smoothed": (
        {"name": "cross_entropy", "label_smoothing": 0.1},
        1e-3,
        NORMED,
    ),
    "hinge, Weston-Watkins": ({"name": "hinge"}, 1e-3, NORMED),
    "hinge, Crammer-Singer": (
        {"name": "hinge", "form": "crammer_singer"},
        1e-3,
        NORMED,
    ),
    "hinge, binary, one against the rest": (BINARY, 1e-3, NORMED),
    "l2 of softmax": ({"name": "l2"}, 1e-3, PLAIN),
    "l2 of logits": ({"name": "l2", "outputs": "logits"}, 1e-3, PLAIN),
    "smooth l1 of softmax": ({"name": "smooth_l1"}, 1e-3, PLAIN),
    "smooth l1 of logits": ({"name": "smooth_l1", "outputs": "logits"}, 1e-3, PLAIN),
    "huber of softmax": ({"name": "huber"}, 1e-3, PLAIN),
    "huber of logits": ({"name": "huber", "outputs": "logits"}, 1e-3, PLAIN),
    "l1 of softmax": ({"name": "l1"}, 3e-4, PLAIN),
    "l1 of logits": (
        {"name": "l1", "outputs": "logits"},
        1e-4,
        {**NORMED, "dropout": 0.0},
    ),
}
NETWORKS: dict[str, dict[str, Any]] = {
    "alexnet": PLAIN,
    "alexnet2012": {"name": "alexnet2012", "width": 0.25},
}


def converge() -> dict[str, Any]:
    """Top-1 on the held-out digits of the quickstart after 12 epochs at an eighth of the width.

    Each optimizer with cross-entropy, each loss and each network with Adam; seconds for all together.
    """
    began, found = time.monotonic(), dict[str, Any]()
    adam, runs = {"name": "adam"}, []
    for name, (rule, lr) in RULES.items():
        runs.append((f"optimizer {name}", {"optimizer": rule, "model": NORMED}, lr))
    for name, (loss, lr, network) in LOSSES.items():
        runs.append(
            (f"loss {name}", {"optimizer": adam, "loss": loss, "model": network}, lr)
        )
    for name, network in NETWORKS.items():
        runs.append((f"network {name}", {"optimizer": adam, "model": network}, 1e-3))
    with tempfile.TemporaryDirectory() as folder:
        for name, changes, lr in runs:
            tree = {
                "run": f"{folder}/{name}",
                "epochs": 12,
                "global_batch": 64,
                "virtual_workers": 4,
                "data": {
                    "train": f"{folder}/train",
                    "val": f"{folder}/val",
                    "pack": "digits",
                },
                "augment": {"crop": 64, "mirror": False, "colour": 0.0},
                "schedule": {"name": "polynomial", "lr": lr},
                "checkpoint": {"keep": 1},
                **changes,
            }
            summary = train(parse_config(tree, "bench"), World(CPU), _Quiet())
            assert summary.eval is not None
            found[name] = round(summary.eval.top1, 4)
            line = f"{name}: {found[name]:.2%} after {time.monotonic() - began:.0f} s"
            print(line, file=sys.stderr)  # noqa: T201
    found["at most 95 %"] = [name for name, top1 in found.items() if top1 <= 0.95]
    found["seconds"] = round(time.monotonic() - began)
    return found


class _Quiet:
    """A console for nobody."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


if __name__ == "__main__":
    parts = {part.__name__: part for part in (optimizer, reduction, lrn, converge)}
    parser = argparse.ArgumentParser()
    parser.add_argument("part", nargs="?", choices=parts, help="Default: all.")
    part = parser.parse_args().part
    for chosen in [part] if part else parts:
        print(json.dumps({chosen: parts[chosen]()}, indent=1))  # noqa: T201
