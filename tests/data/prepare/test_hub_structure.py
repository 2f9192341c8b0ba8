"""Parquet of random structure, against what was written."""

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrain.data.prepare.open import open_source
from distrain.errors import UserError

CELLS = {
    "bytes": (pa.binary(), lambda data: data),
    "large bytes": (pa.large_binary(), lambda data: data),
    "lists": (pa.list_(pa.uint8()), lambda data: None if data is None else list(data)),
    "struct": (
        pa.struct([("path", pa.string()), ("bytes", pa.binary())]),
        lambda data: {"bytes": data, "path": None},
    ),
}
LABEL_TYPES = {
    "numbers": (st.integers(0, 3), [pa.int8(), pa.uint64(), pa.float32()]),
    "text": (
        st.text(st.sampled_from("ab é.0"), max_size=2),
        [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
    ),
}
NAMES = st.text(st.sampled_from("ab.é "), min_size=1, max_size=3)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_structure_gives_the_rows_that_were_written(tmp_path, draw):
    """Random names, types, nesting, encodings and row groups, in several files."""
    kind = draw.draw(st.sampled_from(sorted(LABEL_TYPES)))
    cell = draw.draw(st.sampled_from(sorted(CELLS)))
    names = draw.draw(st.lists(NAMES, min_size=3, max_size=3, unique=True))
    prefix = draw.draw(st.none() | NAMES)
    column_type, to_cell = CELLS[cell]
    values, label_types = LABEL_TYPES[kind]

    # Write files, and list what a reader should find in them.
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    expected = []
    for i in range(draw.draw(st.integers(1, 3))):
        row = st.tuples(st.none() | st.binary(max_size=40), st.none() | values)
        rows = draw.draw(st.lists(row, min_size=1, max_size=12))
        expected += rows
        columns = [
            pa.array([to_cell(data) for data, _ in rows], column_type),
            pa.array(
                [label for _, label in rows], draw.draw(st.sampled_from(label_types))
            ),
            pa.array(range(len(rows))),
        ]
        table = pa.table(columns, names)
        if prefix is not None:
            order = draw.draw(st.permutations(names))
            structs = table.select(order).to_struct_array().combine_chunks()
            table = pa.table({prefix: structs})
        pq.write_table(
            table,
            folder / f"{i}.parquet",
            row_group_size=draw.draw(st.integers(1, 5)),
            use_dictionary=draw.draw(st.booleans()),
            data_page_version=draw.draw(st.sampled_from(["1.0", "2.0"])),
            compression=draw.draw(st.sampled_from(["none", "snappy", "zstd"])),
        )

    # Compare with the source, unless it is refused for what the labels are.
    head = "" if prefix is None else f"{prefix}."
    labels = [
        None if label == "" or (kind == "text" and not (label or "").strip()) else label
        for _, label in expected
    ]
    known = {label for label in labels if label is not None}
    options = {"image_column": head + names[0], "label_column": head + names[1]}
    if (
        not known
        or (kind == "text" and len(known) < 2)
        or (kind == "numbers" and max(known) < 1)
    ):
        with pytest.raises(UserError, match="has no labels|holds one class"):
            open_source(str(folder), **options)
        return
    source = open_source(str(folder), **options).source
    found = [row for block in source.blocks for row in source.reader.read_block(block)]
    assert len(found) == len(expected)
    for (data, _), label, row in zip(expected, labels, found, strict=True):
        if not data:
            assert row.reason == "no bytes"
        elif label is None:
            assert row.reason == "no label"
        else:
            assert (row.data, source.classes[row.label]) == (data, str(label))
