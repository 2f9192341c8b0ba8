"""The list of what is left out, and how it is grouped for a terminal."""

import json

from distrain.data.prepare.rejects import (
    REJECTS_FILE,
    RejectGroup,
    count_images,
    group_rejects,
    read_rejects,
    write_rejects,
)
from distrain.data.prepare.source import Reject
from distrain.data.storage.store import Store


def test_rejects_of_one_reason_are_one_group_and_the_largest_comes_first():
    broken = [Reject(f"a/{i}.jpg", "a broken link") for i in range(4)]
    rejects = [Reject("b.jpg", "no bytes"), *broken, Reject("c.jpg", "no bytes")]
    assert group_rejects(rejects) == [
        RejectGroup(4, "a broken link", ["a/0.jpg", "a/1.jpg", "a/2.jpg"], False),
        RejectGroup(2, "no bytes", ["b.jpg", "c.jpg"], True),
    ]


def test_reasons_that_differ_in_their_numbers_are_one_group():
    """What is the same in all of them stays."""
    reason = "{:,} x {} pixels are over the limit of 50000000"
    rejects = [Reject(f"{i}.png", reason.format(70_000 + i, 9)) for i in range(3)]
    (group,) = group_rejects(rejects)
    assert group.reason == "... x 9 pixels are over the limit of 50000000"
    (group,) = group_rejects(rejects[:1])
    assert group.reason == "70,000 x 9 pixels are over the limit of 50000000"
    files = [Reject("a", f"cannot read <File at 0x7f{i}c>") for i in range(2)]
    (group,) = group_rejects(files)
    assert group.reason == "cannot read <File at ...>"


def test_a_reject_of_many_images_counts_them(tmp_path):
    rejects = [
        Reject("x.parquet row group 3", "damaged", 100),
        Reject("a.jpg", "no bytes"),
        Reject("b.jpg", "no bytes"),
    ]
    assert count_images(rejects) == 102
    assert [group.num_images for group in group_rejects(rejects[::-1])] == [100, 2]
    store = Store(str(tmp_path))
    write_rejects(store, rejects)
    assert read_rejects(store) == rejects
    lines = (tmp_path / REJECTS_FILE).read_text().splitlines()
    assert json.loads(lines[0])["num_images"] == 100
    assert json.loads(lines[1]) == {"path": "a.jpg", "reason": "no bytes"}
    write_rejects(store, [])
    assert read_rejects(store) == []
