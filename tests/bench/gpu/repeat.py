"""Check that a micro-batch repeats its bits, 100 times after other shapes: `repeat.py repeat SECONDS`."""

from itertools import product

import torch
from common import DRY, Out, main
from device import DEVICE, bits
from networks import NETWORKS, Case, MicroBatch

from distrain.models.layers import micro_batch_context

TIMES, BATCH = (1, 2) if DRY else (100, 32)
LAYOUTS = ("nchw",) if DRY else ("nchw", "channels_last")
PRECISIONS = ("fp32", "bf16") if DRY else ("fp32", "tf32", "bf16")


def repeat(out: Out) -> None:
    """Repeat gradients under exact mode's numerics; the bits of the first are for other processes and days."""
    for network, precision, layout in product(NETWORKS, PRECISIONS, LAYOUTS):
        if DRY and precision == "bf16" and network != "alexnet":
            continue
        if layout == "channels_last" and network not in ("alexnet", "alexnet_bn"):
            continue
        case = Case(network, precision, layout, BATCH)
        if not out.has(4, case):
            continue
        with out.guarded(" ".join(map(str, case))), case.numerics():
            gradients = MicroBatch(case)
            first = gradients()
            unequal = 0
            for i in range(TIMES):
                with torch.no_grad(), micro_batch_context(0, 0, 1):
                    gradients.model(torch.zeros(2 + i % 7, 3, 224, 224, device=DEVICE))
                unequal += any(
                    not torch.equal(a, b)
                    for a, b in zip(first, gradients(), strict=True)
                )
            failure = {"error": "the bits do not repeat"} if unequal else {}
            out(
                "repeats",
                **case._asdict(),
                unequal=unequal,
                of=TIMES,
                bits=bits(first),
                **failure,
            )
            del gradients, first


if __name__ == "__main__":
    main({"repeat": repeat})
