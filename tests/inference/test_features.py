import numpy as np
import pytest
import torch
from torch import nn

from distrain.errors import UserError
from distrain.inference.features import compute_features, get_first_filters
from distrain.inference.trained_model import open_trained_model
from distrain.training.run_data import open_dataset


@pytest.fixture
def model(trained):
    return open_trained_model(str(trained.run))


@pytest.fixture
def dataset(model):
    config = model.config
    return open_dataset(str(config.data.val), config.data, config.augment)


@pytest.mark.parametrize("count", [7, 50, 120])
def test_the_classifier_makes_logits_of_them(model, dataset, trained, count):
    """Whose highest classes are those of the evaluation; chunks have 50 images."""
    import distrain

    images = distrain.evaluate(trained.run).images
    chosen = np.linspace(0, len(dataset) - 1, count).astype(np.int64)
    features = compute_features(model, dataset, chosen)
    assert features.shape == (count, model.module.classifier[-1].in_features)
    logits = model.module.classifier[-1](torch.from_numpy(features))
    assert logits.argmax(1).tolist() == images.top_classes[chosen, 0].tolist()


def test_the_model_is_left_as_it_was(model, dataset):
    compute_features(model, dataset, np.arange(3))
    assert not any(m._forward_pre_hooks for m in model.module.modules())


def test_a_network_without_a_linear_classifier_is_refused(model, dataset):
    model.module.classifier[-1] = nn.Identity()
    with pytest.raises(UserError, match="does not end in a linear classifier"):
        compute_features(model, dataset, np.arange(3))


def test_filters_of_all_towers(model):
    first = model.module.features[0].weight
    filters = get_first_filters(model.module)
    assert filters.shape == (first.shape[0], 11, 11, 3)
    assert filters[1, 2, 3, 0] == first[1, 0, 2, 3]
    towers = nn.ModuleList([nn.Conv2d(3, 4, 5), nn.Conv2d(3, 2, 5), nn.Conv2d(6, 2, 5)])
    assert get_first_filters(towers).shape == (6, 5, 5, 3)


@pytest.mark.parametrize("module", [nn.Conv2d(1, 2, 3), nn.Linear(2, 2)])
def test_no_filters_of_pixels(module):
    assert get_first_filters(module) is None
