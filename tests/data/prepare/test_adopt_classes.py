"""A source with the classes of a data set."""

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import STATISTICS, encoded, picture
from sets import SetWriter

from distrain.data.prepare.commands import index, pack
from distrain.data.prepare.open import open_source
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.errors import UserError

TRAIN = ("ant", "bee", "cow", "dog")
FILES = {name: encoded(picture(i, 40, 40)) for i, name in enumerate(TRAIN)}


@pytest.fixture
def train(tmp_path):
    """A data set of the four classes."""
    writer = SetWriter(Store(str(tmp_path / "train")), TRAIN, (40, 40))
    for label, name in enumerate(TRAIN):
        writer.add(FILES[name], label, f"{name}.jpg")
    writer.finish(STATISTICS)
    return str(tmp_path / "train")


def folder(place, names):
    for name in names:
        (place / "val" / name).mkdir(parents=True)
        (place / "val" / name / "1.jpg").write_bytes(FILES[name])
    return str(place / "val")


def text_labels(place, names):
    rows = {"image": [FILES[name] for name in names], "label": list(names)}
    pq.write_table(pa.table(rows), place / "val.parquet")
    return str(place / "val.parquet")


def hub_names(place, names):
    """Numbers, with names in another order than the training set's."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    rows = [
        {"image": {"bytes": FILES[name], "path": None}, "label": i}
        for i, name in enumerate(names)
    ]
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(rows, features=features)
    whole.to_parquet(str(place / "val.parquet"))
    return str(place / "val.parquet")


def webdataset(place, names, label=lambda name: name):
    with tarfile.open(place / "val.tar", "w") as tar:
        for i, name in enumerate(names):
            for extension, data in (
                ("jpg", FILES[name]),
                ("cls", str(label(name)).encode()),
            ):
                info = tarfile.TarInfo(f"{i}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(place / "val.tar")


def labelled(url):
    dataset = Dataset.open(url)
    return sorted((dataset.classes[row.label], row.label) for row in dataset)


@pytest.mark.parametrize("shape", [folder, text_labels, hub_names, webdataset])
@pytest.mark.parametrize("names", [("dog", "bee"), ("cow",), TRAIN[::-1]])
def test_names_have_the_numbers_of_the_training_set(tmp_path, train, shape, names):
    url = shape(tmp_path, names)
    result = pack(url, tmp_path / "out", classes_of=train, geometry="keep", processes=1)
    assert result.rejects == []
    assert result.manifest.classes == TRAIN
    assert labelled(tmp_path / "out") == sorted(
        (name, TRAIN.index(name)) for name in names
    )


def test_the_pixels_are_those_of_the_class(tmp_path, train):
    url = text_labels(tmp_path, ("dog", "ant", "bee"))
    pack(url, tmp_path / "out", classes_of=train, geometry="keep", processes=1)
    for row in Dataset.open(tmp_path / "out"):
        assert bytes(row.data) == FILES[TRAIN[row.label]]


@pytest.mark.parametrize("processes", [1, 2])
def test_index_takes_them_too(tmp_path, train, processes):
    url = hub_names(tmp_path, ("cow", "ant"))
    index(url, to=tmp_path / "out", classes_of=train, processes=processes)
    assert labelled(tmp_path / "out") == [("ant", 0), ("cow", 2)]


def test_numbers_are_those_of_the_training_set_and_said(tmp_path, train):
    url = webdataset(tmp_path, ("ant", "cow"), TRAIN.index)
    source = open_source(url, classes_url=train).source
    assert source.classes == TRAIN
    assert [block.label for block in source.blocks] == [0, 2]
    assert source.notes[-1] == (
        f"labels are numbers, taken for the classes of {train} in their order: 0 is "
        "'ant'"
    )


def test_numbers_beyond_the_training_set(tmp_path, train):
    url = webdataset(tmp_path, ("ant", "cow"), {"ant": 0, "cow": 4}.get)
    with pytest.raises(
        UserError, match=r"has the label 4, but .*train has 4 classes: take the data"
    ):
        open_source(url, classes_url=train)


def test_a_class_that_the_training_set_lacks_is_named(tmp_path, train):
    place = tmp_path / "val"
    for name in ("bee", "Cow"):
        (place / name).mkdir(parents=True)
        (place / name / "1.jpg").write_bytes(FILES["bee"])
    with pytest.raises(
        UserError,
        match=r"class 0 of .*val, 'Cow', is not one of the 4 classes of .*train, which "
        r"has 'cow', not 'Cow' \(they differ in upper and lower case\)",
    ):
        open_source(str(place), classes_url=train)


def test_no_data_set_at_the_url(tmp_path, train):
    url = folder(tmp_path, ("bee", "dog"))
    with pytest.raises(UserError, match="no data set at"):
        open_source(url, classes_url=str(tmp_path / "none"))
