import threading

import pytest

from distrain.data.loader import Loader
from distrain.errors import UserError
from distrain.training import bench_data
from distrain.training.bench_data import (
    BenchResult,
    Throughput,
    format_bench_result,
    make_bench_config,
    measure_loader,
)


@pytest.mark.parametrize("change", ["data.normalise=device", "data.backend=torch"])
def test_the_loader_beside_the_bare_decode(digits, change):
    wanted = make_bench_config(
        str(digits / "train"),
        [
            "augment.crop=64",
            "global_batch=64",
            "device=cpu",
            "data.decode_threads=2",
            change,
        ],
    )
    found = measure_loader(wanted, 128)
    assert (found.images_per_round, found.batch_size, found.num_threads) == (128, 64, 2)
    assert [rate.name for rate in found.throughputs] == [
        "loader",
        "libjpeg-turbo alone",
    ]
    assert all(
        rate.images_per_second > 0 and rate.cpu_ms_per_image > 0
        for rate in found.throughputs
    )


def test_what_is_decoded_ahead_is_not_counted(digits, monkeypatch):
    """It is taken before each round; and no loader runs beside the bare decode."""
    num_taken = 0
    take = Loader.__next__

    def count_taken(loader):
        nonlocal num_taken
        num_taken += 1
        return take(loader)

    running_beside = []
    taken_before = []
    pools = []

    def decode_bare():
        names = [thread.name for thread in threading.enumerate()]
        running_beside.append([name for name in names if name.startswith("distrain-")])
        return 1

    monkeypatch.setattr(Loader, "__next__", count_taken)

    def make_bare_decoders(config, device, pool):
        taken_before.append(num_taken)
        pools.append(pool)
        return {"bare": decode_bare}

    monkeypatch.setattr(bench_data, "_make_bare_decoders", make_bare_decoders)
    overrides = ["augment.crop=64", "global_batch=4", "device=cpu"]
    overrides += ["data.backend=torch", "data.read_ahead=3"]
    measure_loader(make_bench_config(str(digits / "train"), overrides), 8)
    # The first batch, then five rounds of two.
    assert num_taken == 1 + 5 * (3 + 2 + 2)
    assert running_beside == [[]] * 5
    # The first batch is timed before the files of the bare decode are read.
    assert taken_before == [1]
    with pytest.raises(RuntimeError, match="after shutdown"):
        pools[0].submit(print)


def test_lines_name_their_units_in_80_columns():
    rates = [
        Throughput("loader", 98_765.4, 123.456),
        Throughput("libjpeg-turbo alone", 98_765.4, 12.345),
    ]
    lines = list(format_bench_result(BenchResult(2048, 128, 16, rates, 12.5)))
    assert "123.456 CPU-ms per image, 10.00 x bare" in lines[1]
    assert max(map(len, lines)) <= 80


def test_what_does_not_fit_is_said(digits):
    with pytest.raises(UserError, match="augment.crop = 224 does not fit the 72 x 72"):
        measure_loader(make_bench_config(str(digits / "train"), []), 128)
    with pytest.raises(UserError, match="images 0 is not valid: use at least 1"):
        bench_data.bench_data(str(digits / "train"), images=0)
    with pytest.raises(
        UserError, match="unknown key augment.colr; did you mean augment.colour"
    ):
        make_bench_config("x", ["augment.colr=1"])
    with pytest.raises(
        UserError,
        match="bench data does not use optimizer, only data, augment, global_batch, "
        "device: remove it",
    ):
        make_bench_config("x", ["optimizer.name=adam"])
