"""Prefixes of parameter names, by which a config chooses layers: `features.0`."""

from collections.abc import Collection, Iterable

from distrain.errors import UserError

_MAX_NAMES = 20


def has_prefix(name: str, prefix: str) -> bool:
    """Return whether a dotted name is a prefix itself, or of something below it."""
    return name == prefix or name.startswith(f"{prefix}.")


def find_longest_prefix(name: str, prefixes: Iterable[str]) -> str | None:
    """Return the longest of the prefixes that a name has; None: it has none."""
    found = [prefix for prefix in prefixes if has_prefix(name, prefix)]
    return max(found, key=len, default=None)


def check_prefixes(key: str, prefixes: Iterable[str], names: Collection[str]) -> None:
    """Check that each prefix is one of a name.

    Args:
        key: key of the config that has the prefixes, for messages.
        prefixes: the prefixes.
        names: the names.

    Raises:
        UserError: lists what there is in place of a prefix that no name has.
    """
    for prefix in prefixes:
        if any(has_prefix(name, prefix) for name in names):
            continue
        # List what is in the longest part of it that there is.
        parent = prefix
        while parent and not any(has_prefix(name, parent) for name in names):
            parent = parent.rpartition(".")[0]
        depth = parent.count(".") + 2 if parent else 1
        below = [name for name in names if not parent or has_prefix(name, parent)]
        parts = list(dict.fromkeys(".".join(n.split(".")[:depth]) for n in below))
        shown = ", ".join(parts[:_MAX_NAMES])
        shown += ", ..." if len(parts) > _MAX_NAMES else ""
        raise UserError(
            f"{key} has {prefix}, which no parameter's name begins with: use one of "
            f"{shown}, or of what is below"
        )
