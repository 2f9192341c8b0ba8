"""What is computed of one micro-batch."""

from types import SimpleNamespace

import pytest
import torch

from distrain.errors import UserError
from distrain.losses import CrossEntropy
from distrain.training.forward_pass import forward


class Mean(CrossEntropy):
    """Reduces, as torch's losses do by default."""

    def __call__(self, logits, labels):
        return super().__call__(logits, labels).mean()


def test_a_loss_that_reduces_is_refused(narrow):
    config = narrow().model_copy(update={"loss": Mean()})
    images, labels = torch.zeros(4, 3, 64, 64), torch.zeros(4, dtype=torch.int64)
    batch = SimpleNamespace(
        images=images, labels=labels, sample_weights=torch.ones(4), virtual_worker=0
    )
    with pytest.raises(
        UserError, match=r"returned shape \(\) for 4 samples: it must return one"
    ):
        forward(config, config.model.build(10, 0), 0, batch)
