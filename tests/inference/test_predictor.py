"""Predictions have the bits of an evaluation, whatever they come from and come with."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import STATISTICS, encoded, picture, write_set
from PIL import Image
from sets import SetWriter

from distrain.data.decoding.image import encode_ppm
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.inference.predictor import Predictor
from distrain.launch.evaluation import evaluate
from distrain.monitor.sinks import SilentConsole
from distrain.trainer import train


@pytest.fixture(scope="module")
def predictor(trained):
    return Predictor(trained.run)


@pytest.fixture(scope="module")
def files(digits):
    """The stored files of the first images of the validation set."""
    dataset = Dataset.open(digits / "val")
    return [bytes(dataset[i].data) for i in range(5)]


@pytest.fixture
def folder(files, tmp_path):
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for i, data in enumerate(files):
        (folder / "inner" / f"{i}.jpg").write_bytes(data)
    return folder


def values(predictions):
    return [[(p.label, p.probability) for p in one.classes] for one in predictions]


def test_a_set_is_predicted_as_it_is_evaluated(trained, digits, predictor):
    """To the last bit: whole, and image by image."""
    table = evaluate(str(trained.run)).images
    rows = [
        list(zip(classes, probabilities, strict=True))
        for classes, probabilities in zip(
            table.top_classes.tolist(), table.top_probabilities.tolist(), strict=True
        )
    ]
    assert values(predictor.predict(digits / "val")) == rows
    dataset = Dataset.open(digits / "val")
    # Any place in a chunk of 50, and in the short last one.
    for i in (0, 49, 50, 77, 358):
        alone = predictor.predict_images([bytes(dataset[i].data)])
        assert values(alone) == [rows[i]]


@pytest.mark.parametrize(
    "overrides", [["data.backend=torch"], ["data.normalise=device"], ["lanes=1"]]
)
def test_other_decoders_predict_as_they_evaluate(trained, digits, overrides):
    table = evaluate(str(trained.run), overrides=overrides).images
    found = values(Predictor(trained.run, overrides=overrides).predict(digits / "val"))
    assert [[p for _, p in row] for row in found] == table.top_probabilities.tolist()


def test_a_name_for_each_class(predictor, folder):
    (first, *_) = predictor.predict(folder)
    assert first.name == f"{folder}/inner/0.jpg"
    assert [c.name for c in first.classes] == [str(c.label) for c in first.classes]
    probabilities = [c.probability for c in first.classes]
    assert probabilities == sorted(probabilities, reverse=True)
    assert len(probabilities) == 5
    assert 0.5 < sum(probabilities) <= 1


def test_every_kind_of_source_gives_the_same(predictor, folder, files, tmp_path):
    wanted = values(predictor.predict_images(files))
    assert values(predictor.predict(folder)) == wanted
    assert values(predictor.predict(*sorted((folder / "inner").iterdir()))) == wanted
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(folder, "images")
    assert values(predictor.predict(tmp_path / "x.tar")) == wanted
    structs = [{"bytes": data, "path": None} for data in files]
    pq.write_table(pa.table({"image": structs}), tmp_path / "x.parquet")
    assert values(predictor.predict(tmp_path / "x.parquet")) == wanted
    pixels = [Image.open(io.BytesIO(data)) for data in files]
    assert len(predictor.predict_images([np.asarray(p) for p in pixels])) == 5
    assert values(predictor.predict_images(pixels)) == values(
        predictor.predict_images([np.asarray(p) for p in pixels])
    )


def test_what_is_no_image_is_named_and_the_others_are_predicted(predictor, folder):
    (folder / "inner/2.jpg").write_bytes(b"junk" * 50)
    cut = (folder / "inner/3.jpg").read_bytes()[:600]
    (folder / "inner/3.jpg").write_bytes(cut)
    (folder / "inner/note.txt").write_text("not an image by its name")
    found = list(predictor.predict(folder))
    assert len(found) == 5
    assert [bool(one.problem) for one in found] == [False, False, True, True, False]
    assert "format is not recognized" in found[2].problem
    assert "truncated" in found[3].problem.lower()
    assert not found[2].classes


def test_a_file_that_pack_refuses_is_refused(predictor):
    """Here for damage below the window, which a decoder of the window alone passes over."""
    data = encoded(picture(1, 720, 72 * 5))
    place = len(data) * 9 // 10
    damaged = data[:place] + b"\xff\xc4" + data[place:]
    whole, bad = predictor.predict_images([data, damaged])
    assert whole.classes
    assert "broken data stream" in bad.problem


def test_images_of_any_size_are_resized(predictor):
    """A picture stored at twice the size gives nearly what it gives at its own."""
    pixels = picture(1, 144, 144)
    small = np.asarray(Image.fromarray(pixels).resize((72, 72), Image.BILINEAR))
    big, little = predictor.predict_images([pixels, small])
    assert [c.label for c in big.classes][:2] == [c.label for c in little.classes][:2]
    assert big.classes[0].probability == pytest.approx(
        little.classes[0].probability, abs=0.02
    )
    wide, tall = predictor.predict_images(
        [encoded(picture(2, 50, 300)), encoded(picture(3, 300, 50))]
    )
    assert wide.classes
    assert tall.classes


@pytest.mark.parametrize(
    "sizes",
    [[(70 + 7 * i, 400 - 8 * i) for i in range(20)], [(60, 50)] * 20],
    ids=["differ", "small"],
)
def test_a_set_that_must_be_resized_is_evaluated_as_it_is_predicted(
    trained, predictor, tmp_path, sizes
):
    """Its images differ in size, or are too small, where those of the training were used as they are."""
    writer = SetWriter(
        Store(str(tmp_path / "set")),
        list("0123456789"),
        sizes[0] if len(set(sizes)) == 1 else None,
        proved=True,
    )
    for i, (height, width) in enumerate(sizes):
        writer.add(
            encoded(picture(i, height, width)), i % 10, f"{i}.jpg", (height, width)
        )
    writer.finish(STATISTICS)
    table = evaluate(str(trained.run), tmp_path / "set").images
    found = values(predictor.predict(tmp_path / "set"))
    assert [[p for _, p in row] for row in found] == table.top_probabilities.tolist()


def test_nothing_at_a_path_is_told_before_the_first_prediction(predictor, folder):
    with pytest.raises(UserError, match=r"nothing at .*none\.jpg: check the path"):
        predictor.predict(folder, folder / "none.jpg")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no images in .*empty: check the path"):
        predictor.predict(folder / "empty")


@pytest.mark.parametrize("image", ["a.jpg", np.zeros((4, 4), np.uint8), [[1.0]]])
def test_what_is_no_image_in_memory_is_a_sentence(predictor, image):
    with pytest.raises(UserError, match="is not one: give the bytes of a file"):
        predictor.predict_images([image])


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_sets_that_are_resized_too(narrow, tmp_path, backend, encoding):
    """Photographs of many sizes as they are, trained on with a short side; and pixels stored raw."""
    if encoding == "jpeg":
        files = [encoded(picture(i, 70 + 7 * i, 400 - 8 * i)) for i in range(40)]
        size, augment = None, {"crop": 64, "short_side": 72}
    else:
        files = [bytes(encode_ppm(picture(i, 80, 72))) for i in range(40)]
        size, augment = (80, 72), {"crop": 64}
    write_set(tmp_path / "set", files, size, encoding=encoding, proved=True)
    url = str(tmp_path / "set")
    config = narrow(
        data={"train": url, "val": url, "backend": backend},
        augment=augment,
        global_batch=20,
        evaluate={"batch": 16},
    )
    train(config, console=SilentConsole())
    table = evaluate(config.run, console=SilentConsole()).images
    found = values(Predictor(config.run).predict(url))
    assert [[p for _, p in row] for row in found] == table.top_probabilities.tolist()
    assert len({row[0][1] for row in found}) == 40
