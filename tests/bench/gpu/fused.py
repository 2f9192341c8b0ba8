"""Measure fused kernels, and a micro-batch as a CUDA graph: `fused.py fused SECONDS`."""

import os

import torch
from common import DRY, Out, main
from device import DEVICE, milliseconds
from networks import Case, MicroBatch, make_accumulator

if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the prototypes are defined
import prototypes

PARAMETERS = 61_100_840
"""Of alexnet."""
GRAPHS = (
    Case(precision="fp32", batch=16),
    Case(precision="bf16", batch=16),
    Case(precision="bf16", batch=128),
    Case(precision="bf16", layout="channels_last", batch=128),
    Case(precision="bf16", layout="channels_last", batch=1024),
)


def fused(out: Out) -> None:
    """Check the prototypes, then measure them, then graphs."""
    with out.guarded("are the prototypes right"):
        found = prototypes.check(DEVICE)
        is_right = all(value for name, value in found.items() if name.endswith("exact"))
        is_right = is_right and found["add counts violations"] == 2
        out(
            "prototypes",
            **found,
            **(
                {}
                if is_right
                else {"error": "other bits than distrain's own functions"}
            ),
        )
    if DRY:
        return
    with out.guarded("sums"):
        sums(out)
    with out.guarded("layers"):
        layers(out)
    for case in GRAPHS:
        if not out.has(4, case):
            return
        with out.guarded(f"graph {' '.join(map(str, case))}"), case.numerics():
            graph(out, case)


def sums(out: Out) -> None:
    """Measure what is done to each element of a gradient."""
    n = PARAMETERS
    g = torch.randn(n, device="cuda") * 2.0**30
    total = torch.zeros(n, dtype=torch.int64, device="cuda")
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    valid = torch.tensor([1000], device="cuda")
    scale = torch.tensor([2.0**38], dtype=torch.float64, device="cuda")
    gradient = torch.empty(n, device="cuda")
    for name, work, moved in (
        (
            "add, first of a step",
            lambda: prototypes.add(g, total, flag, 2.0**60, True),
            12 * n,
        ),
        ("add", lambda: prototypes.add(g, total, flag, 2.0**60, False), 20 * n),
        ("finish", lambda: prototypes.finish(total, gradient, valid, scale), 12 * n),
    ):
        found = milliseconds(work, 0.2)
        out(
            "prototype",
            part=name,
            **found,
            TB_per_s=round(moved / found["ms"] / 1e9, 2),
        )


def layers(out: Out) -> None:
    """Measure forwards of our own layers."""
    keys = torch.tensor([1, 2], dtype=torch.int32, device="cuda")
    for width in (9216, 4096):
        x = torch.randn(128, width, device="cuda")
        found = milliseconds(lambda x=x: prototypes.dropout(x, keys, 0.5), 0.1)
        out("prototype", part=f"dropout forward 128 x {width}", **found)
    for shape in ((256, 48, 3025), (256, 128, 729)):
        x = torch.randn(*shape, device="cuda")
        found = milliseconds(lambda x=x: prototypes.lrn(x), 0.1)
        out("prototype", part=f"response normalisation forward {shape}", **found)


def graph(out: Out, case: Case) -> None:
    """Measure forward, backward and exact addition of a micro-batch, launched kernel by kernel and as one graph."""
    gradients = MicroBatch(case)
    accumulator = make_accumulator(gradients.parameters, "exact", case.batch)
    loss = torch.zeros((), device="cuda")
    ones = torch.tensor(float(case.batch), device="cuda")

    def whole() -> None:
        accumulator.add_micro_batch(gradients(), loss, ones, ones, ones)

    accumulator.begin_step()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            whole()
    torch.cuda.synchronize()
    eager = milliseconds(whole, 0.3)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        whole()
    replayed = milliseconds(made.replay, 0.3)
    rates = {
        "images_per_second_eager": round(
            1000 * case.batch / max(eager["ms"], eager["host ms"])
        ),
        "images_per_second_graph": round(1000 * case.batch / replayed["ms"]),
    }
    out("graph", **case._asdict(), eager=eager, graph=replayed, **rates)


if __name__ == "__main__":
    main({"fused": fused})
