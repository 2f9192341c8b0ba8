"""Splits as names of files and folders tell them."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.data.prepare.splits import (
    find_split,
    find_split_folders,
    group_by_split,
    is_split_folder,
    suggest_pattern,
)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("train.parquet", "train"), ("imagenet-train-000000.tar", "train"), ("TRAINING_003.TAR", "train"),
        ("val_3.tar", "val"), ("val3.tar", "val"), ("x.valid.parquet", "val"), ("dev-0.tar", "val"),
        ("validation-00000-of-00005.parquet", "val"), ("2012_test.parquet", "test"), ("test2017.tar", "test"),
        ("ILSVRC2012_img_val.tar", "val"), ("imagenetVal.tar", "val"), ("eval.tar", "eval"), ("trainA.tar", "train"),
        ("part-0-holdout.snappy.parquet", "holdout"), ("testing (1).tar", "test"), ("trainval.tar", "trainval"),
        ("extra-00000-of-00002.parquet", "extra"), ("in22k_00001-of-00003.tar", "in22k"),
        ("traintrack.parquet", None), ("contest.tar", None), ("devices-0.tar", None), ("000.tar", None),
        ("x.test", None), ("00000-of-00002.parquet", None), ("latest-0.tar", None), ("interval_2.tar", None),
        ("part-00000-3f2a-c000.snappy.parquet", None), ("data-00000-of-00002-dev1.parquet", "data"),
    ],
)  # fmt: skip
def test_the_split_of_a_name(name, key):
    split = find_split(name)
    assert (split.key if split else None) == (None if key is None else (key,))


def test_the_words_of_a_name_count_together():
    """A data set may itself be called test."""
    assert list(group_by_split(["test-train-0.tar", "test-train-1.tar"])) == [
        "test-train"
    ]
    found = group_by_split(["test-val-0.tar", "test-train-0.tar", "x.tar"])
    assert found == {
        "test-train": ["test-train-0.tar"],
        "test-val": ["test-val-0.tar"],
    }


def test_spellings_of_one_split_are_one():
    assert len(group_by_split(["train-0.tar", "training-1.tar", "Train_2.tar"])) == 1
    assert len(group_by_split(["val-0.tar", "validation-1.tar", "dev.tar"])) == 1


@pytest.mark.parametrize(
    ("chosen", "others", "pattern"),
    [
        (["train.tar"], ["val.tar"], "train.tar"),
        (["train-000.tar", "train-001.tar"], ["val-000.tar"], "train-*"),
        (["a-train-0.tar", "a-train-1.tar"], ["a-val-0.tar"], "a-train-*"),
        (["000_train.tar", "001_train.tar"], ["000_val.tar"], "*_train.*"),
        (["train1.tar", "train2.tar"], ["val1.tar"], "train*"),
        (["train-0.tar", "training-1.tar"], ["val.tar"], None),
        (["train-0.tar", "train-1.tar"], ["train-val-0.tar"], None),
    ],
)
def test_a_pattern_for_one_split(chosen, others, pattern):
    assert suggest_pattern(chosen, others) == pattern


WORDS = st.sampled_from(["train", "val", "Test", "x", "2012", "dev"])


@given(st.lists(st.tuples(WORDS, st.sampled_from("-_."), WORDS), min_size=2))
@settings(max_examples=100, deadline=None)
def test_a_suggested_pattern_matches_one_split_alone(parts):
    names = [f"{a}{s}{b}-{i}.tar" for i, (a, s, b) in enumerate(parts)]
    for chosen in group_by_split(names).values():
        others = sorted(set(names) - set(chosen))
        pattern = suggest_pattern(chosen, others)
        if pattern is not None:
            assert [n for n in names if fnmatchcase(n, pattern)] == chosen


def test_folders_of_splits():
    for name in ("train", "Val", "TEST", "train2017", "val_2012", "train-val"):
        assert is_split_folder(name)
    for name in ("cat", "trains", "test tube", "0", "n01440764", "my_train"):
        assert not is_split_folder(name)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("val train", "train val"), ("seg_train seg_test", "seg_train seg_test"), ("trainA trainB", ""),
        ("test_set training_set", "training_set test_set"), ("train_images val_images", "train_images val_images"),
        ("train_cats test_cats train_dogs test_dogs", "train_cats train_dogs test_cats test_dogs"),
        ("train bus test", ""), ("cat dog", ""), ("training_shoe dress", ""), ("train_station test_tube", ""),
        ("train", ""), ("img_train img_training", ""), ("seg_train seg_test seg_pred", ""),
    ],
)  # fmt: skip
def test_folders_beside_each_other_that_are_splits(names, splits):
    assert sorted(find_split_folders(names.split(), [])) == sorted(splits.split())
    assert find_split_folders(names.split(), [])[:1] == splits.split()[:1]


def test_beside_other_folders_splits_hold_folders():
    names = ["seg_pred", "seg_test", "seg_train"]
    paths = ["seg_train/a/1.jpg", "seg_test/a/1.jpg", "seg_pred/1.jpg"]
    assert find_split_folders(names, paths) == ["seg_train", "seg_test"]
    assert find_split_folders(names, paths[1:]) == []
