"""Weights of a file and a network: what is taken, what is new, and what is of another network."""

import pytest
import torch
import torchvision
from torch import nn

from distrain.errors import UserError
from distrain.models.model import Model
from distrain.models.weight_matching import find_class_dimensions, match_weights

CLASSES = ("cat", "dog", "owl")


class Odd(nn.Module):
    """A classifier that comes first, whose weight counts classes in its second dimension."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.zeros(4, num_classes))
        self.body = nn.Linear(num_classes and 3, 4)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("alexnet", {"classifier.6.weight": 0, "classifier.6.bias": 0}),
        ("alexnet2012", {"fc8.weight": 0, "fc8.bias": 0}),
        ("torchvision:resnet18", {"fc.weight": 0, "fc.bias": 0}),
        (f"{__name__}:Odd", {"head": 1}),
    ],
)
def test_what_depends_on_the_number_of_classes(name, found):
    model = Model.parse_choice({"name": name})
    # 3, which is also another size of `Odd`.
    state_dict = model.build_skeleton(3).state_dict()
    assert find_class_dimensions(model, state_dict, 3) == found


NETWORK = {
    "body.weight": torch.zeros(4, 2),
    "body.count": torch.tensor(0),
    "head.weight": torch.zeros(3, 4),
    "head.bias": torch.zeros(3),
}
DIMENSIONS = {"head.weight": 0, "head.bias": 0}


def make_file(num_classes: int = 3, **changes) -> dict[str, torch.Tensor]:
    tensors = {
        "body.weight": torch.arange(8.0).reshape(4, 2),
        "body.count": torch.tensor(5),
        "head.weight": torch.arange(4.0 * num_classes).reshape(num_classes, 4),
        "head.bias": torch.arange(float(num_classes)),
    }
    for name, tensor in changes.items():
        tensors[name.replace("__", ".")] = tensor
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def match(tensors, file_classes=CLASSES):
    return match_weights(
        tensors,
        NETWORK,
        DIMENSIONS,
        "a.pth",
        classes=CLASSES,
        file_classes=file_classes,
    )


@pytest.mark.parametrize(
    ("file_classes", "description"),
    [
        (CLASSES, "4 tensors from a.pth"),
        (
            None,
            "4 tensors from a.pth; its class names are not known, so its outputs keep "
            "their order",
        ),
    ],
)
def test_equal_classes(file_classes, description):
    tensors = make_file()
    found = match(tensors, file_classes)
    assert (found.description, found.new_names) == (description, ())
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)


def test_the_same_classes_in_another_order():
    tensors = make_file()
    found = match(tensors, ("owl", "cat", "dog"))
    assert found.description == (
        "4 tensors from a.pth; its outputs are put into the order of the run's classes"
    )
    assert torch.equal(found.tensors["head.bias"], torch.tensor([1.0, 2.0, 0.0]))
    assert torch.equal(found.tensors["head.weight"], tensors["head.weight"][[1, 2, 0]])
    assert torch.equal(found.tensors["body.weight"], tensors["body.weight"])


@pytest.mark.parametrize(
    ("tensors", "file_classes", "reason"),
    [
        (make_file(5), None, "3 classes, not 5"),
        (make_file(5), tuple("abcde"), "3 classes, not 5"),
        (make_file(), ("cat", "dog", "cow"), "other classes, such as owl"),
        (make_file(), ("cat", "dog", "cat"), "several classes with one name"),
        (make_file(head__weight=None, head__bias=None), None, "it has none"),
    ],
)
def test_a_new_head(tensors, file_classes, reason):
    found = match(tensors, file_classes)
    assert found.new_names == ("head.weight", "head.bias")
    assert found.tensors.keys() == {"body.weight", "body.count"}
    assert found.description == (
        f"2 tensors from a.pth; head.weight, head.bias are new: {reason}"
    )


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (make_file(body__weight=None), "lacks body.weight"),
        (make_file(head__bias=None), "lacks head.bias"),
        (make_file(extra=torch.ones(1)), "has extra, which the network lacks"),
        (
            make_file(body__weight=torch.ones(4, 3)),
            "has body.weight of shape (4, 3), not (4, 2)",
        ),
        (
            make_file(5, head__weight=torch.ones(5, 7)),
            "has head.weight of shape (5, 7), not (5, 4)",
        ),
        (make_file(head__weight=torch.ones(5)), "has head.weight of shape (5,), not"),
        (
            make_file(body__weight=torch.ones(4, 2, dtype=torch.int64)),
            "has body.weight of type torch.int64",
        ),
        (
            make_file(body__count=torch.tensor(1.0)),
            "has body.count of type torch.float32",
        ),
    ],
)
def test_another_network(tensors, problem):
    with pytest.raises(UserError) as caught:
        match(tensors)
    text = str(caught.value)
    assert text.startswith(f"a.pth {problem}")
    assert text.endswith(
        ": it is of another network; set model.name, and settings such as model.width, "
        "to those that it was trained with"
    )


def test_alexnet_has_the_layout_of_torchvisions():
    with torch.device("meta"):
        given = torchvision.models.alexnet(num_classes=1000).state_dict()
    model = Model.parse_choice({"name": "alexnet"})
    expected = model.build_skeleton(10).state_dict()
    found = match_weights(
        given,
        expected,
        find_class_dimensions(model, expected, 10),
        "a.pth",
        classes=tuple("abcdefghij"),
        file_classes=None,
    )
    assert found.description == (
        "14 tensors from a.pth; classifier.6.weight, classifier.6.bias are new: 10 "
        "classes, not 1000"
    )
