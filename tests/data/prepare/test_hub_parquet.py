"""Parquet as people's writers make it: sizes, types, encodings, names and labels."""

import base64
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest
from photos import encoded, picture

from distrain.data.prepare import row_groups
from distrain.data.prepare.index import index_dataset
from distrain.data.prepare.open import open_source
from distrain.data.prepare.source import Reject, Sample
from distrain.data.shards.dataset import Dataset
from distrain.errors import UserError

FILES = Path(__file__).parent / "files"
IMAGES = [encoded(picture(i, 20, 30)) for i in range(4)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read(source):
    """All rows of a source; a row group that is left out is one row."""
    rows = []
    for block in source.blocks:
        found = source.reader.read_block(block)
        rows += [found] if isinstance(found, Reject) else found
    return rows


def pairs(source):
    return [(row.label, row.data) for row in read(source)]


def write(path, image, label=(0, 1, 1, 0), **options):
    table = pa.table({"image": image, "label": label})
    pq.write_table(table, path, **options)
    return str(path)


# --- sizes


@pytest.mark.parametrize(
    ("sizes", "group_rows"),
    [
        ([112_000] * 100, 100),
        ([1_100] * 1000, 1000),
        ([300] * 5000, 5000),
        ([90_000] * 100 + [112_000] * 100, 100),
    ],
)
def test_ordinary_row_groups_with_a_dictionary_are_taken(tmp_path, sizes, group_rows):
    """Writers begin each column with a dictionary, though nothing repeats."""
    generator = np.random.default_rng(0)
    data = [generator.bytes(size) for size in sizes]
    rows = pa.array([{"bytes": image, "path": "x"} for image in data], STRUCT)
    labels = [i % 2 for i in range(len(data))]
    path = write(tmp_path / "x.parquet", rows, labels, row_group_size=group_rows)
    source = open_source(path).source
    assert source.rejects == []
    assert pairs(source) == list(zip(labels, data, strict=True))


def test_different_images_in_a_dictionary_are_no_bomb(tmp_path, monkeypatch):
    """They are read in parts, and each part brings the whole dictionary along."""
    monkeypatch.setattr(row_groups, "MAX_SOURCE_GROUP_BYTES", 4 << 20)
    generator = np.random.default_rng(0)
    data = [generator.bytes(10_000) for _ in range(100)]
    labels = [i % 2 for i in range(len(data))]
    path = write(tmp_path / "x.parquet", pa.array(data).dictionary_encode(), labels)
    assert pairs(open_source(path).source) == list(zip(labels, data, strict=True))


# Arrow crashes if a pool goes before what was allocated in it.
POOLS = []


def peak_bytes(action):
    """Call a function; return its result, and the most memory that Arrow took."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        return action(), pool.max_memory()
    finally:
        pa.set_memory_pool(before)


BOMBS = {
    "dictionary": (pa.binary(), {}),
    "prefixes": (
        pa.binary(),
        {"use_dictionary": False, "column_encoding": {"image": "DELTA_BYTE_ARRAY"}},
    ),
    "dictionary of large values": (pa.large_binary(), {}),
    "zeros": (pa.list_(pa.uint8()), {}),
    "missing values of a fixed width": (pa.binary(1 << 18), {}),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_in_bounded_memory(tmp_path, monkeypatch, kind):
    """A value of 50 kB, stored once, 1,000 times: 50 MB in a few kB."""
    monkeypatch.setattr(row_groups, "MAX_SOURCE_GROUP_BYTES", 2 << 20)
    column_type, options = BOMBS[kind]
    values = {"zeros": [0] * 50_000, "missing values of a fixed width": None}
    value = values.get(kind, bytes(50_000))
    num_rows = 100 if kind in values else 1000
    path = write(
        tmp_path / "x.parquet",
        pa.array([value] * num_rows, column_type),
        [0, 1] * (num_rows // 2),
        compression="zstd",
        data_page_size=1 << 30,
        dictionary_pagesize_limit=1 << 30,
        **options,
    )
    assert Path(path).stat().st_size < 100_000
    source = open_source(path).source
    ((refused,), peak) = peak_bytes(lambda: read(source))
    assert refused.num_images == num_rows
    assert "over the limit of 2097152" in refused.reason
    assert peak < 4 << 20


def varint(value):
    """An integer as Thrift's compact protocol writes it."""
    value <<= 1
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def test_a_footer_that_claims_too_little_is_not_believed(tmp_path, monkeypatch):
    limit = 3 << 19
    monkeypatch.setattr(row_groups, "MAX_SOURCE_GROUP_BYTES", limit)
    path = Path(
        write(
            tmp_path / "x.parquet",
            pa.array([bytes(3 << 20)] * 2, pa.binary()),
            [0, 1],
            compression="zstd",
            use_dictionary=False,
            data_page_size=1 << 30,
        )
    )
    claimed = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    true, false = varint(claimed), varint(limit - 1000)
    assert len(true) == len(false)
    path.write_bytes(path.read_bytes().replace(true, false))
    source = open_source(str(path)).source
    assert source.rejects == [], "the footer lies"
    ((refused,), peak) = peak_bytes(lambda: read(source))
    assert refused.reason.startswith("a column unpacks to at least 6")
    assert peak < limit


def test_a_footer_that_claims_too_few_labels_is_not_believed(tmp_path, monkeypatch):
    limit = 3 << 20
    monkeypatch.setattr(row_groups, "MAX_SOURCE_GROUP_BYTES", limit)
    path = Path(
        write(
            tmp_path / "x.parquet",
            pa.array([b"x"] * 400_000),
            [0, 1] * 200_000,
            compression="zstd",
            use_dictionary=False,
        )
    )
    claimed = pq.read_metadata(path).row_group(0).column(1).total_uncompressed_size
    true, false = varint(claimed), varint(limit - 1000)
    assert len(true) == len(false)
    path.write_bytes(path.read_bytes().replace(true, false))

    def open_it():
        with pytest.raises(UserError, match="labels that are too large .a column unpa"):
            open_source(str(path))

    _, peak = peak_bytes(open_it)
    assert peak < 1 << 20


# --- types, encodings, writers


def as_lists(value_type):
    shift = 128 if value_type == pa.int8() else 0
    return [
        [(byte + shift) % 256 - shift for byte in data] if data else None
        for data in IMAGES
    ]


SAME = [IMAGES[0]] * 4
TYPES = {
    "binary": pa.array(IMAGES, pa.binary()),
    "large_binary": pa.array(IMAGES, pa.large_binary()),
    "binary_view": pa.array(IMAGES, pa.binary_view()),
    "fixed": pa.array(SAME, pa.binary(len(SAME[0]))),
    "dictionary": pa.array(IMAGES, pa.binary()).dictionary_encode(),
    "list<uint8>": pa.array(as_lists(pa.uint8()), pa.list_(pa.uint8())),
    "list<int8>": pa.array(as_lists(pa.int8()), pa.list_(pa.int8())),
    "large_list": pa.array(as_lists(pa.uint8()), pa.large_list(pa.uint8())),
    "fixed list": pa.array(
        [list(data) for data in SAME], pa.list_(pa.uint8(), len(SAME[0]))
    ),
    "struct": pa.array([{"bytes": data, "path": "x"} for data in IMAGES], STRUCT),
    "struct of a list": pa.array(
        [{"bytes": list(data)} for data in IMAGES],
        pa.struct([("bytes", pa.list_(pa.uint8()))]),
    ),
}


@pytest.mark.parametrize("kind", TYPES)
def test_images_of_every_type_of_bytes_are_taken_and_train(tmp_path, kind):
    path = write(tmp_path / "x.parquet", TYPES[kind], row_group_size=3)
    images = SAME if kind.startswith("fixed") else IMAGES
    source, columns = open_source(path)
    expected = list(zip((0, 1, 1, 0), images, strict=True))
    assert pairs(source) == expected
    index_dataset(source, columns, str(tmp_path / "index"))
    rows = list(Dataset.open(tmp_path / "index"))
    assert [(row.label, bytes(row.data)) for row in rows] == expected


@pytest.mark.parametrize(
    "encoding", ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY", None]
)
@pytest.mark.parametrize("page_version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_images_in_every_encoding_are_taken(
    tmp_path, encoding, page_version, compression
):
    options = {}
    if encoding:
        options = {"use_dictionary": False, "column_encoding": {"image": encoding}}
    path = write(
        tmp_path / "x.parquet",
        pa.array([*IMAGES, None] * 20, pa.binary()),
        [0, 1, 2, 3, 0] * 20,
        data_page_version=page_version,
        compression=compression,
        data_page_size=1000,
        **options,
    )
    rows = read(open_source(path).source)
    assert [row.data for row in rows if isinstance(row, Sample)] == IMAGES * 20
    assert {row.reason for row in rows if isinstance(row, Reject)} == {"no bytes"}


def test_a_missing_image_of_a_fixed_width_has_no_bytes(tmp_path):
    data = IMAGES[0]
    for kind, value in (
        (pa.binary(len(data)), data),
        (pa.list_(pa.uint8(), len(data)), list(data)),
    ):
        image = pa.array([value, None, value, value], kind)
        rows = read(open_source(write(tmp_path / "x.parquet", image)).source)
        assert rows.pop(1) == Reject("x.parquet row group 0 row 1", "no bytes")
        assert [row.data for row in rows] == [data] * 3


@pytest.mark.parametrize("path", sorted(FILES.glob("*.parquet")), ids=lambda p: p.stem)
def test_files_of_other_packages_are_taken(path):
    source = open_source(str(path)).source
    assert source.classes == ("cat", "dog")
    assert [row.label for row in read(source)] == [0, 1, 1, 0]
    assert all(row.data.startswith(b"\x89PNG") for row in read(source))


def test_pandas_with_an_index_and_categories(tmp_path):
    import pandas as pd

    frame = pd.DataFrame(
        {"image": IMAGES, "label": pd.Categorical(["b", None, "a", "b"])},
        index=["w", "x", "y", "z"],
    )
    frame.to_parquet(tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet")).source
    assert source.classes == ("a", "b")
    first, second, third, fourth = read(source)
    assert (first.label, third.label, fourth.label) == (1, 0, 1)
    assert second.reason == "no label"


# --- names


def nested(*names):
    """Images and labels in structs of these names."""
    rows = [{"bytes": data, "path": "x"} for data in IMAGES]
    array = pa.array(rows, STRUCT)
    for name in reversed(names):
        array = pa.StructArray.from_arrays([array], [name])
    return array


@pytest.mark.parametrize(
    ("name", "option", "stored"),
    [
        ("image.jpg", "image.jpg", "image.jpg"),
        ("a.b.c", "a.b.c", "a.b.c"),
        (".image", ".image", ".image"),
        ("my photo", "my photo", "my photo"),
        ("Büld", "Büld", "Büld"),
        ("IMAGE", None, "IMAGE"),
    ],
)
@pytest.mark.parametrize("is_struct", [False, True])
def test_any_name_of_a_column_works_in_training_too(
    tmp_path, name, option, stored, is_struct
):
    """Beside it stand columns whose names begin with the same words."""
    image = nested() if is_struct else pa.array(IMAGES)
    table = pa.table(
        {
            "image": [1] * 4,
            name: image,
            f"{name}.format": ["jpg"] * 4,
            "label": [0, 1, 1, 0],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    if option is None:
        table = table.drop_columns(["image"])
        pq.write_table(table, tmp_path / "x.parquet")
    source, columns = open_source(str(tmp_path / "x.parquet"), image_column=option)
    assert columns.image == (f"{stored}.bytes" if is_struct else stored)
    expected = list(zip((0, 1, 1, 0), IMAGES, strict=True))
    assert pairs(source) == expected
    index_dataset(source, columns, str(tmp_path / "index"))
    rows = list(Dataset.open(tmp_path / "index"))
    assert [(row.label, bytes(row.data)) for row in rows] == expected


def test_columns_in_structs_are_found_by_their_path(tmp_path):
    table = pa.table(
        {
            "sample": nested("image"),
            "meta": [{"label": i, "id": 7} for i in (0, 1, 1, 0)],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    path = str(tmp_path / "x.parquet")
    for image in ("sample.image", "sample.image.bytes", None):
        label = image and "meta.label"
        source, columns = open_source(path, image_column=image, label_column=label)
        assert columns == ("sample.image.bytes", "meta.label")
        assert pairs(source) == list(zip((0, 1, 1, 0), IMAGES, strict=True))


@pytest.mark.parametrize("name", ["label.", "label.image"])
def test_a_list_whose_name_begins_with_another_columns_is_not_that_column(
    tmp_path, name
):
    lists = pa.array([list(image) for image in IMAGES], pa.list_(pa.uint8()))
    table = pa.table({name: lists, "label": [0, 1, 1, 0]})
    pq.write_table(table, tmp_path / "x.parquet")
    source, columns = open_source(str(tmp_path / "x.parquet"), image_column=name)
    assert columns == (name, "label")
    assert pairs(source) == list(zip((0, 1, 1, 0), IMAGES, strict=True))


def test_two_columns_of_one_name_are_refused(tmp_path):
    both = pa.table(
        {
            "a": pa.StructArray.from_arrays([pa.array(IMAGES)], ["b"]),
            "a.b": IMAGES,
            "label": [0, 1, 1, 0],
        }
    )
    pq.write_table(both, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has two columns named a.b: rename one"):
        open_source(str(tmp_path / "x.parquet"), image_column="a.b")
    twice = pa.table([IMAGES, IMAGES, [0, 1, 1, 0]], ["image", "image", "label"])
    pq.write_table(twice, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has two columns named image: rename one"):
        open_source(str(tmp_path / "x.parquet"))


def test_a_path_without_bytes_is_named(tmp_path):
    rows = [
        {"bytes": None, "path": "a/x.jpg"},
        *({"bytes": d, "path": "y"} for d in IMAGES[:2]),
        None,
    ]
    path = write(tmp_path / "x.parquet", pa.array(rows, STRUCT))
    rows = read(open_source(path).source)
    assert [row for row in rows if isinstance(row, Reject)] == [
        Reject("x.parquet row group 0 row 0 (a/x.jpg)", "no bytes, only a path"),
        Reject("x.parquet row group 0 row 3", "no bytes"),
    ]


@pytest.mark.parametrize("options", [{}, {"write_statistics": False}])
def test_rows_of_several_splits_are_refused(tmp_path, options):
    """As a column says: the validation rows would be trained on."""
    rows = {"image": [b"a", b"b"], "label": [0, 1]}
    path = tmp_path / "x.parquet"
    for splits, is_refused in (
        (["train", "test"], True),
        (pa.array(["train", "test"]).dictionary_encode(), True),
        (["train", "train"], False),
        (["a", "b"], False),
        ([None, "val"], False),
        ([None, None], False),
        ([b"\xff", b"train"], False),
        ([1, 2], False),
        ([["train"], ["train", "test"]], False),
    ):
        pq.write_table(pa.table({**rows, "split": splits}), path, **options)
        if is_refused:
            message = (
                r"holds rows of several splits \(test, train\) by its column split, "
                "such as x.parquet: write each split into files of its own"
            )
            with pytest.raises(UserError, match=message):
                open_source(str(path))
        else:
            assert len(open_source(str(path)).source.blocks) == 1


def test_splits_that_cannot_be_read_are_not_taken_for_one(tmp_path):
    path = tmp_path / "x.parquet"
    rows = {"image": [b"a", b"b"], "label": [0, 1], "split": ["train", "test"]}
    pq.write_table(pa.table(rows), path, write_statistics=False, use_dictionary=False)
    start = pq.read_metadata(path).row_group(0).column(2).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 20] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(UserError, match="x.parquet has a column split that cannot be"):
        open_source(str(path))


def test_damaged_statistics_of_splits_do_not_hide_them(tmp_path):
    path = tmp_path / "x.parquet"
    rows = {"image": [b"a", b"b"], "label": [0, 1], "split": ["train", "test"]}
    pq.write_table(pa.table(rows), path)
    data = path.read_bytes()
    start = len(data) - pq.read_metadata(path).serialized_size
    path.write_bytes(data[:start] + data[start:].replace(b"train", b"\xff" * 5))
    with pytest.raises(UserError, match=r"several splits \(test, train\)"):
        open_source(str(path))


# --- encryption


class NoKeys(encryption.KmsClient):
    """Keys that anyone can read."""

    def __init__(self, _):
        encryption.KmsClient.__init__(self)

    def wrap_key(self, key_bytes, _):
        return base64.b64encode(key_bytes)


@pytest.mark.parametrize("plaintext_footer", [True, False])
@pytest.mark.parametrize("column", ["image", "label", "other"])
def test_an_encrypted_file_is_called_what_it_is(tmp_path, plaintext_footer, column):
    config = encryption.EncryptionConfiguration(
        "key", column_keys={"key": [column]}, plaintext_footer=plaintext_footer
    )
    properties = encryption.CryptoFactory(NoKeys).file_encryption_properties(
        encryption.KmsConnectionConfig(), config
    )
    path = tmp_path / "x.parquet"
    table = pa.table({"image": IMAGES, "label": [0, 1, 1, 0], "other": [1] * 4})
    pq.write_table(table, path, encryption_properties=properties)
    with pytest.raises(UserError, match="x.parquet is encrypted: store it without enc"):
        open_source(str(path))
