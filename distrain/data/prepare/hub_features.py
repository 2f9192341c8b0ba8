"""Which columns of a Parquet file hold images and labels, and how they are stored."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import pyarrow as pa

from distrain.data.prepare.class_numbers import CONVERT
from distrain.data.shards.parquet import ColumnNames, Footer, find_leaves
from distrain.errors import UserError

LabelKind: TypeAlias = Literal["numbers", "text", "booleans"]
_IMAGE_NAME = "image"
_LABEL_NAME = "label"
_LABEL_NAMES = {
    "category",
    "class",
    "class_id",
    "class_name",
    "cls",
    "coarse_label",
    "fine_label",
    "label",
    "label_id",
    "labels",
    "target",
    "targets",
}
"""Names of columns that hold labels, where the metadata does not tell."""


class HubFeatures(NamedTuple):
    """Columns and classes of a file, partly from the hub's metadata in it."""

    columns: ColumnNames
    classes: tuple[str, ...] | None
    """Names by label, if the file has them."""
    label_kind: LabelKind | None
    """What the labels are; None: every label is missing."""
    notes: list[str]
    """Columns that were taken although nothing names them: one sentence each."""


class _Field(NamedTuple):
    name: str
    """Path in the schema, joined by dots."""
    type: Any
    is_tensor: bool
    """Whether an extension, such as Ray's tensors, stores arrays in it."""


def find_features(
    footer: Footer,
    file_name: str,
    image_column: str | None = None,
    label_column: str | None = None,
) -> HubFeatures:
    """Find the columns of images and labels, and the class names.

    The columns are those given, else those in the hub's metadata, else `image` and
    `label`, else the only ones that can be meant, with a note.

    Args:
        footer: footer of the file.
        file_name: name of the file, for messages.
        image_column: column of images, if the user names one.
        label_column: column of labels, if the user names one.

    Raises:
        UserError: a column is missing or has a wrong type, or several are possible.
    """
    # Choose the columns.
    fields = _list_fields(footer.schema.to_arrow_schema())
    hub_features = _read_hub_features(footer)
    notes: list[str] = []
    image_path = find_image_path(footer, file_name, notes, image_column)
    if not label_column:
        candidates = [
            field.name
            for field in fields
            if field.name.rpartition(".")[2].casefold() in _LABEL_NAMES
            and _find_label_kind(field.type) is not None
        ]
        label_column = _choose_column(
            hub_features,
            "ClassLabel",
            _LABEL_NAME,
            fields,
            candidates,
            file_name,
            notes,
        )

    # Check that they exist, and their types.
    label_field = _find_field(fields, label_column, file_name)
    label_type = label_field.type
    label_kind = _find_label_kind(label_type)
    if label_kind is None and not pa.types.is_null(label_type):
        raise UserError(
            f"column {label_column} of {file_name} does not hold labels, its type is "
            f"{label_type}: {CONVERT}"
        )
    _check_single(footer, label_field.name, file_name)

    columns = ColumnNames(image_path, label_field.name)
    classes = None
    if label_kind in ("numbers", None):
        classes = _find_class_names(hub_features, label_column)
    return HubFeatures(columns, classes, label_kind, notes)


def find_image_path(
    footer: Footer,
    file_name: str,
    notes: list[str],
    image_column: str | None = None,
) -> str:
    """Return the Parquet path of the image files, in the column that holds images.

    Args:
        footer: footer of the file.
        file_name: name of the file, for messages.
        notes: gets a sentence if a column is taken although nothing names it.
        image_column: column of images, if the user names one.

    Raises:
        UserError: the column is missing or has a wrong type, or several are possible.
    """
    fields = _list_fields(footer.schema.to_arrow_schema())
    if not image_column:
        candidates = [field.name for field in fields if _could_be_images(field, footer)]
        image_column = _choose_column(
            _read_hub_features(footer),
            "Image",
            _IMAGE_NAME,
            fields,
            candidates,
            file_name,
            notes,
        )
    image_field = _find_field(fields, image_column, file_name)
    image_path = _find_bytes_path(image_field, file_name)
    _check_single(footer, image_path, file_name)
    return image_path


def _check_single(footer: Footer, path: str, file_name: str) -> None:
    """Raise UserError if two columns of a file have one name."""
    if len(find_leaves(footer, path)) != 1:
        raise UserError(f"{file_name} has two columns named {path}: rename one")


def _list_fields(schema: Any) -> list[_Field]:
    """Return the columns of a schema, and the fields of those that are structs."""
    fields: list[_Field] = []

    def add_fields(parent: Any, prefix: str) -> None:
        for i in range(len(parent) if prefix == "" else parent.num_fields):
            field = parent.field(i)
            name = f"{prefix}{field.name}"
            fields.append(_Field(name, field.type, _is_tensor(field)))
            if pa.types.is_struct(field.type):
                add_fields(field.type, f"{name}.")

    add_fields(schema, "")
    return fields


def _is_tensor(field: Any) -> bool:
    """Return whether a field's extension type gives its lists another meaning."""
    # Only an extension that is registered shows in the type.
    is_extension = isinstance(field.type, pa.BaseExtensionType)
    if b"ARROW:extension:name" in (field.metadata or {}):
        is_extension = True
    return is_extension and _is_list(_get_value_type(field.type))


def _read_hub_features(footer: Footer) -> dict[str, Mapping[str, object]]:
    """Return the features in the hub's metadata by name; nested names have dots."""
    # Any file may have this key, so the values are checked where they are used.
    try:
        tree = json.loads(footer.metadata[b"huggingface"])
        features = tree["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        # The file has no metadata of the hub, or something else under its key.
        return {}
    found: dict[str, Mapping[str, object]] = {}

    def add_features(parent: object, prefix: str) -> None:
        if not isinstance(parent, dict):
            return
        for name, feature in parent.items():
            if isinstance(feature, dict) and isinstance(feature.get("_type"), str):
                found[f"{prefix}{name}"] = feature
            else:
                add_features(feature, f"{prefix}{name}.")

    add_features(features, "")
    return found


def _choose_column(
    hub_features: Mapping[str, Mapping[str, object]],
    feature_type: str,
    default: str,
    fields: Sequence[_Field],
    candidates: Sequence[str],
    file_name: str,
    notes: list[str],
) -> str:
    """Return the column of images or of labels.

    Args:
        hub_features: features in the hub's metadata.
        feature_type: type of the column there.
        default: name of the column without metadata.
        fields: columns of the file.
        candidates: columns whose names and types would do.
        file_name: name of the file, for messages.
        notes: gets a sentence if a column is taken although nothing names it.

    Raises:
        UserError: several columns, or none, can be meant.
    """
    # The metadata names it.
    columns = [
        name
        for name, feature in hub_features.items()
        if feature.get("_type") == feature_type
    ]
    if default in columns:
        return default
    if len(columns) > 1:
        raise UserError(
            f"{file_name} has several columns of {default}s, {', '.join(columns)}: "
            f"choose one with {default}_column"
        )
    if columns:
        return columns[0]

    # It has the usual name, or no other can be meant.
    if any(field.name == default for field in fields):
        return default
    if len(candidates) == 1:
        notes.append(
            f"{default}s are read from column {candidates[0]}, the only one that may "
            f"hold them: choose another with {default}_column"
        )
        return candidates[0]
    if candidates:
        raise UserError(
            f"{file_name} has several columns that may hold {default}s, "
            f"{', '.join(candidates)}: choose one with {default}_column"
        )
    return default


def _find_field(fields: Sequence[_Field], column: str, file_name: str) -> _Field:
    """Return the field of a name. Raises UserError if there is none, or two."""
    found = [field for field in fields if field.name == column]
    if len(found) > 1:
        raise UserError(f"{file_name} has two columns named {column}: rename one")
    if not found:
        names = [field.name for field in fields if "." not in field.name]
        names += [field.name for field in fields if "." in field.name]
        raise UserError(
            f"{file_name} has no column {column}: name the columns with "
            f"image_column and label_column; it has {', '.join(names)}"
        )
    return found[0]


# --- types of images


def _could_be_images(field: _Field, footer: Footer) -> bool:
    """Return whether a column can be meant, though its name does not say so."""
    if pa.types.is_struct(field.type):
        return _holds_bytes(_find_field_type(field.type, "bytes"))
    if field.is_tensor:
        return False
    # What lies in a struct is meant by its `bytes`; short fixed bytes are hashes.
    if field.name not in footer.schema.to_arrow_schema().names:
        return False
    return _holds_bytes(field.type) and not pa.types.is_fixed_size_binary(field.type)


def _find_field_type(struct: Any, name: str) -> Any:
    """Return the type of a struct's field, or None."""
    index = struct.get_field_index(name)
    return struct.field(index).type if index >= 0 else None


def _get_value_type(column_type: Any) -> Any:
    """Return the type of the values of a dictionary or of an extension type."""
    if isinstance(column_type, pa.BaseExtensionType):
        column_type = column_type.storage_type
    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    return column_type


def _is_list(column_type: Any) -> bool:
    return bool(
        pa.types.is_list(column_type)
        or pa.types.is_large_list(column_type)
        or pa.types.is_fixed_size_list(column_type)
    )


def _holds_bytes(column_type: Any) -> bool:
    """Return whether values of a type are bytes, or lists of them."""
    if column_type is None:
        return False
    value_type = _get_value_type(column_type)
    if _is_list(value_type):
        return value_type.value_type in (pa.uint8(), pa.int8())
    return bool(
        pa.types.is_binary(value_type)
        or pa.types.is_large_binary(value_type)
        or pa.types.is_binary_view(value_type)
        or pa.types.is_fixed_size_binary(value_type)
    )


def _find_bytes_path(field: _Field, file_name: str) -> str:
    """Return the Parquet path of the image files in a column. Raises UserError."""
    column_type = field.type
    if _holds_bytes(column_type) and not field.is_tensor:
        return field.name
    if pa.types.is_struct(column_type):
        bytes_type = _find_field_type(column_type, "bytes")
        if _holds_bytes(bytes_type):
            return f"{field.name}.bytes"
    raise UserError(
        f"column {field.name} of {file_name} does not hold image files: "
        f"{_describe_type(column_type)}; choose another with image_column"
    )


def _describe_type(column_type: Any) -> str:
    """Return what a column holds that holds no image files."""
    value_type = _get_value_type(column_type)
    if _is_text(value_type):
        return "it holds text, such as paths or base64"
    if _is_list(value_type):
        inner_type = value_type.value_type
        is_file = not _is_list(inner_type) and _holds_bytes(inner_type)
        if is_file or pa.types.is_struct(inner_type):
            return "it holds several images per row"
        return "it holds lists of numbers, such as pixels"
    if pa.types.is_struct(value_type):
        names = [field.name for field in value_type]
        if "height" in names and "data" in names:
            return "it holds decoded pixels, as Spark stores images"
        return f"it has the fields {', '.join(names)}, and no bytes among them"
    return f"its type is {column_type}"


# --- types of labels


def _is_text(value_type: Any) -> bool:
    return bool(
        pa.types.is_string(value_type)
        or pa.types.is_large_string(value_type)
        or pa.types.is_string_view(value_type)
    )


def _find_label_kind(column_type: Any) -> LabelKind | None:
    """Return what kind of labels a type holds; None: no labels."""
    value_type = _get_value_type(column_type)
    if pa.types.is_boolean(value_type):
        return "booleans"
    # pandas stores integers as floats where some are missing.
    if pa.types.is_integer(value_type) or pa.types.is_floating(value_type):
        return "numbers"
    # Some writers do not mark text as text.
    if (
        _is_text(value_type)
        or pa.types.is_binary(value_type)
        or pa.types.is_large_binary(value_type)
        or pa.types.is_binary_view(value_type)
    ):
        return "text"
    return None


def _find_class_names(
    hub_features: Mapping[str, Mapping[str, object]], label_column: str
) -> tuple[str, ...] | None:
    """Return the class names in the hub's metadata, if it has any."""
    names = hub_features.get(label_column, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else None
