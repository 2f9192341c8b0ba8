"""Networks, their gradients for a micro-batch, and accumulators of them, on random data."""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from device import DEVICE
from torch import Tensor, nn

from distrain.distributed.numerics import set_torch_numerics
from distrain.losses import CrossEntropy
from distrain.models.alexnet import AlexNet, AlexNet2012, AlexNetBN
from distrain.models.layers import micro_batch_context
from distrain.optim.accumulate import GradientAccumulator

CLASSES = 1000
NETWORKS: dict[str, AlexNet | AlexNet2012 | AlexNetBN] = {
    "alexnet": AlexNet(),
    "alexnet2012 source": AlexNet2012(),
    "alexnet2012 paper": AlexNet2012(layers="paper"),
    "alexnet_bn": AlexNetBN(),
    "alexnet_bn lars": AlexNetBN(place="after_pool", affine=False),
}


class Case(NamedTuple):
    """How a micro-batch is computed."""

    network: str = "alexnet"
    precision: str = "fp32"
    layout: str = "nchw"
    """nchw or channels_last."""
    batch: int = 128
    mode: str = "exact"
    """exact or fast: with fast sums cuDNN tries kernels out and need not be deterministic, as in a plain torch loop."""

    def numerics(self) -> AbstractContextManager[None]:
        """Set torch's global numerics to its precision and its mode, inside."""
        return set_torch_numerics(
            DEVICE, precision=self.precision, exact=self.mode == "exact"
        )


class MicroBatch:
    """A network and images of 224 pixels; a call computes the gradients of all parameters."""

    def __init__(self, case: Case) -> None:
        """Call it, and use it, under `numerics` of the case."""
        self._is_bf16 = case.precision == "bf16"
        generator = torch.Generator().manual_seed(0)
        self.model = NETWORKS[case.network].build(CLASSES, seed=0).to(DEVICE)
        self._images = torch.randn(case.batch, 3, 224, 224, generator=generator).to(
            DEVICE
        )
        self._labels = torch.arange(case.batch, device=DEVICE) % CLASSES
        if case.layout == "channels_last":
            self.model = self.model.to(memory_format=torch.channels_last)
            self._images = self._images.to(memory_format=torch.channels_last)
        self.parameters = list(self.model.parameters())

    def __call__(self, worker: int = 0) -> list[Tensor]:
        with (
            micro_batch_context(0, 0, worker),
            torch.autocast(DEVICE.type, torch.bfloat16, enabled=self._is_bf16),
        ):
            logits = self.model(self._images)
        loss = CrossEntropy()(logits.float(), self._labels).sum()
        return list(torch.autograd.grad(loss * 2.0**40, self.parameters))


def make_accumulator(
    parameters: list[nn.Parameter], mode: str, batch: int = 128, workers: int = 8
) -> GradientAccumulator:
    """Make the accumulator of a step of so many virtual workers."""
    bits = 48 if mode == "exact" else None
    return GradientAccumulator(
        parameters,
        num_virtual_workers=workers,
        micro_batch_size=batch,
        fraction_bits=bits,
    )
