import pytest
import torch

from distrain.losses import correct, cross_entropy


def test_cross_entropy_is_minus_log_softmax():
    logits, labels = torch.randn(20, 7, dtype=torch.float64), torch.randint(0, 7, (20,))
    wanted = torch.stack([-torch.log(row.exp()[y] / row.exp().sum()) for row, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(cross_entropy(logits, labels), wanted)


@pytest.mark.parametrize("k", [1, 5])
def test_correct_equals_topk(k):
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 10), torch.randint(0, 10, (200,))
    weights = (torch.rand(200) > 0.3).float()
    hits = (logits.topk(k).indices == labels[:, None]).any(1) & (weights > 0)
    assert correct(logits, labels, weights, k) == hits.sum()


def test_ties_and_nan_have_one_answer():
    one = torch.ones(1)
    same = torch.zeros(1, 4)
    assert [int(correct(same, torch.tensor([y]), one, 2)) for y in range(4)] == [1, 1, 0, 0]
    nan = torch.full((1, 4), float("nan"))
    assert [int(correct(nan, torch.tensor([y]), one, 1)) for y in range(4)] == [0, 0, 0, 0]
