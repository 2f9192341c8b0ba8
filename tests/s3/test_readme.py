"""What the READMEs show for buckets, on a real one."""

import json

import pytest
from photos import write_photos
from readme_commands import SMALL, shown, write_recipe

from distrain.data.storage.store import Store

pytestmark = pytest.mark.s3


@pytest.fixture
def run(distrain, tmp_path, monkeypatch):
    """Run a command of distrain's, given as words; return what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(words: list[str], *overrides: str) -> str:
        code, out, err = distrain(*words[1:], *overrides)
        assert (code, err) == (0, "")
        return out

    return call


def test_objects_are_indexed_and_a_run_in_a_bucket_is_watched_and_resumed(
    s3, run, tmp_path
):
    # A data set as on the hub: Parquet without a manifest.
    write_photos(tmp_path)
    run(shown("distrain pack photos/train shards/train"))
    for path in (tmp_path / "shards/train").glob("*.parquet"):
        store = Store("s3://data/imagenet-1k/data")
        store.write(f"train-{path.name}", path.read_bytes())
    bucket = {"s3://bucket/": "s3://data/"}
    run(
        shown(
            "distrain index 's3://bucket/imagenet-1k/data/train-*'"
            " --to s3://bucket/index/train",
            bucket,
        )
    )
    manifest = json.loads(Store("s3://data/index/train").read("manifest.json"))
    assert manifest["shards"]

    write_recipe(tmp_path)
    here = (
        "run=s3://data/runs/my",
        "data.train=s3://data/index/train",
        "data.val=null",
        "augment.short_side=256",
    )
    run(shown("distrain train my.yaml"), *SMALL, *here)
    watched = run(shown("distrain top s3://bucket/runs/my", bucket))
    assert "s3://data/runs/my  step 1\n" in watched
    sent = run(shown("distrain resume s3://bucket/runs/my -f", bucket), "--dry-run")
    assert "--resume" in sent
