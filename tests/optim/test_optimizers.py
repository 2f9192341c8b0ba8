import pytest
import torch
from torch import nn

from distrain.optim.adam import Adam
from distrain.optim.lars import LARS
from distrain.optim.optimizer import Optimizer, compute_total_norm
from distrain.optim.sgd import SGD

CASES = {
    "sgd": (lambda p: Optimizer(SGD(momentum=0.9, weight_decay=5e-4), p),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4)),
    "sgd without momentum": (lambda p: Optimizer(SGD(momentum=0.0, weight_decay=0.0), p),
                             lambda p: torch.optim.SGD(p, lr=0.1)),
    "nesterov": (lambda p: Optimizer(SGD(nesterov=True), p),
                 lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)),
    "paper at one rate": (lambda p: Optimizer(SGD(form="paper"), p),
                          lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4)),
    "adamw": (lambda p: Optimizer(Adam(weight_decay=1e-2, decoupled=True), p),
              lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=1e-2)),
    "adam": (lambda p: Optimizer(Adam(weight_decay=1e-3), p),
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
    assert all(not t.any() for t in optimizer.state_dict().values()), (
        "complete from the start, and zero"
    )
    for step in range(3):
        set_gradients(ours, step)
        optimizer.step(torch.tensor(0.1))
    copy = {k: nn.Parameter(p.detach().clone()) for k, p in ours.items()}
    second = make(copy)
    second.load_state_dict({k: t.clone() for k, t in optimizer.state_dict().items()})
    for step in range(3, 6):
        for p, o in ((ours, optimizer), (copy, second)):
            set_gradients(p, step)
            o.step(torch.tensor(0.05))
    assert all(torch.equal(ours[k], copy[k]) for k in ours)
    a, b = optimizer.state_dict(), second.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", CASES)
def test_a_rate_of_zero_moves_nothing(case):
    ours = parameters()
    before = {k: p.detach().clone() for k, p in ours.items()}
    optimizer = CASES[case][0](ours)
    set_gradients(ours, 0)
    optimizer.step(torch.tensor(0.0))
    assert all(torch.equal(ours[k], before[k]) for k in ours)


def through_a_drop(form):
    """Weights after ten steps, the rate of which falls tenfold at the sixth: ours, and those of the paper's update."""
    rates = [0.01] * 5 + [0.001] * 5
    ours = {
        "w": nn.Parameter(
            torch.randn(
                20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
            )
        )
    }
    optimizer = Optimizer(SGD(form=form), ours)
    w, v = ours["w"].detach().clone(), torch.zeros(20, 30, dtype=torch.float64)
    for step, lr in enumerate(rates):
        g = torch.randn(
            20,
            30,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(100 + step),
        )
        v = 0.9 * v - 0.0005 * lr * w - lr * g
        w = w + v
        ours["w"].grad = g
        optimizer.step(
            torch.tensor(lr, dtype=torch.float64), lr / rates[max(0, step - 1)]
        )
    return ours["w"].detach(), w


def test_the_papers_update_through_a_drop_of_the_rate():
    """Krizhevsky et al. 2012, section 5, to rounding; torch's form is another one there."""
    ours, papers = through_a_drop("paper")
    torch.testing.assert_close(ours, papers, rtol=1e-12, atol=1e-12)
    torchs, papers = through_a_drop("torch")
    assert (torchs - papers).abs().max() > 1e-3


RULES = [
    lambda **options: SGD(weight_decay=0.1, **options),
    lambda **options: Adam(weight_decay=0.1, decoupled=True, **options),
]


@pytest.mark.parametrize("make", RULES)
def test_biases_have_their_own_rate_and_decay(make):
    """As the released source of 2012 has it: twice the rate, no decay."""
    rule = make(decay_biases=False, bias_lr=2.0)
    shapes = {"fc.weight": (2, 3), "fc.bias": (6,), "norm.weight": (6,)}
    ours = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    for p in ours.values():
        p.grad = torch.zeros_like(p)
    Optimizer(rule, ours).step(torch.tensor(0.1))
    assert torch.equal(ours["fc.bias"], torch.ones(6))
    assert torch.equal(ours["norm.weight"], torch.ones(6)), (
        "nor the scales of normalisation"
    )
    assert torch.all(ours["fc.weight"] < 1)
    plain = make(bias_lr=2.0).model_copy(update={"weight_decay": 0.0})
    both = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    for p in both.values():
        p.grad = torch.full_like(p, 0.5)
    Optimizer(plain, both).step(torch.tensor(0.1))
    torch.testing.assert_close(
        1 - both["fc.bias"], 2 * (1 - both["fc.weight"].flatten())
    )
    torch.testing.assert_close(both["norm.weight"], both["fc.weight"].flatten())


@pytest.mark.parametrize("make", [*RULES, LARS])
def test_rates_by_prefix(make):
    """The longest prefix of a name counts, times the rate of biases."""
    rule = make(bias_lr=2.0).model_copy(
        update={"weight_decay": 0.0, "lr_scale": {"fc": 3.0, "fc.0": 0.5, "f": 100.0}}
    )
    names = ["conv.weight", "fc.weight", "fc.bias", "fc.0.weight", "fc.0.bias"]
    ours = {name: nn.Parameter(torch.ones(5)) for name in names}
    for p in ours.values():
        p.grad = torch.full_like(p, 0.5)
    Optimizer(rule, ours).step(torch.tensor(0.01))
    moved = [1 - p for p in ours.values()]
    for distance, factor in zip(moved, [1, 3, 6, 0.5, 1], strict=True):
        assert torch.all(distance > 0)
        torch.testing.assert_close(distance, factor * moved[0], rtol=1e-4, atol=0)


def test_lars_is_its_algorithm():
    """You, Gitman and Ginsburg 2017, algorithm 1, in float64 through a schedule; a bias moves as in SGD."""
    rates = [0.5, 1.0, 1.0, 0.7, 0.3]
    config = LARS(weight_decay=5e-3, trust=0.02, decay_biases=False)
    start = torch.Generator().manual_seed(0)
    ours = {"a.weight": nn.Parameter(torch.randn(20, 30, dtype=torch.float64, generator=start)),
            "a.bias": nn.Parameter(torch.randn(7, dtype=torch.float64, generator=start)),
            "b.weight": nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))}  # fmt: skip
    optimizer = Optimizer(config, ours)
    w = {name: p.detach().clone() for name, p in ours.items()}
    v = {name: torch.zeros_like(p) for name, p in w.items()}
    for step, lr in enumerate(rates):
        for i, (name, p) in enumerate(ours.items()):
            g = torch.randn(
                p.shape,
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(10 * step + i),
            )
            p.grad = g.clone()
            decay = 0.0 if name == "a.bias" else 5e-3
            ratio = 0.02 * w[name].norm() / (g.norm() + decay * w[name].norm())
            if name == "a.bias" or not w[name].any():
                ratio = torch.ones(())
            v[name] = 0.9 * v[name] + lr * ratio.float() * (g + decay * w[name])
            w[name] = w[name] - v[name]
        optimizer.step(
            torch.tensor(lr, dtype=torch.float64), lr / rates[max(0, step - 1)]
        )
    for name, p in ours.items():
        torch.testing.assert_close(p.detach(), w[name], rtol=1e-6, atol=1e-9)


def test_the_gradient_is_clipped_by_its_whole_norm():
    both = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(1))}
    optimizer = Optimizer(SGD(momentum=0.0, weight_decay=0.0, clip_norm=1.0), both)
    for scale, wanted in ((1.0, 1.0), (0.1, 0.3)):  # the norm is 3
        before = {name: p.detach().clone() for name, p in both.items()}
        both["a"].grad, both["b"].grad = (
            torch.tensor([2.0, 1.0, 0.0]) * scale,
            torch.tensor([2.0]) * scale,
        )
        optimizer.step(torch.tensor(1.0))
        moved = torch.cat([before[name] - p.detach() for name, p in both.items()])
        torch.testing.assert_close(
            moved, wanted * torch.tensor([2.0, 1.0, 0.0, 2.0]) / 3
        )


def test_a_norm_does_not_round_away():
    """Where float32 stops counting: 2^25 ones."""
    assert (
        compute_total_norm([torch.ones(1 << 25), torch.ones(3)]).item()
        == ((1 << 25) + 3) ** 0.5
    )
