"""Random Parquet files of images and labels, read by pyarrow as whole tables."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from structure.common import Found, Kind, Reading, Refusal, label_data, make_pool

_STRUCT = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
_HUB_STRUCT = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
IMAGE_TYPES = {
    "bytes": pa.binary(),
    "large bytes": pa.large_binary(),
    "view": pa.binary_view(),
    "list": pa.list_(pa.uint8()),
    "large list": pa.large_list(pa.uint8()),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
    "struct": _STRUCT,
    "hub struct": _HUB_STRUCT,
}
NUMBER_TYPES = (
    pa.int8(), pa.uint8(), pa.int16(), pa.int32(), pa.int64(), pa.uint64(),
    pa.float32(), pa.float64(),
)  # fmt: skip
TEXT_TYPES = (
    pa.string(), pa.large_string(), pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string()),
)  # fmt: skip
LABELS: dict[str, tuple[Any, ...]] = {
    "numbers": (0, 1, 2, 3, 11, None),
    "text": ("cat", "dog", "golden retriever", "\u00e9", "10", "9", "", " ", None),
    "booleans": (True, False, None),
}
CLASS_NAMES = ("ant", "bee", "golden eagle")
EXTRA: dict[str, Callable[[int], pa.Array]] = {
    "id": lambda n: pa.array(range(n)),
    "score": lambda n: pa.array([0.5] * n),
    "text.of": lambda n: pa.array(["a b"] * n),
    "boxes": lambda n: pa.array([[1.0, 2.0]] * n),
    "meta": lambda n: pa.array([{"a": 1, "b": "x"}] * n),
    "imag": lambda n: pa.array([None] * n, pa.string()),
    "image_url": lambda n: pa.array(["http://x"] * n),
}


class File(NamedTuple):
    """Rows of a file, and how they are stored."""

    rows: list[tuple[int | None, Any]]
    """Image of the pool (-1: no bytes; None: missing) and label."""
    image_type: str
    label_type: pa.DataType
    extra: tuple[str, ...]
    group_rows: int
    options: dict[str, Any]


class Table(NamedTuple):
    """Files of one source."""

    files: list[File]
    naming: str
    """default, options, metadata or only."""
    image_name: str
    label_name: str
    prefix: str | None
    has_classes: bool


_NAMES = st.text(st.sampled_from("ab.\u00e9 "), min_size=1, max_size=3)


@st.composite
def _files(
    draw: st.DrawFn, kind: str, image_types: list[str], has_classes: bool
) -> File:
    images = st.sampled_from((*range(40), *range(40), -1, None))
    values = (0, 1, 2, -1, None, 7) if has_classes else LABELS[kind]
    if kind == "numbers" and not has_classes and draw(st.booleans()):
        values = (0, 1, 2, -1)
    # Most labels come from a few values.
    few = values[: draw(st.integers(2, len(values)))]
    rows = draw(st.lists(st.tuples(images, st.sampled_from(few)), max_size=10))
    label_type = pa.bool_()
    if has_classes:
        label_type = pa.int64()
    elif kind == "numbers":
        label_type = draw(st.sampled_from(NUMBER_TYPES))
    elif kind == "text":
        label_type = draw(st.sampled_from(TEXT_TYPES))
    if label_type in (pa.uint8(), pa.uint64()):
        rows = [(image, None if label == -1 else label) for image, label in rows]
    options = {
        "use_dictionary": draw(st.booleans()),
        "data_page_version": draw(st.sampled_from(("1.0", "2.0"))),
        "compression": draw(st.sampled_from(("none", "snappy", "zstd", "gzip"))),
        "write_statistics": draw(st.booleans()),
        "data_page_size": draw(st.sampled_from((100, 2000, 1 << 20))),
    }
    return File(
        rows,
        draw(st.sampled_from(image_types)),
        label_type,
        tuple(draw(st.lists(st.sampled_from(sorted(EXTRA)), max_size=2, unique=True))),
        draw(st.integers(1, 6)),
        options,
    )


@st.composite
def table_cases(draw: st.DrawFn) -> Table:
    """One to three files; now and then their labels are of two kinds."""
    naming = draw(
        st.sampled_from(("default", "default", "options", "metadata", "only"))
    )
    names = ("image", "label")
    prefix = None
    if naming == "only":
        names = (draw(st.sampled_from(("img", "jpg"))), "category")
    elif naming != "default":
        first, second = draw(st.lists(_NAMES, min_size=2, max_size=2, unique=True))
        names = (first, second)
    if naming == "options":
        prefix = draw(st.none() | _NAMES)
    has_classes = naming == "metadata"
    kind = draw(st.sampled_from(sorted(LABELS)))
    storage = _get_storage(draw(st.sampled_from(sorted(IMAGE_TYPES))))
    image_types = [name for name in IMAGE_TYPES if _get_storage(name) == storage]
    if not draw(st.integers(0, 15)):
        image_types = sorted(IMAGE_TYPES)
    files: list[File] = []
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        other = draw(st.sampled_from((kind, *[kind] * 9, *sorted(LABELS))))
        files.append(draw(_files(other, image_types, has_classes)))
    return Table(files, naming, *names, prefix, has_classes)


def _get_storage(image_type: str) -> str:
    """Where a column holds its images: this is the same in all files of a source."""
    return "struct" if "struct" in image_type else "column"


def _make_cell(image: int | None, image_type: str) -> Any:
    data = None if image is None else b"" if image < 0 else make_pool()[image]
    if "list" in image_type:
        return None if data is None else list(data)
    if "struct" in image_type:
        return {"bytes": data, "path": None}
    return data


def _hub_metadata(case: Table) -> dict[bytes, bytes]:
    label = {"_type": "ClassLabel", "names": list(CLASS_NAMES)}
    features = {case.image_name: {"_type": "Image"}, case.label_name: label}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def _make_table(case: Table, file: File) -> pa.Table:
    cells = [_make_cell(image, file.image_type) for image, _ in file.rows]
    image_type = IMAGE_TYPES[file.image_type]
    columns = {
        name: EXTRA[name](len(cells))
        for name in file.extra
        if name not in (case.image_name, case.label_name)
    }
    columns[case.image_name] = pa.array(cells, image_type)
    labels = [label for _, label in file.rows]
    columns[case.label_name] = pa.array(labels, file.label_type)
    table = pa.table(dict(reversed(columns.items())))
    if case.prefix is not None:
        # pyarrow does not write views in structs.
        for view, plain in (
            (pa.binary_view(), pa.binary()),
            (pa.string_view(), pa.string()),
        ):
            fields = [
                field.with_type(plain) if field.type == view else field
                for field in table.schema
            ]
            table = table.cast(pa.schema(fields))
        table = pa.table({case.prefix: table.to_struct_array()})
    if case.has_classes:
        table = table.replace_schema_metadata(_hub_metadata(case))
    return table


def write_tables(case: Table, folder: Path) -> dict[str, Any]:
    """Write the files; returns the options that name their columns."""
    for i, file in enumerate(case.files):
        table = _make_table(case, file)
        path = folder / f"{i}.parquet"
        pq.write_table(table, path, row_group_size=file.group_rows, **file.options)
    head = "" if case.prefix is None else f"{case.prefix}."
    options = {"url": str(folder)}
    if case.naming == "options":
        options["image_column"] = head + case.image_name
        options["label_column"] = head + case.label_name
    return options


def _read_image(cell: Any) -> bytes:
    if isinstance(cell, dict):
        cell = cell["bytes"]
    return bytes(cell or b"")


def _read_label(value: Any) -> Any:
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value)
    if isinstance(value, str):
        return value if value.strip() else None
    is_negative = isinstance(value, int) and value < 0
    return None if is_negative else value


def read_tables(case: Table, options: dict[str, Any]) -> Reading | Refusal:
    """Read each file whole; rows without an image or a label are left out."""
    root = Path(options["url"])
    rows: list[tuple[str, bytes, Any]] = []
    refusal = Refusal([str(root)])
    for path in sorted(root.iterdir()):
        table = pq.read_table(path)
        if case.prefix is not None:
            structs = table.column(case.prefix).to_pylist()
            images = [row[case.image_name] for row in structs]
            labels = [row[case.label_name] for row in structs]
        else:
            images = table.column(case.image_name).to_pylist()
            labels = table.column(case.label_name).to_pylist()
        for image, label in zip(images, labels, strict=True):
            rows.append((path.name, _read_image(image), _read_label(label)))

    # Files of labels or images of two kinds are no set. One without rows may have any
    # columns, beside others.
    files = [file for file in case.files if file.rows] or case.files
    kinds = {_get_kind(file.label_type) for file in files}
    storages = {_get_storage(file.image_type) for file in files}
    if len(kinds) > 1 or len(storages) > 1:
        return Refusal(["1.parquet", "2.parquet"])
    known = {label for *_, label in rows if label is not None}
    if not known:
        return refusal
    if case.has_classes:
        classes = CLASS_NAMES
    elif "numbers" in kinds:
        classes = tuple(str(i) for i in range(max(known) + 1))
    else:
        classes = tuple(sorted(str(label) for label in known))
    if len(classes) < 2:
        return refusal

    images_found: list[Found] = []
    rejects: list[str] = []
    for file, data, label in rows:
        is_good = bool(data) and label is not None
        if case.has_classes and is_good and label >= len(classes):
            is_good = False
        if not is_good:
            rejects.append(file)
            continue
        name = classes[label] if case.has_classes else str(label)
        images_found.append(Found("", name, label_data(data)))
    mentions: list[str] = []
    if case.naming == "only":
        mentions = [case.image_name, case.label_name]
    return Reading(images_found, classes, rejects, mentions)


def _get_kind(label_type: pa.DataType) -> str:
    if label_type == pa.bool_():
        return "booleans"
    return "numbers" if label_type in NUMBER_TYPES else "text"


PARQUET = Kind(table_cases(), write_tables, read_tables, has_names=False)
