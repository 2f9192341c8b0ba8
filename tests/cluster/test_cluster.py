"""A run on a cluster that cannot go on."""

import re
import shutil

import pytest

pytestmark = pytest.mark.cluster


def test_a_run_that_makes_no_progress_ends_with_the_first_cause(
    start, digits, tmp_path
):
    shutil.copytree(digits / "train", tmp_path / "damaged")
    shard = next((tmp_path / "damaged").glob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    text = start(
        "--workers=1", f"data.train={tmp_path}/damaged", "cluster.max_failures=2"
    ).end(1)
    assert text.count("worker group formed") == 3
    assert (
        "error: 2 attempts in a row failed after step 0 without a new checkpoint"
        in text
    )
    assert re.search(
        r"the first failure was: lost rank \d on [\d.]+: .*parquet is damaged: bytes",
        text,
    )
    assert "Traceback" not in text
