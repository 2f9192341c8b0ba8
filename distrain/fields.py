"""Building blocks of a config's sections: marked fields, and choices by name."""

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def result_field(default: Any = ..., **limits: Any) -> Any:
    """Declare a field that decides the weights: a resume may not change it.

    Args:
        default: default value; without one, a config must set the field.
        limits: pydantic's constraints, such as ge=0.
    """
    return Field(default, json_schema_extra={"decides": "result"}, **limits)


def operation_field(default: Any = ..., **limits: Any) -> Any:
    """Declare a field that does not decide the weights: it may change at any time.

    Args:
        default: default value; without one, a config must set the field.
        limits: pydantic's constraints, such as ge=0.
    """
    return Field(default, json_schema_extra={"decides": "operation"}, **limits)


def make_conflict(message: str, *fields: str) -> PydanticCustomError:
    """Make the error, for a validator to raise, of a check across fields.

    Args:
        message: complete sentence, with the remedy.
        fields: dotted keys that the check depends on, as seen from the section whose
            validator it is; messages name the override that set one of them.
    """
    return PydanticCustomError(
        "conflict",
        "{message}",
        {"message": message, "fields": fields},
    )


class Section(BaseModel):
    """Section of a config: frozen, strict about types, without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        # No conversions: `seed: "1"` and `seed: true` are mistakes, not numbers.
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        # The docstring below a field becomes its description.
        use_attribute_docstrings=True,
    )


class CommandSection(Section):
    """Config of a command that uses only some sections and fields of a recipe."""

    command: ClassVar[str]
    """Command, for messages."""


class Choice(Section):
    """Section that has several implementations, of which a config names one.

    A direct subclass is a kind of choice, such as `Loss`; classes below it are its
    implementations. `class L1(Loss, name="l1")` is known by that name as soon as its
    module is imported; any other class is named as `package.module:Class`. The abstract
    methods of a kind are what each implementation must provide. Reading a config loads
    no torch: implementations import it inside their methods.
    """

    default_name: ClassVar[str | None] = None
    """Implementation used where a config names none; None: the config must name one."""
    import_syntax: ClassVar[str] = "package.module:Class"
    """Syntax, for messages, of an implementation that has no registered name."""
    registry: ClassVar[dict[str, type["Choice"]]]
    """Implementations by registered name; each kind has its own registry."""
    config_name: ClassVar[str]
    """Name of this implementation in a config."""

    name: str = result_field()
    """Implementation to use. [result]"""

    @classmethod
    def __pydantic_init_subclass__(
        cls,
        *,
        name: str | None = None,
        **_: Any,
    ) -> None:
        # A direct subclass is a kind: it gets a registry of its own.
        if Choice in cls.__bases__:
            cls.registry = {}
        cls.config_name = name or f"{cls.__module__}:{cls.__qualname__}"
        if name is None:
            return
        # A module that is imported again defines the same class again: that is allowed.
        registered = cls.registry.get(name, cls)
        is_same_class = (
            registered.__module__ == cls.__module__
            and registered.__qualname__ == cls.__qualname__
        )
        assert is_same_class, f"two classes are registered as {name}"
        cls.registry[name] = cls

    # Python passes the keywords of a class statement here too: `name` ends here, since
    # pydantic's own hook would not take it.
    def __init_subclass__(
        cls,
        *,
        name: str | None = None,
        **_: Any,
    ) -> None:
        super().__init_subclass__()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name = value.get("name", cls.config_name)
        # Two different import paths are fine: one class may be reachable by several,
        # and ImportedModel stands for every callable.
        are_import_paths = ":" in str(name) and ":" in cls.config_name
        if name != cls.config_name and not are_import_paths:
            raise ValueError(f"name must be {cls.config_name}, not {name!r}: remove it")
        # Other ranks import the class by its name, but a class of the main script or of
        # a function exists in this process only.
        if str(name).startswith("__main__:") or "<locals>" in str(name):
            raise ValueError(
                f"{name} cannot be imported by other processes: "
                "define it at the top level of a module"
            )
        return {**value, "name": name}

    @classmethod
    def parse_choice(cls, value: Any) -> Any:
        """Build the implementation that a tree of plain values names.

        Meant for a pydantic `BeforeValidator`. An instance of the kind is returned as
        it is.

        Raises:
            PydanticCustomError: the value is not a section, or names no implementation.
            ValidationError: a field of the implementation is not valid.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            # A URL is no name, and may hold a secret.
            is_name = isinstance(value, str) and "://" not in value
            example = f", such as {{name: {value}}}" if is_name else ""
            raise PydanticCustomError(
                "no_section",
                "must be a section{example}, not {value}",
                {"example": example, "value": repr(value)},
            )
        name = value.get("name", cls.default_name)
        chosen = cls.find_class(name)
        # A class with a registered name goes by that, even if the config has its import
        # path; a class without keeps the path that the config names it by.
        if ":" not in chosen.config_name:
            name = chosen.config_name
        return chosen.model_validate({**value, "name": name})

    @classmethod
    def find_class(cls, name: Any) -> type["Choice"]:
        """Return the implementation of a name. Raises PydanticCustomError."""
        # A URL is not an import path: an error of the import would show its secret.
        if isinstance(name, str) and ":" in name and "://" not in name:
            return cls._find_external_class(name)
        if isinstance(name, str) and name in cls.registry:
            return cls.registry[name]
        known = ", ".join([*sorted(cls.registry), cls.import_syntax])
        if name is None:
            raise PydanticCustomError(
                "no_name", "is missing: use one of {known}", {"known": known}
            )
        raise PydanticCustomError(
            "no_choice",
            "must be one of {known}, not {name}",
            {"known": known, "name": repr(name)},
        )

    @classmethod
    def list_classes(cls) -> list[type[BaseModel]]:
        """List every registered implementation, each once."""
        return list(dict.fromkeys(cls.registry.values()))

    @classmethod
    def _find_external_class(cls, name: str) -> type["Choice"]:
        try:
            imported = import_attribute(name)
        except ValueError as error:
            raise _make_choice_error(name, str(error)) from None
        # Refuse what is not an implementation of this kind.
        if not isinstance(imported, type) or not issubclass(imported, cls):
            base = f"{cls.__module__}.{cls.__name__}"
            raise _make_choice_error(name, f"is not a subclass of {base}: make it one")
        # Refuse an incomplete one here, where the missing methods can be named.
        if inspect.isabstract(imported):
            missing = ", ".join(sorted(imported.__abstractmethods__))
            raise _make_choice_error(
                name,
                f"does not implement {missing}: {cls.__name__} requires it",
            )
        return imported


def _make_choice_error(name: str, reason: str) -> PydanticCustomError:
    return PydanticCustomError(
        "no_choice",
        "{name} {reason}",
        {"name": name, "reason": reason},
    )


def import_attribute(name: str) -> Any:
    """Import `package.module:attribute`; the working directory is searched too.

    Raises:
        ValueError: it cannot be imported; the message follows the name in a sentence.
    """
    module, _, attribute = name.partition(":")
    # The command `distrain` does not have the working directory in its path. It goes
    # last, so that no file there hides an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        if module.endswith(".py"):
            raise ValueError(
                "cannot be imported: name the module, not its file, as "
                f"{Path(module).stem}:{attribute}, and start distrain in its folder"
            ) from None
        raise ValueError(
            f"cannot be imported ({format_error(error)}): "
            "install its package on every node, or start distrain in its folder"
        ) from None
    # Importing runs the user's module, which may raise anything.
    except Exception as error:
        raise ValueError(f"cannot be imported: {format_error(error)}") from error
    try:
        return getattr(imported, attribute)
    except AttributeError:
        raise ValueError(
            f"cannot be imported, since module {module} has no {attribute}: "
            "check the name"
        ) from None


def format_error(error: Exception) -> str:
    """Format an error of external code on one line: its class and its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
