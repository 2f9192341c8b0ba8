"""Labels in Parquet files: their types, what is missing, and files that differ."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrain.data.prepare.open import open_source
from distrain.data.prepare.source import Reject
from distrain.errors import UserError

IMAGES = [b"0", b"1", b"2", b"3"]


def write(path, labels, column_type=None, names=None, **options):
    table = pa.table(
        {"image": IMAGES[: len(labels)], "label": pa.array(labels, column_type)}
    )
    if names:
        features = {"label": {"_type": "ClassLabel", "names": names}}
        metadata = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, path, **options)
    return str(path)


def labels_of(source):
    """The class of each row, or why it is left out."""
    rows = [row for block in source.blocks for row in source.reader.read_block(block)]
    return [
        row.reason if isinstance(row, Reject) else source.classes[row.label]
        for row in rows
    ]


TEXT = ["cat", None, "dog", ""]
CATEGORIES = pa.array(["b", "a", None, "b"]).dictionary_encode().type
TYPES = [
    (TEXT, pa.string(), ["cat", "no label", "dog", "no label"]),
    (TEXT, pa.large_string(), ["cat", "no label", "dog", "no label"]),
    (TEXT, pa.string_view(), ["cat", "no label", "dog", "no label"]),
    (TEXT, CATEGORIES, ["cat", "no label", "dog", "no label"]),
    ([b"cat", None, b"dog", b""], pa.binary(), ["cat", "no label", "dog", "no label"]),
    ([True, False, None, True], pa.bool_(), ["True", "False", "no label", "True"]),
    ([1.0, None, 0.0, float("nan")], pa.float64(), ["1", "no label", "0", "no label"]),
    ([1.0, 0.0], pa.float16(), ["1", "0"]),
    ([1, -1, 0, None], pa.int8(), ["1", "label -1: no label", "0", "no label"]),
    ([1, 0], pa.dictionary(pa.int8(), pa.int64()), ["1", "0"]),
]


@pytest.mark.parametrize(("labels", "column_type", "expected"), TYPES)
def test_labels_of_every_type_are_classes(tmp_path, labels, column_type, expected):
    path = write(tmp_path / "x.parquet", labels, column_type)
    source = open_source(path).source
    assert source.classes == tuple(sorted(source.classes))
    assert labels_of(source) == expected


@pytest.mark.parametrize(
    ("labels", "column_type", "message"),
    [
        (
            [0.5, 1.0],
            None,
            r"column label of .*x.parquet has the label 0.5: labels are",
        ),
        (
            [[0, 1], [1]],
            None,
            "column label of .* does not hold labels, its type is list",
        ),
        ([1, 2], pa.timestamp("s"), "does not hold labels, its type is timestamp"),
        ([b"\xff", b"a"], None, r"has the label b'\\xff': labels are numbers"),
        ([None, None], pa.null(), "has no labels: labels are"),
        ([None, ""], None, "has no labels: labels are"),
        (
            [-1, -1],
            None,
            "all labels of .*x.parquet are -1: this split has no labels; take one",
        ),
        ([-1.0, float("nan")], None, "all labels of .* are -1: this split has no"),
    ],
)
def test_what_are_no_labels_is_one_sentence(tmp_path, labels, column_type, message):
    path = write(tmp_path / "x.parquet", labels, column_type)
    with pytest.raises(UserError, match=message):
        open_source(path)


@pytest.mark.parametrize("has_statistics", [True, False])
@pytest.mark.parametrize("labels", [[-1, -1, -1, -1], [None, None, -1, None]])
def test_a_split_without_labels_is_said_though_classes_have_names(
    tmp_path, labels, has_statistics
):
    path = write(
        tmp_path / "x.parquet",
        labels,
        pa.int64(),
        names=["a", "b"],
        write_statistics=has_statistics,
        row_group_size=2,
    )
    with pytest.raises(UserError, match="has no labels, column label .* take a split"):
        open_source(path)
    write(
        tmp_path / "x.parquet",
        [*labels[:3], 1],
        pa.int64(),
        names=["a", "b"],
        write_statistics=has_statistics,
        row_group_size=2,
    )
    assert labels_of(open_source(path).source)[3] == "b"


def test_floats_with_class_names_are_labels(tmp_path):
    """As pandas stores integers where some are missing."""
    path = write(
        tmp_path / "x.parquet", [1.0, None, 0.0], pa.float64(), names=["a", "b"]
    )
    assert labels_of(open_source(path).source) == ["b", "no label", "a"]
    write(tmp_path / "x.parquet", [-1.0, None], pa.float64(), names=["a", "b"])
    with pytest.raises(UserError, match="has no labels, column label"):
        open_source(path)


def test_labels_counted_from_1_and_gaps_are_noted(tmp_path):
    path = write(tmp_path / "x.parquet", [1, 4, 4, 2])
    source = open_source(path).source
    assert source.classes == ("0", "1", "2", "3", "4")
    (note,) = source.notes
    assert "label 0 has no image" in note
    assert "are labels counted from 1?" in note


def test_classes_that_look_the_same_are_noted(tmp_path):
    path = write(tmp_path / "x.parquet", ["cat", "cat ", "dog"])
    (note,) = open_source(path).source.notes
    assert note.startswith("'cat' and 'cat ' look the same")
    path = write(tmp_path / "x.parquet", [0, 1], names=["cat", "Cat"])
    (note,) = open_source(path).source.notes
    assert note.startswith("'Cat' and 'cat' look the same")


def test_text_labels_of_all_files_are_numbered_together(tmp_path):
    write(tmp_path / "1.parquet", ["dog", "cat"])
    write(tmp_path / "2.parquet", ["ant", "dog"], row_group_size=1)
    source = open_source(str(tmp_path)).source
    assert source.classes == ("ant", "cat", "dog")
    assert labels_of(source) == ["dog", "cat", "ant", "dog"]


def test_files_that_differ_in_how_they_are_stored_are_one_set(tmp_path):
    """In the type of text, the order of columns, other columns, nulls, versions."""
    write(tmp_path / "1.parquet", ["dog", "cat"], version="1.0")
    write(tmp_path / "2.parquet", ["dog", None], CATEGORIES, use_dictionary=False)
    write(tmp_path / "3.parquet", ["ant", "dog"], pa.large_string(), compression="gzip")
    write(tmp_path / "4.parquet", [None, None], pa.null())
    schema = pa.schema(
        [
            pa.field("id", pa.int64()),
            pa.field("label", pa.string(), nullable=False),
            pa.field("image", pa.large_binary(), nullable=False),
        ]
    )
    other = pa.table([[7], ["cat"], [b"4"]], schema=schema)
    pq.write_table(other, tmp_path / "5.parquet")
    source = open_source(str(tmp_path)).source
    assert labels_of(source) == [
        "dog", "cat", "dog", "no label", "ant", "dog", "no label", "no label", "cat",
    ]  # fmt: skip


def test_a_file_without_rows_does_not_matter_whatever_its_columns(tmp_path):
    """Such as pandas and Dask write from an empty frame."""
    empty = pa.table({"image": pa.nulls(0), "label": pa.nulls(0)})
    pq.write_table(empty, tmp_path / "0.parquet")
    write(tmp_path / "1.parquet", ["dog", "cat"])
    pq.write_table(empty, tmp_path / "2.parquet")
    assert labels_of(open_source(str(tmp_path)).source) == ["dog", "cat"]
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(UserError, match="0.parquet does not hold image files"):
        open_source(str(tmp_path))
    empty = pa.table({"image": pa.array([], pa.binary()), "label": pa.nulls(0)})
    for i in (0, 2):
        pq.write_table(empty, tmp_path / f"{i}.parquet")
    with pytest.raises(UserError, match="no images .*its Parquet files have no rows"):
        open_source(str(tmp_path))


def test_lists_of_bytes_whose_elements_have_other_names_are_one_set(tmp_path):
    for i, name in enumerate(("item", "element", "array")):
        column_type = pa.list_(pa.field(name, pa.uint8()))
        table = pa.table({"image": pa.array([[i]], column_type), "label": [i]})
        pq.write_table(
            table, tmp_path / f"{i}.parquet", use_compliant_nested_type=False
        )
    source = open_source(str(tmp_path)).source
    assert labels_of(source) == ["0", "1", "2"]


@pytest.mark.parametrize("first", [["a", "b"], [True, False]])
def test_labels_of_two_kinds_are_refused_with_both_files(tmp_path, first):
    write(tmp_path / "0.parquet", [None], pa.null())
    write(tmp_path / "1.parquet", first)
    write(tmp_path / "2.parquet", [0, 1])
    with pytest.raises(
        UserError, match="labels are numbers in 2.parquet and .* in 1.parquet: store"
    ):
        open_source(str(tmp_path))


def test_a_reader_with_other_numbers_goes_to_another_process(tmp_path):
    path = write(tmp_path / "x.parquet", ["cat", "ant", "dog", "cat"])
    source = open_source(path).source
    reader = pickle.loads(pickle.dumps(source.reader.renumber([5, 0, None])))
    (block,) = source.blocks
    cat, ant, dog, _ = reader.read_block(block)
    assert (cat.label, ant.label) == (0, 5)
    assert dog.reason == "label 'dog' is not one of 2 classes"
    assert (
        reader.renumber([0, None, None, None, None, 1]).read_block(block)[1].label == 1
    )


def test_too_many_labels_are_another_column(tmp_path, monkeypatch):
    monkeypatch.setattr("distrain.data.prepare.label_values._MAX_DISTINCT_LABELS", 3)
    path = write(tmp_path / "x.parquet", ["a", "b", "c", "d"])
    with pytest.raises(UserError, match="more than 3 different labels: choose another"):
        open_source(path)


def test_labels_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    limit = "distrain.data.prepare.row_groups.MAX_SOURCE_GROUP_BYTES"
    monkeypatch.setattr(limit, 1 << 20)
    table = pa.table({"image": [b"x"] * 100, "label": ["y" * 50_000] * 100})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has labels that are too large .*label_column"):
        open_source(str(tmp_path / "x.parquet"))
