"""Every file survives or is named: refused batches are replayed, crashes traced to their file, fuzz does no harm."""

import gc
import json
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Fork
from fuzz import fuzz
from narrow import loader_sections
from photos import STATISTICS, encoded, kinds, lying, open_set, picture, write_set
from test_loader import by_id, deliver, requests, resident

from distrain.data import loader
from distrain.data.decoding import quarantine
from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.decoder import DecodeError
from distrain.data.decoding.image import (
    encode_ppm,
    sanitize_file,
)
from distrain.data.decoding.jpeg_header import parse_jpeg_size
from distrain.data.decoding.quarantine import (
    InFlightRecorder,
    claim_suspects,
    decode_one_by_one,
)
from distrain.data.loader import Loader
from distrain.errors import AttemptError, RunError

CPU = torch.device("cpu")
GOOD = [encoded(picture(i, 72 + i, 90)) for i in range(24)]


def broken_table(data: bytes) -> bytes:
    """A JPEG whose header the walk accepts and whose first Huffman table no decoder does."""
    damaged = bytearray(data)
    table = data.index(b"\xff\xc4") + 5
    damaged[table : table + 16] = b"\xff" * 16
    assert parse_jpeg_size(np.frombuffer(bytes(damaged), np.uint8)) is not None
    return bytes(damaged)


def cut_with_an_end(data: bytes) -> bytes:
    """The first half of a JPEG, with an end marker: only decoding it all tells."""
    return data[: len(data) // 2] + b"\xff\xd9"


BAD = {
    3: broken_table(GOOD[3]),
    4: GOOD[4][:-30],
    11: broken_table(GOOD[11]),
    17: b"junk",
    23: b"",
}
MIXED = [BAD.get(i, data) for i, data in enumerate(GOOD)]


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize(("batch", "ahead"), [(1, 2), (5, 1), (8, 3), (24, 2)])
def test_refused_files_are_placeholders_and_nothing_is_lost_or_reordered(
    tmp_path, narrow, batch, ahead, backend
):
    config = narrow(
        augment={"crop": 64, "short_side": 72},
        data={"backend": backend, "read_ahead": ahead},
    )
    good = by_id(
        deliver(
            config,
            write_set(tmp_path / "good", GOOD),
            requests(range(24), batch),
            batch,
        )
    )
    dataset = write_set(tmp_path / "mixed", MIXED)
    batches = deliver(config, dataset, requests(range(24), batch), batch)
    assert [b.cursor.step for b in batches] == list(range(-(-24 // batch)))
    found = by_id(batches)
    assert sorted(found) == list(range(24))
    reasons = {i: reason for b in batches for i, reason in b.bad_samples.items()}
    assert reasons.keys() == BAD.keys()
    for i, image in found.items():
        assert torch.equal(image, good[i]) if i not in BAD else not image.any()
    for b in batches:
        for i, sample in enumerate(b.sample_ids.tolist()):
            assert not b.sample_weights[i] or sample not in reasons
    assert dataset.bad_samples == reasons


def test_a_decoder_that_refuses_its_placeholder_too_ends_the_attempt(
    tmp_path, narrow, monkeypatch
):
    """Or it would be replaced for ever."""

    class Refusing(loader.DaliDecoder):
        def decode_batch(self):
            super().decode_batch()
            raise DecodeError(0, "never")

    monkeypatch.setattr(loader, "DaliDecoder", Refusing)
    with pytest.raises(AttemptError, match=r"the decoder failed \(never\)"):
        deliver(
            narrow(),
            write_set(tmp_path / "set", [GOOD[0]] * 8, (72, 90)),
            requests(range(8), 4),
            4,
        )


@pytest.fixture
def without_child(monkeypatch):
    """The loader judges files one by one in this process: a child of its own imports torch, for seconds."""

    def judge(files, device):
        return [quarantine._decode_alone(data, device) for data in files]

    monkeypatch.setattr(loader, "decode_one_by_one", judge)


@pytest.mark.parametrize("proved", [False, True])
@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.usefixtures("without_child")
def test_a_batch_that_fails_although_each_file_decodes_is_retried_once(
    tmp_path, narrow, monkeypatch, failures, proved
):
    dataset = write_set(tmp_path / "set", [GOOD[0]] * 12, (72, 90), proved=proved)
    undisturbed = by_id(deliver(narrow(), dataset, requests(range(12), 4), 4))
    num_batches = 0

    class Failing(loader.DaliDecoder):
        def decode_batch(self):
            nonlocal num_batches
            images = super().decode_batch()
            num_batches += 1
            if 2 <= num_batches < 2 + failures:
                raise DecodeError(None, "a hiccup")
            return images

    monkeypatch.setattr(loader, "DaliDecoder", Failing)
    if failures == 1:
        found = by_id(deliver(narrow(), dataset, requests(range(12), 4), 4))
        assert found.keys() == undisturbed.keys()
        assert all(torch.equal(found[i], undisturbed[i]) for i in found)
    else:
        message = r"failed \(a hiccup\) on samples \[4, 5, 6, 7\], although no single"
        with pytest.raises(AttemptError, match=message):
            deliver(narrow(), dataset, requests(range(12), 4), 4)
    assert dataset.bad_samples == {}


def test_a_batch_that_was_retried_is_not_kept(tmp_path, narrow, monkeypatch):
    """It would keep its row groups in memory until the loader is closed. Here a child judges the files."""
    dataset = write_set(tmp_path / "set", [GOOD[0]] * 12, (72, 90))
    num_batches = 0

    class Failing(loader.DaliDecoder):
        def decode_batch(self):
            nonlocal num_batches
            images = super().decode_batch()
            num_batches += 1
            if num_batches == 1:
                raise DecodeError(None, "a hiccup")
            return images

    monkeypatch.setattr(loader, "DaliDecoder", Failing)
    options = {"batch_size": 4, "device": CPU, "use_augmentation": True}
    with Loader(
        dataset,
        STATISTICS,
        requests(range(12), 4),
        **loader_sections(narrow()),
        **options,
    ) as opened:
        assert len(list(opened)) == 3
        assert opened.num_decoder_rebuilds == 1
        # Garbage of the decoder that failed.
        gc.collect()
        kept = [
            found for found in gc.get_objects() if type(found) is loader.PendingBatch
        ]
        assert [batch for batch in kept if batch.request.cursor.step == 0] == []


def test_a_batch_of_raw_pixels_blames_none_of_them(tmp_path, narrow, monkeypatch):
    """They are no files that a child could decode one by one."""

    class Failing(loader.DaliDecoder):
        def decode_batch(self):
            super().decode_batch()
            raise DecodeError(None, "a hiccup")

    monkeypatch.setattr(loader, "DaliDecoder", Failing)
    pixels = [encode_ppm(picture(i, 72, 72)).tobytes() for i in range(4)]
    dataset = write_set(tmp_path / "set", pixels, (72, 72), encoding="raw", proved=True)
    with pytest.raises(AttemptError, match="although no single file"):
        deliver(narrow(), dataset, requests(range(4), 4), 4)


@pytest.mark.parametrize("window", ["crop", "random_resized"])
def test_a_verdict_does_not_depend_on_the_window(tmp_path, narrow, window):
    """A cut file is bad although windows above the cut decode; one with an end marker is filled up with grey."""
    damaged = [
        GOOD[i][: -200 * (i % 3)] if i % 3 else cut_with_an_end(GOOD[i])
        for i in range(24)
    ]
    dataset = write_set(tmp_path / "set", damaged)
    verdicts = []
    for epoch in range(6):
        dataset.bad_samples.clear()
        config = narrow(augment={"crop": 64, "short_side": 72, "window": window})
        deliver(config, dataset, requests(range(24), 6, epoch), 6)
        verdicts.append(dict(dataset.bad_samples))
    assert all(set(v) == {i for i in range(24) if i % 3} for v in verdicts)


def test_a_verdict_costs_once(tmp_path, narrow):
    dataset, config = (
        write_set(tmp_path / "set", MIXED),
        narrow(augment={"crop": 64, "short_side": 72}),
    )
    rebuilds = []
    for epoch in range(3):
        options = {"batch_size": 6, "device": CPU, "use_augmentation": True}
        with Loader(
            dataset,
            STATISTICS,
            requests(range(24), 6, epoch),
            **loader_sections(config),
            **options,
        ) as loader:
            assert len(list(loader)) == 4
            rebuilds.append(loader.num_decoder_rebuilds)
    assert rebuilds == [2, 0, 0]


def test_a_proved_file_that_is_refused_stops_the_run_with_its_name(tmp_path, narrow):
    """To replace it would make the weights depend on what windows it was asked for before."""
    dataset = write_set(
        tmp_path / "set",
        [broken_table(GOOD[0]) if i == 5 else GOOD[0] for i in range(8)],
        (72, 90),
        proved=True,
    )
    with pytest.raises(
        RunError,
        match=r"decoded when they were packed or indexed, and no longer do: "
        r"5 \(shard-00000.parquet row group 0 row 5\): DALI",
    ):
        deliver(narrow(), dataset, requests(range(8), 4), 4)


def test_a_lying_header_is_refused_before_memory_is_taken(tmp_path, narrow):
    lies = [
        lying(GOOD[0], 20_000, 20_000),
        lying(GOOD[0], 65_500, 65_500),
        lying(GOOD[0], 7_000, 7_000),
    ]
    dataset = write_set(tmp_path / "set", [GOOD[0], *lies], (72, 90))
    before = resident()
    batches = deliver(
        narrow(data={"pixel_limit": 1_000_000}), dataset, requests(range(4), 4), 4
    )
    assert resident() - before < 64 << 20
    assert batches[0].sample_weights.tolist() == [1, 0, 0, 0]
    assert all(
        "over the limit of 1000000" in batches[0].bad_samples[i] for i in (1, 2, 3)
    )


def test_memory_does_not_grow_over_rebuilds(tmp_path, narrow):
    """DALI #4076: pipelines that were rebuilt after a bad picture grew without bound."""
    files = [broken_table(GOOD[0]) if i % 4 == 3 else GOOD[0] for i in range(64)]
    dataset, config = write_set(tmp_path / "set", files, (72, 90)), narrow()

    def rebuild(times):
        for _ in range(times // 16):
            dataset.bad_samples.clear()
            options = {"batch_size": 4, "device": CPU, "use_augmentation": True}
            with Loader(
                dataset,
                STATISTICS,
                requests(range(64), 4),
                **loader_sections(config),
                **options,
            ) as loader:
                assert len(list(loader)) == 16
                assert loader.num_decoder_rebuilds == 16

    rebuild(160)
    before = resident()
    rebuild(320)
    assert resident() - before < 24 << 20


def asked(run, dataset):
    with claim_suspects(run, dataset) as ids:
        return ids.tolist()


def test_what_is_in_flight_is_known_to_the_next_process(tmp_path, narrow):
    dataset, run = write_set(tmp_path / "set", GOOD), str(tmp_path / "run")
    recorder = InFlightRecorder(run, dataset, num_slots=3, batch_size=2)
    recorder.record_fed(np.array([1, 2]))
    recorder.record_fed(np.array([3, 4]))
    recorder.record_decoded()
    assert asked(run, dataset) == [], "its process lives"
    recorder._file.close()  # as the kernel does when a process dies
    with suppress(RuntimeError), claim_suspects(run, dataset) as ids:
        assert ids.tolist() == [3, 4]
        assert asked(run, dataset) == [], "another rank has them"
        raise RuntimeError("no verdict")
    assert asked(run, dataset) == [3, 4], "they are there until there is a verdict"
    assert asked(run, dataset) == []
    recorder = InFlightRecorder(run, dataset, num_slots=3, batch_size=2)
    recorder.record_fed(np.array([5, 6]))
    folder = recorder._path.parent
    recorder.close()
    assert not folder.exists()


def test_files_are_judged_alone(tmp_path):
    files = [
        np.frombuffer(f, np.uint8)
        for f in (GOOD[0], broken_table(GOOD[1]), kinds()["bmp"], GOOD[2])
    ]
    verdicts = decode_one_by_one(files, CPU)
    assert [v is None for v in verdicts] == [True, False, True, True]
    assert "DALI" in verdicts[1]


def stand_in(monkeypatch, tmp_path, script):
    """Puts a shell script in the place of the child."""
    child = tmp_path / "child"
    child.write_text("#!/bin/sh\n" + script)
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))


FILES = [np.frombuffer(GOOD[i], np.uint8) for i in (0, 1)]


def test_a_child_that_dies_of_its_first_file_gives_it_away(tmp_path, monkeypatch):
    """The next file gets a new child, which refuses it."""
    stand_in(
        monkeypatch,
        tmp_path,
        '[ -e "$0.died" ] && { echo \'"refused"\'; cat; exit; }; touch "$0.died"; kill -SEGV $$',
    )
    assert decode_one_by_one(FILES, CPU) == [
        "crashes the decoder (SIGSEGV)",
        "refused",
    ]


def test_a_later_file_is_blamed_only_by_a_child_of_its_own(tmp_path, monkeypatch):
    """The first file may have broken the memory that the second one dies of."""
    stand_in(
        monkeypatch,
        tmp_path,
        'echo null; [ -e "$0.died" ] && { cat; exit; }; touch "$0.died"; kill -SEGV $$',
    )
    assert decode_one_by_one(FILES, CPU) == [None, None]


@pytest.mark.parametrize("end", ["kill -KILL $$", "kill -INT $$", "exit 1", "exit 0"])
def test_a_child_that_ends_for_another_reason_is_no_verdict(tmp_path, monkeypatch, end):
    stand_in(monkeypatch, tmp_path, end)
    with pytest.raises(AttemptError, match="ended unexpectedly"):
        decode_one_by_one(FILES, CPU)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_missing_shard_is_no_refusal_whatever_its_folder_is_called(
    tmp_path, narrow, backend
):
    """Errors of the source pass through DALI, which words its own alike."""
    dataset = write_set(tmp_path / "nvidia-dali-nvimage" / "set", GOOD)
    next((tmp_path / "nvidia-dali-nvimage" / "set").glob("*.parquet")).unlink()
    config = narrow(augment={"crop": 64, "short_side": 72}, data={"backend": backend})
    with pytest.raises(AttemptError, match="is missing: restore it"):
        deliver(config, dataset, requests(range(24), 6), 6)
    assert dataset.bad_samples == {}


WALKED = """
import sys
import torch
from distrain.config import load_config
from distrain.monitor.sinks import PlainConsole
from distrain.trainer import train
from distrain.distributed.world import World

summary = train(load_config(sys.argv[1]), World(torch.device("cpu")), PlainConsole(sys.stdout))
print("weights", summary.weights)
"""
CRASHING = f"""
from distrain.data import batch_builder
from distrain.data.decoding.image import ImageFile
from distrain.training import quarantine_sync

def trusting(data, pixel_limit, reading):  # no walk in front of the decoder
    return ImageFile(data, 72, 72)

batch_builder.sanitize_file = trusting
quarantine_sync.sanitize_file = trusting
{WALKED}"""


@pytest.fixture
def script(tmp_path):
    """Runs a script that may not survive it, as a process of its own: (exit code, what it printed)."""
    started = []

    def run(text: str, *arguments: str) -> tuple[int, str]:
        out = tmp_path / f"script-{len(started)}.out"
        process = Fork("one_script", text, *arguments, out=out)
        started.append(process)
        code = process.wait(180)
        return code, process.out if code <= 0 else process.out + process.err

    yield run
    for process in started:
        process.end()


def test_a_file_that_kills_the_decoder_is_found_and_quarantined(
    tmp_path, narrow, script
):
    """For real: without the header walk, garbage at batch 64 is a segmentation fault inside DALI."""
    from distrain.config import to_yaml

    files = [encoded(picture(i % 8, 72, 72)) for i in range(256)]
    for i in (20, 130):
        files[i] = np.random.default_rng(i).bytes(3000)
    write_set(tmp_path / "set", files, (72, 72))
    config = narrow(
        run=str(tmp_path / "run"),
        epochs=2,
        global_batch=64,
        virtual_workers=1,
        data={"train": str(tmp_path / "set")},
    )
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))

    recipe = str(tmp_path / "recipe.yaml")
    code, again = script(CRASHING, recipe)
    num_runs = 1
    # Each crash gives away what was in flight.
    while code < 0 and num_runs < 8:
        code, again = script(CRASHING, recipe)
        num_runs += 1
        assert re.search(
            r"an earlier attempt crashed while it decoded \d+ files \(\d+: shard-00000.parquet row",
            again,
        )
    assert code == 0, again
    if (
        num_runs > 1
    ):  # DALI mostly dies of an error without a name, and sometimes survives it
        (quarantined,) = json.loads(
            (tmp_path / "run" / "quarantine.json").read_text()
        ).values()
        assert quarantined
        assert quarantined.keys() <= {"20", "130"}
    for i in (20, 130):
        assert f"bad sample {i} (shard-00000.parquet" in again
    # With the walk in front the same verdict costs no crash, and the same weights come out.
    (tmp_path / "recipe.yaml").write_text(
        to_yaml(config.model_copy(update={"run": str(tmp_path / "other")}))
    )
    code, walked = script(WALKED, recipe)
    assert code == 0, walked
    assert walked.splitlines()[-1] == again.splitlines()[-1]


def test_killed_while_decoding_good_files_blames_none(tmp_path, narrow, script):
    files = [encoded(picture(i % 8, 72, 72)) for i in range(128)]
    dataset = write_set(tmp_path / "set", files, (72, 72))
    config = narrow(run=str(tmp_path / "run"))
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import os, signal
import numpy as np
from photos import open_set
from distrain.config import load_config
from distrain.data.decoding.quarantine import InFlightRecorder
dataset = open_set({dataset.store.local_path!r})
recorder = InFlightRecorder(load_config(sys.argv[1]).run, dataset, num_slots=2, batch_size=4)
recorder.record_fed(np.array([7, 8, 9, 10]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    from distrain.config import to_yaml
    from distrain.distributed.world import World
    from distrain.training.quarantine_sync import sync_quarantine

    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    assert script(code, str(tmp_path / "recipe.yaml")) == (-signal.SIGKILL, "")
    told: list[str] = []
    sync_quarantine(
        config,
        World(CPU),
        [dataset],
        open_set(tmp_path / "set").store,
        told.append,
        told.append,
    )
    assert "4 files (7: shard-00000.parquet row group 0 row 7; 8: " in told[0]
    assert told[1:-1] == [f"verdict {n} of 4" for n in (1, 2, 3, 4)]
    assert "did not cause the crash" in told[-1]
    assert dataset.bad_samples == {}


def test_readable_agrees_with_the_decoder(tmp_path, narrow):
    """What the walk refuses goes to PIL; what PIL refuses too is bad, with a reason."""
    for name, data in kinds().items():
        found = sanitize_file(np.frombuffer(data, np.uint8), 10_000_000)
        assert found.height * found.width > 0, name
    with pytest.raises(
        BadImageError, match="a damaged GIF image, or a kind of GIF that"
    ):
        sanitize_file(np.frombuffer(b"GIF89a", np.uint8), 10)


@pytest.mark.parametrize("batch", [64, 256])
def test_fuzz(tmp_path, script, batch):
    """A slice of what `tests/bench/fuzz.py` does with 100,000 files; in a process of its own, which may not die."""
    path = str(Path(__file__).parents[1] / "fuzz.py")
    start = f"import runpy; runpy.run_path({path!r}, run_name='__main__')"
    code, out = script(start, str(tmp_path), "0", "1000", str(batch))
    assert code == 0, out[-6000:]
    told = json.loads(out.splitlines()[-1])
    assert told["mutated"] == 1000
    assert told["bad"] + told["decoded all the same"] == 1000
    assert min(told["bad"], told["decoded all the same"]) > 100
    assert fuzz.__doc__
