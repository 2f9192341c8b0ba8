"""Match the weights of a file to a network: equal tensors, or a new classifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from distrain.errors import UserError
from distrain.models.model import Model

_MAX_NAMES = 4


@dataclass(frozen=True)
class MatchedWeights:
    """Weights of a file that a network starts from."""

    tensors: dict[str, Tensor]
    """By the network's names, in its shapes."""
    new_names: tuple[str, ...]
    """Tensors of the network that keep their drawn weights."""
    description: str
    """What is taken and what is new, for the log."""


def find_class_dimensions(
    model: Model, state_dict: Mapping[str, Tensor], num_classes: int
) -> dict[str, int]:
    """Find the tensors of a network whose shape depends on the number of classes.

    Args:
        model: the settings of the network.
        state_dict: state dict of the network.
        num_classes: classes that it was built for.

    Returns:
        The dimension that counts classes, by the tensor's name.
    """
    # Compare with the same network for one class more.
    other = model.build_skeleton(num_classes + 1).state_dict()
    dimensions = {}
    for name, tensor in state_dict.items():
        sizes = zip(tensor.shape, other[name].shape, strict=True)
        differing = [i for i, (size, larger) in enumerate(sizes) if size != larger]
        if differing:
            dimensions[name] = differing[0]
    return dimensions


def match_weights(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    class_dimensions: Mapping[str, int],
    place: str,
    *,
    classes: Sequence[str],
    file_classes: Sequence[str] | None,
) -> MatchedWeights:
    """Choose the weights of a file that a network starts from.

    The classifier is new if the number or the names of the classes differ. Of the same
    classes in another order, its outputs are reordered.

    Args:
        tensors: weights of the file.
        expected: state dict of the network.
        class_dimensions: what `find_class_dimensions` returned for it.
        place: the file, for messages.
        classes: class names of the run, by label.
        file_classes: class names of the file, by its outputs; None: not known.

    Raises:
        UserError: names the first tensor that differs, besides in the number of
            classes.
    """
    has_head = any(name in tensors for name in class_dimensions)
    checked = {
        name: tensor
        for name, tensor in expected.items()
        if has_head or name not in class_dimensions
    }
    _check_tensors(tensors, checked, class_dimensions, place)

    # Is the classifier new, or are its outputs in another order?
    reason = "it has none"
    order: list[int] | None = None
    note = ""
    if has_head:
        reason = _compare_sizes(tensors, expected, class_dimensions)
        if not reason and file_classes is None:
            note = "; its class names are not known, so its outputs keep their order"
        elif not reason:
            reason, order = _compare_classes(classes, file_classes or ())
        if order is not None:
            note = "; its outputs are put into the order of the run's classes"
    new_names = tuple(class_dimensions) if reason else ()

    # Take the tensors.
    taken = {}
    for name in checked:
        if name in new_names:
            continue
        taken[name] = tensors[name]
        if order is not None and name in class_dimensions:
            index = tensors[name].new_tensor(order).long()
            taken[name] = tensors[name].index_select(class_dimensions[name], index)
    if new_names:
        shown = ", ".join(new_names[:_MAX_NAMES])
        more = len(new_names) - _MAX_NAMES
        shown += f" and {more} more" if more > 0 else ""
        note = f"; {shown} {'are' if len(new_names) > 1 else 'is'} new: {reason}"
    description = f"{len(taken)} tensors from {place}{note}"
    return MatchedWeights(taken, new_names, description)


def _check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    class_dimensions: Mapping[str, int],
    place: str,
) -> None:
    """Raise UserError if names, shapes or kinds of numbers differ."""
    for name in [*expected, *tensors]:
        if name not in tensors:
            problem = f"lacks {name}"
        elif name not in expected:
            problem = f"has {name}, which the network lacks"
        else:
            found = list(tensors[name].shape)
            wanted = list(expected[name].shape)
            # The number of classes may differ.
            dimension = class_dimensions.get(name)
            if dimension is not None and len(found) == len(wanted):
                wanted[dimension] = found[dimension]
            is_float = tensors[name].is_floating_point()
            if found != wanted:
                problem = f"has {name} of shape {tuple(found)}, not {tuple(wanted)}"
            elif is_float != expected[name].is_floating_point():
                problem = f"has {name} of type {tensors[name].dtype}"
            else:
                continue
        raise UserError(
            f"{place} {problem}: it is of another network; set model.name, and "
            "settings such as model.width, to those that it was trained with"
        )


def _compare_sizes(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    class_dimensions: Mapping[str, int],
) -> str:
    """Return how the numbers of classes differ; empty: they are equal."""
    for name, dimension in class_dimensions.items():
        num_found = tensors[name].shape[dimension]
        num_wanted = expected[name].shape[dimension]
        if num_found != num_wanted:
            return f"{num_wanted} classes, not {num_found}"
    return ""


def _compare_classes(
    classes: Sequence[str], file_classes: Sequence[str]
) -> tuple[str, list[int] | None]:
    """Compare the classes of a run and of a file, of the same number.

    Returns:
        How their names differ (empty: not at all), and the number in the file of each
        class of the run if the order differs.
    """
    if tuple(classes) == tuple(file_classes):
        return "", None
    numbers = {name: number for number, name in enumerate(file_classes)}
    if len(numbers) < len(file_classes):
        return "several classes with one name", None
    unknown = [name for name in classes if name not in numbers]
    if unknown:
        return f"other classes, such as {unknown[0]}", None
    return "", [numbers[name] for name in classes]
