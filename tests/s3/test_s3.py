"""Data and run directory in a real S3: the same weights as from the disk, or one sentence, whatever storage does."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import shapes
from stores import behaves_as_a_folder

import distrain
from distrain.data.prepare import pack as pack_module
from distrain.data.prepare.index import index_dataset
from distrain.data.prepare.open import open_source
from distrain.data.prepare.pack import pack_dataset
from distrain.data.prepare.pack_options import Geometry, PackOptions
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import AttemptError, UserError
from distrain.rundir.lease import acquire_lease
from distrain.trainer import train

pytestmark = pytest.mark.s3
CPU = torch.device("cpu")
S3_TRAIN = {"train": "s3://data/train", "memory": "100kB", "patience": 30.0}


@pytest.fixture(scope="session")
def known():
    return {}


@pytest.fixture
def weights(narrow, tmp_path, known):
    """The weights of the run on local files."""
    if not known:
        from distrain.monitor.sinks import SilentConsole

        known["weights"] = train(
            narrow(run=str(tmp_path / "local")), World(CPU), SilentConsole()
        ).weights
    return known["weights"]


def run(narrow, console, **data):
    return train(narrow(data={**S3_TRAIN, **data}), World(CPU), console)


def test_a_store_in_a_bucket_behaves_as_a_folder(s3):
    behaves_as_a_folder(Store(f"s3://data/{uuid.uuid4().hex}/deep"))


def test_of_several_creators_one_succeeds(s3):
    store, won = Store(f"s3://data/{uuid.uuid4().hex}"), []

    def create(i):
        try:
            store.create_exclusive("lease", b"%d" % i)
            won.append(i)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("lease") == b"%d" % won[0]


def test_data_and_run_directory_in_a_bucket(s3, narrow, console, weights):
    config = narrow(
        run=f"s3://data/runs/{uuid.uuid4().hex}",
        data=S3_TRAIN,
        checkpoint={"every": 10},
    )
    world = World(CPU)
    console.set_step = lambda step: world.stop_requested.set() if step == 12 else None
    assert train(config, world, console).status == "stopped"
    del console.set_step
    summary = train(config, World(CPU), console)
    assert summary.status == "finished"
    assert summary.weights == weights
    store = Store(config.run)
    assert "metrics-001.jsonl" in store.list_names()
    with acquire_lease(store, "another", print) as lease:
        assert lease.attempt == 3


def test_a_model_is_exported_to_a_bucket_and_used_there(s3, trained, tmp_path):
    """By way of connections that break; a second export replaces the first."""
    url = f"s3://data/models/{uuid.uuid4().hex}"
    for form in ("torch-export", "safetensors"):
        s3.faults.extend([("reset", 5000)] * 2)
        result = distrain.export(
            trained.run, form, to=tmp_path / form, data="s3://data/val", upload=url
        )
        assert (result.proof.passed, result.uploaded) == (True, url)
    assert Store(url).list_names() == Store(str(tmp_path / form)).list_names()
    found = distrain.evaluate(url, "s3://data/val")
    assert found.result == distrain.evaluate(trained.run).result


@pytest.mark.parametrize("kind", ["reset", "end", "flip", "503", "stall"])
def test_answers_that_break(s3, narrow, console, weights, kind):
    """In the middle of bodies, and more often in a row than the client itself puts up with; a flip is seen by us."""
    times = 3 if kind == "flip" else 6
    s3.faults.extend([(kind, 5000)] * times)
    assert run(narrow, console).weights == weights
    assert s3.applied == [kind] * times


def test_a_throttled_link(s3, narrow, console, weights):
    s3.bytes_a_second = 10e6
    assert run(narrow, console).weights == weights


def test_the_server_is_killed_and_comes_back(s3, ceph, narrow, console, weights):
    gone = threading.Event()

    def restart():
        gone.wait(60)
        ceph.kill_gateway()
        time.sleep(3)
        ceph.start_gateway()

    thread = threading.Thread(target=restart)
    thread.start()
    console.set_step = lambda step: gone.set() if step == 5 else None
    assert run(narrow, console).weights == weights
    thread.join()


def test_a_store_that_stays_away_ends_the_attempt(s3, narrow, console):
    config = narrow(data={**S3_TRAIN, "patience": 2.0})

    def advance(step):
        if step == 3:
            s3.faults.extend([("503", 0)] * 1000)

    console.set_step = advance
    with pytest.raises(
        AttemptError,
        match=r"s3://data/train/shard-00000.parquet cannot be read .* retried for 2 s",
    ):
        train(config, World(CPU), console)


def test_what_is_not_transient_is_said_at_once(
    s3, narrow, console, monkeypatch, bucket, tmp_path
):
    store = Store("s3://data/train")
    for name in store.list_names():
        Store("s3://data/broken").write(name, store.read(name))
    bucket.delete_object(Bucket="data", Key="broken/shard-00000.parquet")
    with pytest.raises(
        AttemptError, match=r"s3://data/broken/shard-00000.parquet is missing"
    ):
        run(narrow, console, train="s3://data/broken")
    Store("s3://data/broken").write("shard-00000.parquet", bytes(100))
    with pytest.raises(
        AttemptError,
        match="has 100 bytes, but had [0-9]+ when its manifest was written",
    ):
        run(narrow, console, train="s3://data/broken", patience=0.0)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(
        UserError,
        match=r"the store denies access to s3://data/train/manifest.*AWS_ACCESS_KEY_ID",
    ) as refused:
        run(narrow, console)
    assert "wrong" not in str(refused.value)


def test_no_credentials_are_named(s3, monkeypatch, tmp_path):
    """The chain's last resort is a server that only machines of a cloud have, and that may fail for now."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        AttemptError,
        match=r"no credentials for s3://data, which come from .*AWS_ACCESS_KEY_ID",
    ):
        Dataset.open("s3://data/train", retry_seconds=0)


# --- the cache on disk


def test_later_epochs_come_from_the_cache(s3, narrow, console, tmp_path):
    cache = {"cache": str(tmp_path / "cache")}
    whole = train(
        narrow(epochs=3, run=str(tmp_path / "a")), World(CPU), console
    ).weights
    config = narrow(epochs=3, run=str(tmp_path / "b"), data={**S3_TRAIN, **cache})
    assert train(config, World(CPU), console).weights == whole
    kept = sum(f.stat().st_size for f in (tmp_path / "cache").iterdir())
    s3.faults.extend([("503", 0)] * 10_000)  # no shard can be read any more
    again = narrow(epochs=3, run=str(tmp_path / "c"), data={**S3_TRAIN, **cache})
    assert train(again, World(CPU), console).weights == whole
    assert s3.applied == []
    assert kept > 500_000


def test_a_flipped_byte_on_the_cache_disk(s3, narrow, console, tmp_path, weights):
    cache = tmp_path / "cache"
    assert run(narrow, console, cache=str(cache)).weights == weights
    for file in cache.glob("*.range"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    config = narrow(run=str(tmp_path / "again"), data={**S3_TRAIN, "cache": str(cache)})
    assert train(config, World(CPU), console).weights == weights


def test_a_full_cache_disk(s3, narrow, console, tmp_path, weights):
    cache = tmp_path / "cache"
    cache.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(cache)], check=True
    )
    try:
        assert run(narrow, console, cache=str(cache)).weights == weights
        assert not list(cache.glob("*.partial"))
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_the_cache_is_deleted_under_a_running_job(
    s3, narrow, console, tmp_path, weights
):
    cache = tmp_path / "cache"
    console.set_step = lambda step: (
        shutil.rmtree(cache, ignore_errors=True) if step % 5 == 0 else None
    )
    assert run(narrow, console, cache=str(cache)).weights == weights


def test_two_processes_on_one_small_cache(
    s3, narrow, tmp_path, weights, plain_environment
):
    """They evict each other's entries all the time; one of them is killed in the middle and starts again."""
    from distrain.config import to_yaml

    cache = {"cache": str(tmp_path / "cache"), "cache_bytes": "300kB"}
    environment = {
        **plain_environment,
        **{k: v for k, v in os.environ.items() if k.startswith("AWS_")},
    }

    def start(name):
        config = narrow(run=str(tmp_path / name), data={**S3_TRAIN, **cache})
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
        command = [
            sys.executable,
            "-m",
            "distrain",
            "train",
            str(tmp_path / f"{name}.yaml"),
            "log.every=1",
        ]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        )

    one, two, killed = start("one"), start("two"), start("killed")
    assert killed.stdout is not None
    next(line for line in killed.stdout if "step" in line)
    killed.kill()
    killed.communicate()
    outputs = [process.communicate()[0] for process in (one, two, start("killed"))]
    assert all(weights[:16] in out for out in outputs), outputs
    left = list(Path(tmp_path / "cache").glob("*"))
    assert sum(f.stat().st_size for f in left) < 1_000_000, (
        "the limit, and what three processes may add before they look"
    )


def test_log_and_metrics_of_a_job_stay_in_its_bucket(
    s3, narrow, tmp_path, weights, plain_environment
):
    """What is left when the cluster is gone."""
    from distrain.config import to_yaml

    run = f"s3://data/{uuid.uuid4().hex}"
    (tmp_path / "job.yaml").write_text(to_yaml(narrow(run=run, data=S3_TRAIN)))
    environment = {
        **plain_environment,
        **{k: v for k, v in os.environ.items() if k.startswith("AWS_")},
    }
    command = [
        sys.executable,
        "-m",
        "distrain",
        "train",
        str(tmp_path / "job.yaml"),
        "log.every=1",
    ]
    said = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**environment, "DISTRAIN_CONSOLE": "json"},
        check=True,
    ).stdout
    store = Store(run)
    (log,) = [name for name in store.list_names() if name.startswith("log-")]
    lines = store.read(log).decode().splitlines()  # each after its time
    assert any(f" weights   {weights[:16]}" in line for line in lines)
    assert (
        sum(" images/s " in line for line in lines)
        == sum('"train"' in line for line in said.splitlines())
        > 0
    )
    (metrics,) = [name for name in store.list_names() if "metrics" in name]
    assert store.read(metrics).count(b'"train"') == sum(
        '"train"' in line for line in said.splitlines()
    )


# --- packing and indexing


@pytest.fixture
def sources(tmp_path, s3):
    """The same images as a folder and as hub Parquet, on the disk and in the bucket."""
    place = f"s3://data/{uuid.uuid4().hex}"
    found = shapes.images(40)
    urls = {}
    for shape in ("folder", "archive of archives", "hub"):
        local = Path(shapes.SHAPES[shape](tmp_path, found))
        for file in (
            [local]
            if local.is_file()
            else sorted(p for p in local.rglob("*") if p.is_file())
        ):
            Store(place).write(str(file.relative_to(tmp_path)), file.read_bytes())
        urls[shape] = (str(local), f"{place}/{local.name}")
    return urls


def contents_of(url):
    store = Store(url)
    return {name: store.read(name) for name in store.list_names()}


@pytest.mark.parametrize("shape", ["folder", "archive of archives", "hub"])
def test_a_pack_between_buckets_through_faults(
    s3, sources, tmp_path, monkeypatch, shape
):
    monkeypatch.setattr(pack_module, "_TARGET_SHARD_BYTES", 40_000)
    local, remote = sources[shape]
    treatment = PackOptions(Geometry("square", 48))
    pack_dataset(open_source(local).source, str(tmp_path / "packed"), treatment)
    target = f"s3://data/{uuid.uuid4().hex}"
    # The folder's files are no shards: what the proxy breaks are answers to GETs with .parquet in their line.
    s3.faults.extend(
        [("503", 0), ("reset", 3000), ("end", 3000), ("stall", 3000)] * 2
        if shape == "hub"
        else []
    )
    packed = pack_dataset(
        open_source(remote).source, target, treatment, num_processes=2
    )
    assert len(packed.manifest.shards) > 2
    assert contents_of(target) == contents_of(str(tmp_path / "packed"))
    assert not s3.faults
    again = pack_dataset(open_source(remote).source, target, treatment)
    assert again.was_complete
    other = PackOptions(Geometry("square", 47))
    with pytest.raises(UserError, match="holds a data set already"):
        pack_dataset(open_source(remote).source, target, other)


def test_a_pack_into_a_bucket_goes_on_after_a_kill(
    s3, sources, tmp_path, plain_environment
):
    local, remote = sources["folder"]
    code = (
        "import os, signal, sys\nimport distrain.data.prepare.pack as p\n"
        "from distrain.data.prepare.open import open_source\n"
        "from distrain.data.prepare.pack_options import Geometry, PackOptions\n"
        "if __name__ == '__main__':\n    p._TARGET_SHARD_BYTES = 40_000\n    at = int(sys.argv[3])\n"
        "    kill = lambda now: now.done >= at and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    options = PackOptions(Geometry('square', 48))\n"
        "    source = open_source(sys.argv[1]).source\n"
        "    p.pack_dataset(source, sys.argv[2], options, num_processes=2, on_progress=kill)\n"
    )
    (tmp_path / "pack.py").write_text(code)
    environment = {
        **plain_environment,
        **{k: v for k, v in os.environ.items() if k.startswith("AWS_")},
    }

    def run(source, target, at):
        command = [sys.executable, str(tmp_path / "pack.py"), source, target, str(at)]
        return subprocess.run(command, env=environment, check=False).returncode

    target = f"s3://data/{uuid.uuid4().hex}"
    assert run(local, str(tmp_path / "whole"), 10**9) == 0
    assert run(remote, target, 90) == -signal.SIGKILL
    store = Store(target)
    notes = store.list_names(".pack")
    assert "plan.json" in notes
    assert not store.exists("manifest.json")
    assert run(remote, target, 10**9) == 0
    assert contents_of(target) == contents_of(str(tmp_path / "whole"))


def test_foreign_objects_are_indexed_and_a_replaced_one_is_said(s3, sources, bucket):
    """Of the same size, with one byte changed: the ETag says what the size does not."""
    _, remote = sources["hub"]
    s3.faults.extend([("reset", 3000), ("503", 0), ("end", 3000)])
    indexed = index_dataset(*open_source(remote), num_processes=2)
    assert indexed.manifest.num_rows == 120
    assert not s3.faults
    assert all(shard.version for shard in indexed.manifest.shards)
    store = Store(remote)
    dataset = Dataset(
        store, Manifest.load(store), memory_bytes=1 << 24, retry_seconds=5.0
    )
    assert len(dataset.read_rows(np.arange(120))) == 120
    path = indexed.manifest.shards[0].path
    data = bytearray(store.read(path))
    data[2000] ^= 1
    store.write(path, bytes(data))
    fresh = Dataset(
        store, Manifest.load(store), memory_bytes=1 << 24, retry_seconds=5.0
    )
    with pytest.raises(
        AttemptError,
        match=f"{path} has ETag .* when its manifest was written: it was replaced",
    ):
        fresh.read_rows(np.arange(3))


def test_indexed_objects_train_through_faults(s3, sources, narrow, console, tmp_path):
    local, remote = sources["hub"]
    index_dataset(*open_source(local), str(tmp_path / "here"))
    index_dataset(*open_source(remote), str(tmp_path / "there"))
    shape = {"epochs": 2, "augment": {"crop": 64, "short_side": 72}}
    options = {"memory": "100kB", "patience": 30.0}
    here = narrow(
        **shape,
        run=str(tmp_path / "a"),
        data={"train": str(tmp_path / "here"), **options},
    )
    there = narrow(
        **shape,
        run=str(tmp_path / "b"),
        data={"train": str(tmp_path / "there"), **options},
    )
    weights = train(here, World(CPU), console).weights
    s3.faults.extend(
        [("reset", 3000), ("503", 0), ("flip", 3000), ("end", 3000), ("stall", 3000)]
    )
    assert train(there, World(CPU), console).weights == weights
    assert not s3.faults


def test_a_source_that_may_not_be_read_is_said_at_once(s3, sources, monkeypatch):
    _, remote = sources["hub"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(
        PermissionError,
        match="the store denies access to s3://data/.*AWS_ACCESS_KEY_ID",
    ) as refused:
        open_source(remote)
    assert "wrong" not in str(refused.value)
