import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from distrain.errors import UserError
from distrain.losses import L1, L2, CrossEntropy, Hinge, Huber, Loss, SmoothL1
from distrain.training.forward_pass import count_correct

LOSSES = {
    "cross entropy": CrossEntropy(),
    "smoothed": CrossEntropy(label_smoothing=0.1),
    "weston-watkins": Hinge(margin=1.5),
    "crammer-singer": Hinge(form="crammer_singer"),
    "one against the rest": Hinge(form="binary", one_vs_rest=True),
    **{
        f"{kind().name} {outputs}": kind(outputs=outputs)
        for kind in (L1, L2)
        for outputs in ("softmax", "logits")
    },
    **{
        f"{kind().name} {outputs}": kind(outputs=outputs, threshold=0.3)
        for kind in (SmoothL1, Huber)
        for outputs in ("softmax", "logits")
    },
}


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return torch.randn(20, 7, dtype=torch.float64), torch.randint(0, 7, (20,))


def by_definition(loss, s, y):
    """One sample in plain Python, from the formula of the lecture."""
    others = [float(s[j] - s[y]) for j in range(len(s)) if j != y]
    p = s.softmax(0)
    one_hot = [1.0 if j == y else 0.0 for j in range(len(s))]
    if isinstance(loss, CrossEntropy):
        eps = loss.label_smoothing
        target = [(1 - eps) * hot + eps / len(s) for hot in one_hot]
        return -sum(t * float(q.log()) for t, q in zip(target, p, strict=True))
    if isinstance(loss, Hinge):
        if loss.form == "weston_watkins":
            return sum(max(0.0, d + loss.margin) for d in others)
        if loss.form == "crammer_singer":
            return max(0.0, max(others) + loss.margin)
        return sum(
            max(0.0, loss.margin - (2 * hot - 1) * float(v))
            for hot, v in zip(one_hot, s, strict=True)
        )
    errors = [
        abs(float(v) - hot)
        for v, hot in zip(p if loss.outputs == "softmax" else s, one_hot, strict=True)
    ]
    if loss.name == "l1":
        return sum(errors) / len(s)
    if loss.name == "l2":
        return sum(e * e for e in errors) / len(s)
    t = loss.threshold
    smooth = [e * e / 2 / t if e < t else e - t / 2 for e in errors]
    return sum(smooth) / len(s) * (t if loss.name == "huber" else 1)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula(scores, name):
    logits, labels = scores
    found = LOSSES[name](logits, labels)
    assert found.shape == (20,)
    wanted = [
        by_definition(LOSSES[name], s, int(y))
        for s, y in zip(logits, labels, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_its_gradient_is_the_one_of_finite_differences(scores, name):
    logits, labels = scores
    assert torch.autograd.gradcheck(
        lambda s: LOSSES[name](s, labels), logits.requires_grad_()
    )


def test_torchs_own_losses(scores):
    logits, labels = scores
    one_hot = F.one_hot(labels, 7).double()
    own = {
        "smoothed": F.cross_entropy(logits, labels, label_smoothing=0.1),
        "weston-watkins": 7
        * F.multi_margin_loss(
            logits, labels, margin=1.5
        ),  # torch divides by the classes
        "l1 softmax": F.l1_loss(logits.softmax(1), one_hot),
        "l2 logits": F.mse_loss(logits, one_hot),
        "smooth_l1 softmax": F.smooth_l1_loss(logits.softmax(1), one_hot, beta=0.3),
        "huber logits": F.huber_loss(logits, one_hot, delta=0.3),
    }
    for name, wanted in own.items():
        torch.testing.assert_close(LOSSES[name](logits, labels).mean(), wanted)


def test_the_jacobian_of_softmax_and_cross_entropy_is_p_minus_y(scores):
    logits, labels = scores
    found = torch.autograd.functional.jacobian(
        lambda s: LOSSES["cross entropy"](s, labels).sum(), logits
    )
    torch.testing.assert_close(found, logits.softmax(1) - F.one_hot(labels, 7))


def test_the_binary_hinge_of_two_classes():
    logits = torch.tensor(
        [[0.2, 0.5], [0.2, 0.5], [3.0, -1.0], [3.0, -1.0]], dtype=torch.float64
    )
    labels = torch.tensor([0, 1, 0, 1])
    hinge = Hinge(form="binary")
    wanted = torch.tensor([1.3, 0.7, 0.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(hinge(logits, labels), wanted)
    assert torch.autograd.gradcheck(lambda s: hinge(s, labels), logits.requires_grad_())


def test_a_binary_hinge_of_many_classes_is_refused():
    hinge = Hinge(form="binary")
    with pytest.raises(
        UserError,
        match="is for two classes, and the data set has 1000: set loss.one_vs_rest = true",
    ):
        hinge.check_num_classes(1000)
    hinge.check_num_classes(2)
    hinge.model_copy(update={"one_vs_rest": True}).check_num_classes(1000)
    for loss in LOSSES.values():
        loss.check_num_classes(1000)


def test_cross_entropy_is_minus_log_softmax(scores):
    logits, labels = scores
    wanted = torch.stack(
        [
            -torch.log(row.exp()[y] / row.exp().sum())
            for row, y in zip(logits, labels, strict=True)
        ]
    )
    torch.testing.assert_close(CrossEntropy()(logits, labels), wanted)


@pytest.mark.parametrize("k", [1, 5])
def test_correct_equals_topk(k):
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 10), torch.randint(0, 10, (200,))
    weights = (torch.rand(200) > 0.3).float()
    hits = (logits.topk(k).indices == labels[:, None]).any(1) & (weights > 0)
    assert count_correct(logits, labels, weights, k) == hits.sum()


def test_ties_and_nan_have_one_answer():
    one = torch.ones(1)
    same = torch.zeros(1, 4)
    assert [int(count_correct(same, torch.tensor([y]), one, 2)) for y in range(4)] == [
        1,
        1,
        0,
        0,
    ]
    nan = torch.full((1, 4), float("nan"))
    assert [int(count_correct(nan, torch.tensor([y]), one, 1)) for y in range(4)] == [
        0,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("value", ["balanced", [1, 0.5, 2], None])
def test_class_weights_are_a_word_or_a_list(value):
    loss = Loss.parse_choice({"name": "l2", "class_weights": value})
    wanted = tuple(value) if isinstance(value, list) else value
    assert loss.class_weights == wanted


@pytest.mark.parametrize(
    "value", ["even", [1, -1], [1, "2"], [True, 1], [float("nan")], 3, {}]
)
def test_class_weights_of_other_kinds(value):
    with pytest.raises(ValidationError) as caught:
        Loss.parse_choice({"name": "l2", "class_weights": value})
    (error,) = caught.value.errors()
    assert (
        "must be balanced, or a list of one weight per class (0 or more)"
        in error["msg"]
    )
