"""Keys that people bring from other toolkits, and misspelt ones: the right suggestion, or none."""

import pytest

from distrain.config import Config
from distrain.config_keys import list_keys
from distrain.suggestions import _SYNONYMS, suggest_keys

STEP = {"schedule": {"name": "step"}}


@pytest.mark.parametrize(
    ("key", "tree", "meant"),
    [
        # What other toolkits call it.
        ("lr", {}, "schedule.lr"),
        ("optimizer.lr", {}, "schedule.lr"),
        ("learning_rate", {}, "schedule.lr"),
        ("optimizer.learning_rate", {}, "schedule.lr"),
        ("batch_size", {}, "global_batch"),
        ("batch", {}, "global_batch"),
        ("data.batch_size", {}, "global_batch"),
        ("evaluate.batch_size", {}, "evaluate.batch"),
        ("workers", {}, "cluster.workers"),
        ("data.workers", {}, "data.decode_threads"),
        ("data.num_workers", {}, "data.decode_threads"),
        ("num_workers", {}, "data.decode_threads cluster.workers"),
        ("max_epochs", {}, "epochs"),
        ("train.max_epochs", {}, "epochs"),
        ("arch", {}, "model.name"),
        ("model.arch", {}, "model.name"),
        ("optimizer.type", {}, "optimizer.name"),
        ("scheduler", {}, "schedule"),
        ("optim", {}, "optimizer"),
        ("criterion", {}, "loss"),
        ("schedule.gamma", STEP, "schedule.factor"),
        ("schedule.milestones", STEP, "schedule.drop_epochs"),
        ("optimizer.betas", {"optimizer": {"name": "adam"}}, "optimizer.beta1 optimizer.beta2"),
        # The same name elsewhere, or other separators.
        ("weight_decay", {}, "optimizer.weight_decay"),
        ("momentum", {}, "optimizer.momentum"),
        ("label_smoothing", {}, "loss.label_smoothing"),
        ("data.seed", {}, "seed"),
        ("model.seed", {}, "seed"),
        ("schedule.weight_decay", {}, "optimizer.weight_decay"),
        ("log_every", {}, "log.every"),
        ("every", {}, "evaluate.every checkpoint.every log.every"),
        # Misspelt.
        ("epoch", {}, "epochs"),
        ("epcohs", {}, "epochs"),
        ("Epochs", {}, "epochs"),
        ("data.vall", {}, "data.val"),
        ("data.normalize", {}, "data.normalise"),
        ("augment.color", {}, "augment.colour"),
        ("optimizer.momentun", {}, "optimizer.momentum"),
        ("optimizer.weight-decay", {}, "optimizer.weight_decay"),
        ("momentun", {}, "optimizer.momentum"),
        ("schedul", {}, "schedule"),
        ("loss.smoothing", {}, "loss.label_smoothing"),
        # Nothing here is meant by these.
        ("name", {}, ""),
        ("model.num_classes", {}, ""),
        ("num_classes", {}, ""),
        ("data.shuffle", {}, ""),
        ("data.pin_memory", {}, ""),
        ("model.pretrained", {}, "model.init_from"),
        ("model.a", {}, ""),
        ("model.lrm", {}, ""),
        ("schedule.t_max", {}, ""),
        ("optimizer.dampening", {}, ""),
        ("distributed", {}, ""),
        ("trainer", {}, ""),
        # Keys of an implementation that is not the chosen one.
        ("momentum", {"optimizer": {"name": "adam"}}, ""),
        ("schedule.gamma", {"schedule": {"name": "cosine"}}, ""),
    ],
)  # fmt: skip
def test_what_is_suggested(key, tree, meant):
    found = suggest_keys(key, list_keys(Config, tree))
    assert found == meant.split()


def test_synonyms_are_unknown_and_name_what_there_is():
    known = set(list_keys(Config))
    for name, keys in _SYNONYMS.items():
        assert name not in known
        assert set(keys) <= known, name
