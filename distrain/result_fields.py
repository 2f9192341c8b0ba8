"""Fields of a config that decide the weights, which a resume may not change."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from distrain.config import Config
from distrain.errors import UserError


def get_result_fields(config: Config) -> dict[str, Any]:
    """Return the fields that decide the weights, by dotted key, as JSON values."""
    tree = config.model_dump(mode="json")
    fields = {}
    for key, _ in _iterate_result_fields(config):
        value: Any = tree
        for name in key.split("."):
            value = value[name]
        fields[key] = value
    return fields


def get_result_defaults(config: Config) -> dict[str, Any]:
    """Return the defaults of the result fields that have one, as JSON values."""
    defaults = {}
    for key, info in _iterate_result_fields(config):
        if info.is_required():
            continue
        # A user's own class may use default factories; one that reads the fields before
        # its own gets none.
        default = info.get_default(call_default_factory=True, validated_data={})
        defaults[key] = to_jsonable_python(default)
    return defaults


def check_result_fields(config: Config, saved_fields: Mapping[str, Any]) -> None:
    """Check that the fields that decide the weights are those that a run began with.

    Only `epochs` may be raised, under a schedule that does not depend on it.

    Args:
        config: config to resume the run with.
        saved_fields: the run's own, of its checkpoint or config. A field that is not
            among them, because it is newer, counts as its default.

    Raises:
        UserError: lists the fields that differ.
    """
    # With the defaults first, fields that the checkpoint has win over them.
    current = get_result_fields(config)
    saved = {**get_result_defaults(config), **saved_fields}

    def show(fields: Mapping[str, Any], key: str) -> str:
        # Another optimizer or schedule has other fields.
        return repr(fields[key]) if key in fields else "no such field"

    changed_keys = [
        key
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    reason = ""
    if "epochs" in changed_keys:
        reason = _explain_fixed_epochs(config, saved["epochs"])
        if not reason:
            changed_keys.remove("epochs")
    if changed_keys:
        differences = [
            f"\n  - {key}: {show(saved, key)} before, {show(current, key)} now"
            f"{reason if key == 'epochs' else ''}"
            for key in changed_keys
        ]
        raise UserError(
            f"{config.run} was trained with other settings:{''.join(differences)}\n"
            "change them back to resume it, or start afresh in another run directory "
            "with run=..."
        )


def _explain_fixed_epochs(config: Config, saved_epochs: int) -> str:
    """Return why `epochs` may not become the config's; empty: it may."""
    schedule = config.schedule
    if schedule.depends_on_length:
        return f" (the learning rate of schedule {schedule.name} depends on it)"
    if config.epochs < saved_epochs:
        return " (it may be raised, but not lowered)"
    return ""


def _iterate_result_fields(config: Config) -> Iterator[tuple[str, FieldInfo]]:
    for key, info in _iterate_fields(config):
        marks = info.json_schema_extra
        # A user's own class may leave fields unmarked: to be safe they count as result.
        if not isinstance(marks, dict) or marks.get("decides", "result") == "result":
            yield key, info


def _iterate_fields(
    section: BaseModel,
    prefix: str = "",
) -> Iterator[tuple[str, FieldInfo]]:
    """Iterate over every field that is not a section: (dotted key, field)."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _iterate_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, info
