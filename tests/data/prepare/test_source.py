"""A kind of source is one function in one file, found by the ending of its files."""

from typing import get_args

import pytest

from distrain.data.config import DataConfig
from distrain.data.prepare import source as source_module
from distrain.data.prepare.builtin import BUILT_IN_DATASETS
from distrain.data.prepare.open import open_source
from distrain.data.prepare.source import (
    OPENERS_BY_EXTENSION,
    Block,
    FileReader,
    ImageSource,
    OpenedSource,
    register_opener,
)
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.errors import UserError


@pytest.fixture
def kinds(monkeypatch):
    """A copy of the registry, for a test to add to."""
    found = dict(OPENERS_BY_EXTENSION)
    monkeypatch.setattr(source_module, "OPENERS_BY_EXTENSION", found)
    monkeypatch.setattr("distrain.data.prepare.open.OPENERS_BY_EXTENSION", found)
    monkeypatch.setattr("distrain.data.prepare.shard_names.OPENERS_BY_EXTENSION", found)
    return found


def test_a_kind_of_ones_own_is_one_function(kinds, tmp_path):
    @register_opener("list")
    def open_list(store, files, wanted):
        lines = [
            line.split()
            for file in files
            for line in store.read(file.name).decode().splitlines()
        ]
        blocks = [Block(path, path, int(label), None, 0) for label, path in lines]
        return OpenedSource(
            ImageSource(store, "list", ("a", "b"), blocks, FileReader(store.url)), None
        )

    assert kinds["list"] is open_list
    (tmp_path / "train.list").write_text("0 x.jpg\n1 y.jpg\n")
    for url in (str(tmp_path), str(tmp_path / "train.list"), str(tmp_path / "*.list")):
        source = open_source(url).source
        assert (
            source.format_name,
            [(block.path, block.label) for block in source.blocks],
        ) == (
            "list",
            [("x.jpg", 0), ("y.jpg", 1)],
        )


def test_two_functions_for_one_ending_are_a_mistake(kinds):
    with pytest.raises(AssertionError, match=r"two functions open \.tar"):
        register_opener("tar")(lambda store, files, wanted: None)


def test_what_no_function_opens_is_a_sentence(tmp_path):
    (tmp_path / "set.rar").write_bytes(b"x")
    with pytest.raises(
        UserError,
        match="set.rar is a compressed archive: unpack it",
    ):
        open_source(str(tmp_path / "set.rar"))


def test_built_in_sets_are_those_of_the_config():
    (names,) = (
        get_args(kind)
        for kind in get_args(DataConfig.model_fields["pack"].annotation)
        if get_args(kind)
    )
    assert set(names) == BUILT_IN_DATASETS.keys()


@pytest.mark.parametrize("name", BUILT_IN_DATASETS)
def test_what_is_said_of_a_built_in_set_before_it_is_packed(name, tmp_path):
    built_in = BUILT_IN_DATASETS[name]
    train, val = str(tmp_path / "train"), str(tmp_path / "val")
    built_in.pack_splits(train, val)
    manifest = Manifest.load(Store(train))
    assert (len(manifest.classes), manifest.rows_per_group.tolist()) == (
        built_in.num_classes,
        built_in.group_rows.tolist(),
    )
    assert Manifest.load(Store(val)).classes == manifest.classes
