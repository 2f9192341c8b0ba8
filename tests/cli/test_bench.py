import pytest

from distrain.cli.bench import make_bench_config, measure_loader
from distrain.errors import UserError


@pytest.mark.parametrize("change", ["data.normalise=device", "data.backend=torch"])
def test_the_loader_beside_the_bare_decode(digits, change):
    wanted = make_bench_config(
        str(digits / "train"),
        ["augment.crop=64", "global_batch=64", "device=cpu", change],
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


def test_what_does_not_fit_is_said(digits):
    with pytest.raises(UserError, match="augment.crop = 224 does not fit the 72 x 72"):
        measure_loader(make_bench_config(str(digits / "train"), []), 128)
    with pytest.raises(
        UserError, match="unknown key augment.colr; did you mean augment.colour"
    ):
        make_bench_config("x", ["augment.colr=1"])
    with pytest.raises(
        UserError, match="unknown key optimizer"
    ):  # of a run, not of its data
        make_bench_config("x", ["optimizer.name=adam"])
