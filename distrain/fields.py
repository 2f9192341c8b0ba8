"""What the sections of a config are made of: fields that decide the weights or do not, and choices by name."""

import importlib
import inspect
import os
import sys
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def result_field(default: Any = ..., **limits: Any) -> Any:
    """A field that decides the weights."""
    return Field(default, json_schema_extra={"decides": "result"}, **limits)


def operation_field(default: Any = ..., **limits: Any) -> Any:
    """A field that does not decide the weights."""
    return Field(default, json_schema_extra={"decides": "operation"}, **limits)


class Section(BaseModel):
    """A part of the tree: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class Choice(Section):
    """A section that has several forms, of which a config names one.

    A direct subclass is a kind of choice, such as the loss. Classes below it are its forms: `class L1(Loss, name="l1")`
    is known by that name as soon as it is imported, any other by `package.module:Class`. What a form has to do stands
    in the abstract methods of its kind, so that none is forgotten. Reading a config loads no torch: forms import it in
    their methods.
    """

    default_name: ClassVar[str | None] = None
    """The form of a config that names none; None: it must name one."""
    import_syntax: ClassVar[str] = "package.module:Class"
    """How a form is named that is not known by a name of its own."""
    registry: ClassVar[dict[str, type["Choice"]]]
    """By name; each kind has its own."""
    config_name: ClassVar[str]
    """What a config calls this form."""

    name: str = result_field()
    """Which form. [result]"""

    @classmethod
    def __pydantic_init_subclass__(cls, *, name: str | None = None, **_: Any) -> None:
        if Choice in cls.__bases__:
            cls.registry = {}
        cls.config_name = name or f"{cls.__module__}:{cls.__qualname__}"
        if name is not None:
            before = cls.registry.get(
                name, cls
            )  # the same class once more, if its module is imported again
            place = cls.__module__, cls.__qualname__
            assert (before.__module__, before.__qualname__) == place, (
                f"two forms are named {name}"
            )
            cls.registry[name] = cls

    def __init_subclass__(cls, *, name: str | None = None, **_: Any) -> None:
        super().__init_subclass__()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name = value.get("name", cls.config_name)
        if name != cls.config_name and (
            ":" not in str(name) or ":" not in cls.config_name
        ):
            raise ValueError(f"name is {cls.config_name}, not {name!r}: leave it out")
        if str(name).startswith("__main__:") or "<locals>" in str(name):
            raise ValueError(
                f"{name} cannot be imported by other processes: define it at the top of a module"
            )
        return {**value, "name": name}

    @classmethod
    def parse_choice(cls, value: Any) -> Any:
        """Make the form that a tree of plain values names, for a BeforeValidator.

        Raises:
            PydanticCustomError: there is no such form.
            ValidationError: its fields are not as they should be.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError(
                "no_section", "must be a section, not {found}", {"found": repr(value)}
            )
        name = value.get("name", cls.default_name)
        form = cls.find_class(name)
        return form.model_validate(
            {**value, "name": name if ":" in form.config_name else form.config_name}
        )

    @classmethod
    def find_class(cls, name: Any) -> type["Choice"]:
        """Find a form by its name. Raises PydanticCustomError."""
        if isinstance(name, str) and ":" in name:
            return cls._find_external_class(name)
        if isinstance(name, str) and name in cls.registry:
            return cls.registry[name]
        known = ", ".join([*sorted(cls.registry), cls.import_syntax])
        found = {"known": known, "found": repr(name)}
        raise PydanticCustomError(
            "no_choice", "must be one of {known}, not {found}", found
        )

    @classmethod
    def list_classes(cls) -> list[type[BaseModel]]:
        """Every form that is known, each once."""
        return list(dict.fromkeys(cls.registry.values()))

    @classmethod
    def _find_external_class(cls, name: str) -> type["Choice"]:
        try:
            found = import_attribute(name)
        except ValueError as error:
            raise PydanticCustomError(
                "no_choice", "{found} {why}", {"found": name, "why": str(error)}
            ) from None
        if not isinstance(found, type) or not issubclass(found, cls):
            why = f"is no {cls.__name__}: name a subclass of {cls.__module__}.{cls.__name__}"
            raise PydanticCustomError(
                "no_choice", "{found} {why}", {"found": name, "why": why}
            )
        if inspect.isabstract(found):
            why = f"lacks {', '.join(sorted(found.__abstractmethods__))}: write what {cls.__name__} asks for"
            raise PydanticCustomError(
                "no_choice", "{found} {why}", {"found": name, "why": why}
            )
        return found


def import_attribute(name: str) -> Any:
    """Import `package.module:attribute`; the working directory is searched too.

    Raises:
        ValueError: it cannot be imported; the text goes on after the name.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(
            os.getcwd()
        )  # last, so that no file there hides an installed package
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cannot be imported ({format_error(error)}): install its package on every host, or start in its folder"
        ) from None
    except Exception as error:  # the user's module is run
        raise ValueError(f"cannot be imported: {format_error(error)}") from error


def format_error(error: Exception) -> str:
    """An error of code that is not ours, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
