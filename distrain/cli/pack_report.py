"""Report on images that a pack divided into a training and a validation set."""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distrain.data.prepare.validation_rows import SplitCounts

_MAX_CLASS_LINES = 20
_MAX_NAMED_CLASSES = 5


def describe_split(counts: "SplitCounts", classes: Sequence[str]) -> list[str]:
    """Return lines for the images of each class: all classes, or a summary of many."""
    # Classes without an image, of another data set say, have no fraction.
    rows = [
        (name, num_val, num_train + num_val)
        for name, num_train, num_val in zip(
            classes, counts.train, counts.val, strict=True
        )
        if num_train + num_val
    ]
    lines = [f"validation   {_format_fraction(sum(counts.val), sum(counts.train))}"]
    if len(rows) <= _MAX_CLASS_LINES:
        lines += [
            f"validation   {_format_fraction(num_val, total - num_val)}: {name}"
            for name, num_val, total in rows
        ]
    else:
        shares = [num_val / total for _, num_val, total in rows]
        lines.append(
            f"validation   per class: {min(shares):.1%} to {max(shares):.1%}, median "
            f"{median(shares):.1%}"
        )
    if counts.num_followers:
        verb = "follows" if counts.num_followers == 1 else "follow"
        noun = "image" if counts.num_followers == 1 else "images"
        lines.append(
            f"note         {counts.num_followers:,} {noun} {verb} an equal one, so "
            "that no image is on both sides"
        )
    lines += _note_classes(
        "validation", [name for name, num_val, _ in rows if not num_val]
    )
    lines += _note_classes(
        "training", [name for name, num_val, total in rows if num_val == total]
    )
    return lines


def _format_fraction(num_val: int, num_train: int) -> str:
    total = num_val + num_train
    return f"{num_val:,} of {total:,} images ({num_val / total:.1%})"


def _note_classes(side: str, names: Sequence[str]) -> list[str]:
    """Return a note on classes that have no image on a side."""
    if not names:
        return []
    shown = ", ".join(names[:_MAX_NAMED_CLASSES])
    rest = ", ..." if len(names) > _MAX_NAMED_CLASSES else ""
    noun = "class has" if len(names) == 1 else "classes have"
    return [f"note         {len(names):,} {noun} no {side} image: {shown}{rest}"]
