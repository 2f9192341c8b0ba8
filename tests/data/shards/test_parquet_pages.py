import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.data.shards.parquet_pages import DamagedParquetError, measure_pages


def column_of(values, **options):
    """The bytes of a column, and its entry in the footer."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": pa.array(values, pa.binary())}), sink, **options)
    chunk = pq.read_metadata(sink).row_group(0).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    end = start + chunk.total_compressed_size
    return sink.getvalue()[start:end], chunk


values = st.lists(st.none() | st.binary(max_size=300), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(
    values,
    st.sampled_from(["1.0", "2.0"]),
    st.sampled_from(["none", "zstd", "snappy"]),
    st.sampled_from([True, False]),
    st.sampled_from(["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"]),
    st.integers(1, 500),
    st.booleans(),
)
def test_pages_are_measured_by_their_headers(
    found, version, compression, use_dictionary, encoding, page_size, has_checksum
):
    options = {} if use_dictionary else {"column_encoding": {"x": encoding}}
    data, chunk = column_of(
        found,
        data_page_version=version,
        compression=compression,
        use_dictionary=use_dictionary,
        data_page_size=page_size,
        write_batch_size=3,
        write_page_checksum=has_checksum,
        **options,
    )
    sizes = measure_pages(data, chunk.num_values)
    assert sizes.num_values == len(found)
    # The footer counts headers too, which a few values cannot outgrow.
    assert 0 <= chunk.total_uncompressed_size - sizes.total_bytes < len(data) + 700
    largest = max(len(value or b"") for value in found)
    assert largest <= sizes.max_page_bytes <= sizes.total_bytes


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_pages_are_an_error_of_one_kind(draw):
    data, chunk = column_of([b"abc", b"d", b"abc"] * 5)
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        i = draw.draw(st.integers(0, len(data) - 1))
        damaged[i] = draw.draw(st.integers(0, 255))
    try:
        sizes = measure_pages(bytes(damaged), chunk.num_values)
    except DamagedParquetError:
        return
    assert sizes.total_bytes >= 0


@pytest.mark.parametrize(
    "data",
    [
        b"\x1c" * 100_000,  # Structs in structs.
        b"\x19" * 100_000,  # Lists of lists.
        b"\x18\xff\xff\xff\xff\x0f",  # Text that is longer than the file.
        b"\x15" + b"\xff" * 10 + b"\x15\x00\x15\x00\x00",  # An endless number.
        b"\x15\x00\x15\x01\x15\x00\x2c\x15\x0a\x00\x00",  # A page of -1 bytes.
        b"\x15\x04\x15\x02\x15\x00\x4c\x15\xf0\x01\x00\x00",  # 120 entries in a byte.
    ],
)
def test_headers_that_lead_nowhere(data):
    with pytest.raises(DamagedParquetError):
        measure_pages(data, 5)


def test_a_page_that_is_cut_off_is_damaged():
    data, chunk = column_of([b"abc", b"d"], use_dictionary=False, compression="none")
    with pytest.raises(DamagedParquetError, match="a page is cut off"):
        measure_pages(data[:-1], chunk.num_values)


def test_a_long_list_in_a_header_is_passed_over():
    """Field 9, a list of 16 integers, then a data page of 5 values in no bytes."""
    header = b"\x15\x00\x15\x00\x15\x00\x2c\x15\x0a\x00"
    long_list = b"\x49\xf5\x10" + b"\x7f" * 16
    assert measure_pages(header + long_list + b"\x00", 5) == (0, 0, 5)
