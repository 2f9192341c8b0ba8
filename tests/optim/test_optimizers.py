import pytest
import torch
from torch import nn

from distrain.optim.adam import adam
from distrain.optim.sgd import sgd
from distrain.sections import SGD, Adam

CASES = {
    "sgd": (lambda p: sgd(SGD(name="sgd", momentum=0.9, weight_decay=5e-4), p),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4)),
    "sgd without momentum": (lambda p: sgd(SGD(name="sgd", momentum=0.0, weight_decay=0.0), p),
                             lambda p: torch.optim.SGD(p, lr=0.1)),
    "adam": (lambda p: adam(Adam(name="adam", weight_decay=1e-3), p),
             lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=1e-3)),
}  # fmt: skip


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": nn.Parameter(torch.randn(20, 30, generator=generator)),
        "b": nn.Parameter(torch.randn(7, generator=generator)),
    }


def set_gradients(p, step):
    generator = torch.Generator().manual_seed(100 + step)
    for tensor in p.values():
        tensor.grad = torch.randn(tensor.shape, generator=generator)


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_equal_torchs(case):
    make, torchs = CASES[case]
    ours, theirs = parameters(), parameters()
    optimizer, reference = make(ours), torchs(theirs.values())
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(torch.tensor(0.1))
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_state_taken_over_goes_on_bit_for_bit(case):
    make, _ = CASES[case]
    ours = parameters()
    optimizer = make(ours)
    assert all(not t.any() for t in optimizer.state().values()), "complete from the start, and zero"
    for step in range(3):
        set_gradients(ours, step)
        optimizer.step(torch.tensor(0.1))
    copy = {k: nn.Parameter(p.detach().clone()) for k, p in ours.items()}
    second = make(copy)
    second.load({k: t.clone() for k, t in optimizer.state().items()})
    for step in range(3, 6):
        for p, o in ((ours, optimizer), (copy, second)):
            set_gradients(p, step)
            o.step(torch.tensor(0.05))
    assert all(torch.equal(ours[k], copy[k]) for k in ours)
    a, b = optimizer.state(), second.state()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", CASES)
def test_a_rate_of_zero_moves_nothing(case):
    ours = parameters()
    before = {k: p.detach().clone() for k, p in ours.items()}
    optimizer = CASES[case][0](ours)
    set_gradients(ours, 0)
    optimizer.step(torch.tensor(0.0))
    assert all(torch.equal(ours[k], before[k]) for k in ours)
