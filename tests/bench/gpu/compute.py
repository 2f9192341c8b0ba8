"""Measure the parts of a step, and micro-batches of many kinds: `compute.py compute SECONDS`."""

from common import DRY, Out, main
from device import bits, milliseconds, peak_memory, reset_peak_memory
from networks import Case, MicroBatch
from parts import parts

ALL = ("fp32", "tf32", "bf16")
REDUCED = ("tf32", "bf16")
CASES = [
    *(Case(precision=p) for p in ALL),
    *(Case(precision=p, batch=b) for b in (16, 1024) for p in ALL),
    *(
        Case(precision=p, layout="channels_last", batch=b)
        for b in (128, 1024)
        for p in REDUCED
    ),
    *(
        Case(precision=p, layout=layout, batch=b, mode="fast")
        for b in (128, 1024)
        for p, layout in (
            ("fp32", "nchw"),
            ("tf32", "nchw"),
            ("bf16", "nchw"),
            ("bf16", "channels_last"),
        )
    ),
    Case("alexnet2012 paper", "fp32"),
    Case("alexnet2012 paper", "bf16"),
    Case("alexnet2012 source", "bf16"),
    Case("alexnet_bn", "bf16"),
    Case("alexnet_bn lars", "bf16", batch=512),
    Case("alexnet", "bf16", "channels_last", 256),
]


def compute(out: Out) -> None:
    """Measure the parts of a step, then forward and backward of each case."""
    with out.guarded("parts of a step"):
        parts(out)
    for case in [Case(batch=2)] if DRY else CASES:
        if not out.has(3, case):
            return
        with out.guarded(" ".join(map(str, case))), case.numerics():
            measure(out, case)


def measure(out: Out, case: Case) -> None:
    """Measure forward and backward of one micro-batch."""
    reset_peak_memory()
    gradients = MicroBatch(case)
    found = milliseconds(gradients, 0.4)
    rate = round(1000 * case.batch / found["ms"])
    out(
        "micro-batch",
        **case._asdict(),
        **found,
        images_per_second=rate,
        MiB=peak_memory(),
    )
    if case.batch == 128 and case.mode == "exact" and case.layout == "nchw":
        out("bits", **case._asdict(), bits=bits(gradients()))


if __name__ == "__main__":
    main({"compute": compute})
