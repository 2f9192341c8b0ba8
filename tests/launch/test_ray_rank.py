"""What a rank computes on, where Ray gave it a GPU or none."""

import pytest
import ray.train.torch
import torch

from distrain.errors import AttemptError
from distrain.launch.allocation import Allocation
from distrain.launch.ray_rank import _select_device


def test_a_rank_computes_on_what_it_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda", 5))
    assert _select_device(Allocation(1, 8, 2, 1)) == torch.device("cuda", 5)
    assert _select_device(Allocation(1, 8, 2, 0)) == torch.device("cpu"), (
        "Ray's own would be a GPU that others hold"
    )


def test_a_gpu_that_torch_does_not_find_ends_the_attempt(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        AttemptError, match="Ray gave a rank on .* a GPU, but torch finds none there"
    ):
        _select_device(Allocation(1, 8, 2, 1))
