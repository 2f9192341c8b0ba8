"""Which columns are taken, and what is said of columns that hold no images."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrain.data.prepare.hub_features import find_features
from distrain.errors import UserError

BYTES = [b"a", b"b"]
STRUCT = pa.array([{"bytes": b"a", "path": "x"}] * 2)


def features_of(tmp_path, columns, metadata=None, **options):
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if metadata:
        text = json.dumps({"info": {"features": metadata}})
        table = table.replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "x.parquet")
    return find_features(pq.read_metadata(tmp_path / "x.parquet"), "x", **options)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"img": STRUCT, "label": [0, 1]}, ("img.bytes", "label")),
        ({"jpg": BYTES, "cls": [0, 1]}, ("jpg", "cls")),
        (
            {"content": BYTES, "id": [7, 8], "fine_label": [0, 1]},
            ("content", "fine_label"),
        ),
        ({"image": BYTES, "mask": BYTES, "Class": ["a", "b"]}, ("image", "Class")),
        (
            {"x": [{"image": {"bytes": b"a"}, "target": 0}] * 2, "name": ["a", "b"]},
            ("x.image.bytes", "x.target"),
        ),
    ],
)
def test_the_only_columns_that_can_be_meant_are_taken_with_a_note(
    tmp_path, columns, expected
):
    features = features_of(tmp_path, columns)
    assert features.columns == expected
    usual = ("image", "label")
    notes = [
        f"{name}s are read from column {column.removesuffix('.bytes')}, the only one "
        f"that may hold them: choose another with {name}_column"
        for name, column in zip(usual, expected, strict=True)
        if column != name
    ]
    if "img" in columns:
        notes = notes[:1]
    assert features.notes == notes


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"png": BYTES, "mask": BYTES, "label": [0, 1]},
            "x has several columns that may hold images, png, mask: choose one with ima",
        ),
        (
            {"image": BYTES, "cls": [0, 1], "target": [0, 1]},
            "several columns that may hold labels, cls, target: choose one with label_c",
        ),
        (
            {"img": BYTES, "fine_label": [0, 1], "coarse_label": [0, 0]},
            "columns that may hold labels, fine_label, coarse_label: choose one with",
        ),
        (
            {"image": BYTES, "id": [0, 1]},
            "has no column label: name the columns .* it has image, id$",
        ),
        (
            {"hash": pa.array(BYTES, pa.binary(1)), "label": [0, 1]},
            "has no column image",
        ),
    ],
)
def test_columns_that_are_not_clear_are_refused_with_their_names(
    tmp_path, columns, message
):
    with pytest.raises(UserError, match=message):
        features_of(tmp_path, columns)


def test_metadata_of_nested_features_names_columns(tmp_path):
    columns = {
        "x": [{"photo": {"bytes": b"a"}, "thumb": {"bytes": b"b"}, "kind": 0}] * 2
    }
    metadata = {
        "x": {
            "photo": {"_type": "Image"},
            "thumb": {"dtype": "x", "_type": "Value"},
            "kind": {"_type": "ClassLabel", "names": ["a", "b"]},
        }
    }
    features = features_of(tmp_path, columns, metadata)
    assert features.columns == ("x.photo.bytes", "x.kind")
    assert features.classes == ("a", "b")
    assert features.notes == []


SPARK = {
    "origin": "x",
    "height": 1,
    "width": 1,
    "nChannels": 3,
    "mode": 16,
    "data": b"abc",
}
RAY = pa.schema(
    [
        pa.field(
            "image",
            pa.large_list(pa.uint8()),
            metadata={
                "ARROW:extension:name": "ray.data.arrow_tensor_v2",
                "ARROW:extension:metadata": "[2]",
            },
        ),
        pa.field("label", pa.int64()),
    ]
)
TENSOR = pa.ExtensionArray.from_storage(
    pa.fixed_shape_tensor(pa.uint8(), [2]),
    pa.array([[1, 2]] * 2, pa.list_(pa.uint8(), 2)),
)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (["a.jpg", "b.jpg"], "it holds text, such as paths or base64"),
        ([[[[1, 2]]]] * 2, "it holds lists of numbers, such as pixels"),
        ([[1, 2]] * 2, "it holds lists of numbers, such as pixels"),
        ([[b"x", b"y"]] * 2, "it holds several images per row"),
        ([[{"bytes": b"x"}]] * 2, "it holds several images per row"),
        ([SPARK] * 2, "it holds decoded pixels, as Spark stores images"),
        (
            [{"path": "x", "size": 3}] * 2,
            "it has the fields path, size, and no bytes a",
        ),
        (TENSOR, "it holds lists of numbers, such as pixels"),
        ([1, 2], "its type is int64"),
    ],
)
def test_what_is_no_image_file_is_called_what_it_is(tmp_path, image, reason):
    with pytest.raises(
        UserError,
        match=f"column image of x does not hold image files: {reason}.*; choose another",
    ):
        features_of(tmp_path, {"image": image, "label": [0, 1]})


def test_tensors_of_ray_are_no_files(tmp_path):
    """Where Ray is not loaded, their type is that of a list of bytes."""
    with pytest.raises(UserError, match="it holds lists of numbers, such as pixels"):
        features_of(tmp_path, pa.table([[[1, 2]] * 2, [0, 1]], schema=RAY))


def test_images_of_datasets_as_pixels_or_files(tmp_path):
    """The package `datasets` writes files for Image, and lists for Array3D."""
    import datasets

    datasets.disable_progress_bars()

    def written(feature, image):
        features = datasets.Features(
            {"photo": feature, "label": datasets.Value("string")}
        )
        rows = {"photo": [image], "label": ["a"]}
        whole = datasets.Dataset.from_dict(rows, features=features)
        whole.to_parquet(str(tmp_path / "y.parquet"))
        return find_features(pq.read_metadata(tmp_path / "y.parquet"), "y")

    file = {"bytes": b"a", "path": None}
    assert written(datasets.Image(decode=False), file).columns.image == "photo.bytes"
    with pytest.raises(UserError, match="y has no column image"):
        written(datasets.Array3D((1, 1, 3), "uint8"), [[[1, 2, 3]]])
