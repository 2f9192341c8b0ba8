import numpy as np
import pytest

from distrain.inference.evaluation import Evaluation
from distrain.inference.image_table import ImageTable
from distrain.reports.class_charts import render_classes


def make_evaluation(labels, predicted, classes):
    labels, predicted = np.array(labels), np.array(predicted)
    n = len(labels)
    images = ImageTable(
        sample_ids=np.arange(n),
        labels=labels,
        is_valid=np.ones(n, bool),
        ranks=(labels != predicted).astype(np.int64),
        fixed_losses=np.ones(n, np.int64),
        is_finite=np.ones(n, bool),
        top_classes=np.stack([predicted, labels], 1),
        top_probabilities=np.tile([0.75, 0.25], (n, 1)),
        bad_samples={},
    )
    return Evaluation(
        origins=(),
        data="shards/val",
        data_fingerprint="",
        crops="center",
        loss_name="cross_entropy",
        settings={},
        classes=tuple(classes),
        result=images.summarize(),
        images=images,
        left_out={},
        hardware_hash="",
        environment={},
    )


@pytest.mark.parametrize("n", [2, 25, 26, 100, 101, 1000])
def test_the_confusion_is_a_picture_up_to_100_classes(n):
    labels = np.arange(n)
    predicted = np.where(labels == 1, 0, labels)
    html = render_classes(make_evaluation(labels, predicted, map(str, range(n))))
    assert ('id="confusion-figure_1"' in html) == (n <= 100)
    assert "<td>1</td><td>0</td>" in html
    assert html.count("<tr>") == 1 + n + 1 + 1
    assert "lowest: 1, 0.00%" in html


def test_names_of_classes_are_text_in_charts_too():
    """Markup, formulas of matplotlib, characters that its font lacks, long names."""
    classes = ["<b>&", "$x^2$", "猫", "_under", "a" * 40]
    html = render_classes(make_evaluation([0, 1, 2, 3, 4], [1, 1, 2, 3, 4], classes))
    for text in ("&lt;b&gt;&amp;", "$x^2$", "猫", "_under", "a" * 23 + "…"):
        assert html.count(f">{text}</text>") >= 2, text
    assert "<b>" not in html


def test_nothing_is_confused():
    html = render_classes(make_evaluation([0, 1], [0, 1], "ab"))
    assert "No image is confused." in html


def test_at_most_200_pairs_are_listed():
    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
    labels = [label for label, _ in pairs]
    predicted = [other for _, other in pairs]
    html = render_classes(make_evaluation(labels, predicted, "abcdefghijklmnopqrst"))
    assert "Most frequent confusions, 200 of 380 pairs (200 rows)" in html
