import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from distrain.inference.evaluation import (
    Evaluation,
    compute_wilson_interval,
    list_worst_classes,
)
from distrain.inference.image_table import ImageTable
from distrain.inference.trained_model import ModelOrigin

ENVIRONMENT = {"device": "a CPU", "cpu_capability": "AVX2", "torch": "2"}


def table(labels, predicted, valid=None, finite=None):
    """A table of images whose label is second where it is not first."""
    labels, predicted = np.array(labels), np.array(predicted)
    n = len(labels)
    is_valid = np.ones(n, bool) if valid is None else np.array(valid, bool)
    is_finite = np.ones(n, bool) if finite is None else np.array(finite, bool)
    ranks = (labels != predicted).astype(np.int64)
    return ImageTable(
        sample_ids=np.arange(n),
        labels=labels,
        is_valid=is_valid,
        ranks=ranks,
        fixed_losses=np.where(is_finite, (ranks + 1) << 32, 0),
        is_finite=is_finite,
        top_classes=np.stack([predicted, labels], 1),
        top_probabilities=np.tile([0.75, 0.25], (n, 1)),
        bad_samples={i: "junk" for i in range(n) if not is_valid[i]},
    )


def evaluation(images, classes=("cat", "dog", "owl"), environment=ENVIRONMENT):
    origin = ModelOrigin("runs/x", "step-1", 1, "ab" * 32, "exact", environment)
    return Evaluation(
        origins=(origin,),
        data="shards/val",
        data_fingerprint="cd" * 32,
        crops="center",
        loss_name="cross_entropy",
        settings={"batch": 128},
        classes=classes,
        result=images.summarize(),
        images=images,
        left_out={"shard row 3": "junk"},
        hardware_hash="ef" * 32,
        environment=ENVIRONMENT,
    )


@given(total=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_equals_scipy(total, share):
    count = round(share * total)
    ours = compute_wilson_interval(count, total)
    exact = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert ours == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert 0 <= ours.low <= count / total <= ours.high <= 1


def test_wilson_at_the_ends():
    assert compute_wilson_interval(0, 0) == (0, 1)
    assert compute_wilson_interval(0, 9).low == 0
    assert compute_wilson_interval(9, 9).high == 1


def test_classes_and_confusions():
    found = evaluation(
        table([0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 2, 2], [1, 1, 1, 1, 1, 1, 0])
    )
    assert (found.result.num_samples, found.result.top1_count) == (6, 2)
    # Ranks are 0 or 1, so the fixed-point losses are 1 or 2.
    assert found.result.loss == (2 * 1 + 4 * 2) / 6
    cat, dog, owl = found.compute_class_results()
    assert (cat.name, cat.num_samples, cat.top1_count, cat.top5_count) == (
        "cat",
        3,
        1,
        3,
    )
    assert dog.top1 == 1 / 3
    assert (owl.num_samples, owl.top1, owl.interval) == (0, 0, (0, 1))
    assert [tuple(row) for row in found.count_confusions()] == [
        ("cat", "dog", 2, 2 / 3),
        ("dog", "cat", 1, 1 / 3),
        ("dog", "owl", 1, 1 / 3),
    ]
    assert list_worst_classes(found.compute_class_results(), 1) == [cat]


def test_the_sums_of_the_classes_are_those_of_all():
    rng = np.random.default_rng(0)
    found = evaluation(
        table(rng.integers(0, 3, 200), rng.integers(0, 3, 200), rng.random(200) < 0.9)
    )
    rows = found.compute_class_results()
    assert sum(row.num_samples for row in rows) == found.result.num_samples
    assert sum(row.top1_count for row in rows) == found.result.top1_count
    wrong = sum(row.num_samples for row in found.count_confusions())
    assert wrong == found.result.num_samples - found.result.top1_count
    chosen = found.images.labels == 1
    assert found.images.summarize(chosen).top1_count == rows[1].top1_count


def test_json_is_plain_and_complete():
    found = evaluation(table([0, 1], [0, 1], finite=[True, False]))
    tree = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert tree["loss"] == {"name": "cross_entropy", "mean": None}
    assert math.isnan(found.result.loss)
    assert np.isnan(found.images.losses).tolist() == [False, True]
    assert tree["top1"]["count"] == 2
    assert tree["models"][0]["weights"] == "ab" * 32
    assert tree["hardware"]["differs_from_training"] == {}


def test_another_kind_of_hardware_is_named():
    trained_on = {**ENVIRONMENT, "device": "a GPU", "torch": "1"}
    found = evaluation(table([0], [0]), environment=trained_on)
    assert found.hardware_differences == {"device": ("a GPU", "a CPU")}
    differs = found.to_dict()["hardware"]["differs_from_training"]
    assert differs == {"device": {"training": "a GPU", "here": "a CPU"}}


def test_tables_are_merged_in_the_order_of_samples():
    whole = table([0, 1, 2, 0], [0, 1, 1, 0], [1, 0, 1, 1])
    columns = [name for name in vars(whole) if name != "bad_samples"]

    def part(rows):
        arrays = {name: getattr(whole, name)[rows] for name in columns}
        bad = {i: "junk" for i in whole.bad_samples if i in rows}
        return ImageTable(**arrays, bad_samples=bad)

    merged = ImageTable.merge([part([3, 1]), part([2]), part([0])])
    for name in columns:
        assert (getattr(merged, name) == getattr(whole, name)).all(), name
    assert merged.bad_samples == whole.bad_samples
