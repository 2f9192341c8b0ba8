"""Sections of a report that need the model, and most of them the data, too."""

import numpy as np
from numpy.typing import NDArray

from distrain.data.shards.dataset import Dataset
from distrain.errors import AttemptError, RunError, UserError
from distrain.inference.evaluation import Evaluation
from distrain.inference.features import compute_features, get_first_filters
from distrain.inference.scoring import fit_to_images
from distrain.inference.trained_model import TrainedModel
from distrain.reports.class_charts import render_classes
from distrain.reports.html_page import (
    Section,
    escape,
    render_figure,
    render_paragraph,
    render_table,
)
from distrain.reports.images import (
    render_filters,
    render_prediction,
    render_thumbnail,
    render_tiles,
)
from distrain.reports.numbers import format_number, format_percent
from distrain.training.run_data import open_dataset

_NUM_IMAGES = 5
_NUM_NEIGHBORS = 6
# Images among which neighbors are looked for: their distances take n x n numbers.
_MAX_FEATURE_IMAGES = 2000
_NUM_SUSPICIOUS = 20


def render_filter_section(model: TrainedModel) -> Section:
    """Return the first layer's filters (figure 3 of the AlexNet paper)."""
    filters = get_first_filters(model.module)
    if filters is None:
        body = render_paragraph(
            "The network's first convolution does not take RGB pixels.", "note"
        )
    else:
        note = "Each is scaled by its own extremes; gray is zero."
        body = render_figure(f"{len(filters)} filters", render_filters(filters), note)
    return Section("filters", "Filters of the first layer", body)


def render_evaluation_sections(
    model: TrainedModel, evaluation: Evaluation, data_url: str
) -> list[Section]:
    """Return what an evaluation shows: classes, images, neighbors, labels.

    Args:
        model: the network.
        evaluation: its result.
        data_url: data set of the evaluation.

    Raises:
        UserError: the data set is gone.
        AttemptError: it cannot be read.
    """
    model = fit_to_images(model, data_url)
    config = model.config
    dataset = open_dataset(
        data_url,
        config.data,
        config.augment,
        sequential_batch_size=config.evaluate.batch,
    )
    summary = _render_summary(evaluation)
    if not evaluation.result.num_samples:
        return [Section("classes", "Evaluation", summary)]
    return [
        Section("classes", "Evaluation", summary + render_classes(evaluation)),
        Section(
            "images", "Images and predictions", _render_images(evaluation, dataset)
        ),
        Section(
            "neighbors",
            "Nearest neighbors in the last hidden layer",
            _render_neighbors(model, evaluation, dataset),
        ),
        Section("labels", "Suspicious labels", _render_labels(evaluation, dataset)),
    ]


def _render_summary(evaluation: Evaluation) -> str:
    """Return the numbers that `distrain eval` prints."""
    result = evaluation.result
    top1, top5 = evaluation.top1_interval, evaluation.top5_interval
    rows = [
        ("data", evaluation.data, ""),
        ("images", f"{result.num_samples:,}", ""),
        ("top-1", format_percent(result.top1), f"{top1.low:.2%} to {top1.high:.2%}"),
        ("top-5", format_percent(result.top5), f"{top5.low:.2%} to {top5.high:.2%}"),
        (f"loss ({evaluation.loss_name})", format_number(result.loss), ""),
        ("images that do not decode", f"{len(evaluation.left_out):,}", ""),
    ]
    header = ("what", "value", "95% interval")
    origin = evaluation.origins[0]
    caption = f"Evaluation of {origin.checkpoint}, center crops"
    return render_table(caption, header, rows, num_text_columns=3)


def _render_images(evaluation: Evaluation, dataset: Dataset) -> str:
    """Return the images of lowest, median and highest loss (figure 4, left)."""
    losses = evaluation.images.losses
    known = np.flatnonzero(np.isfinite(losses))
    order = known[np.argsort(losses[known], kind="stable")]
    middle = max(0, (len(order) - _NUM_IMAGES) // 2)
    groups = (
        ("Best: lowest loss", order[:_NUM_IMAGES]),
        ("Typical: median loss", order[middle : middle + _NUM_IMAGES]),
        ("Worst: highest loss", order[::-1][:_NUM_IMAGES]),
    )
    parts = []
    for title, indices in groups:
        tiles = [
            render_prediction(
                evaluation, dataset, int(i), f"loss {format_number(losses[i])}"
            )
            for i in indices
        ]
        parts.append(f"<h3>{escape(title)}</h3>{render_tiles(tiles)}")
    return "".join(parts)


def _render_neighbors(
    model: TrainedModel, evaluation: Evaluation, dataset: Dataset
) -> str:
    """Return images with those of the least distance in features (figure 4, right)."""
    images = evaluation.images
    valid = np.flatnonzero(images.is_valid)
    # Evenly spread over the data set.
    num_chosen = min(len(valid), _MAX_FEATURE_IMAGES)
    chosen = valid[np.linspace(0, len(valid) - 1, num_chosen).astype(np.int64)]
    try:
        features = compute_features(model, dataset, images.sample_ids[chosen])
    except UserError as error:
        return render_paragraph(f"Not computed: {error}.", "note")
    queries = np.linspace(0, num_chosen - 1, min(_NUM_IMAGES, num_chosen))

    rows = []
    for query in dict.fromkeys(queries.astype(np.int64).tolist()):
        nearest = find_nearest(features, query, _NUM_NEIGHBORS)
        tiles = []
        for i in (query, *nearest):
            index = int(chosen[i])
            name = evaluation.classes[int(images.labels[index])]
            picture = render_thumbnail(
                dataset, int(images.sample_ids[index]), f"image of class {name}"
            )
            tiles.append(
                f'<div class="tile">{picture}<strong>{escape(name)}</strong></div>'
            )
        rows.append(f'<div class="tiles neighbors">{"".join(tiles)}</div>')
    note = (
        f"First in each row: an image; then its {_NUM_NEIGHBORS} nearest of "
        f"{num_chosen:,} images of the same data set, by Euclidean distance."
    )
    return render_paragraph(note, "note") + "".join(rows)


def find_nearest(features: NDArray[np.float32], query: int, count: int) -> list[int]:
    """Return the rows nearest to a row, the nearest first, without the row itself.

    Args:
        features: shape (n, d).
        query: the row.
        count: rows to return at most.
    """
    differences = features.astype(np.float64) - features[query]
    distances = np.square(differences).sum(axis=1)
    order = np.argsort(distances, kind="stable")
    nearest: list[int] = order[order != query][:count].tolist()
    return nearest


def _render_labels(evaluation: Evaluation, dataset: Dataset) -> str:
    """Return the images of which the network is most sure that the label is wrong."""
    images = evaluation.images
    wrong = np.flatnonzero(images.is_valid & (images.ranks > 0))
    sureness = images.top_probabilities[wrong, 0]
    suspicious = wrong[np.argsort(-sureness, kind="stable")][:_NUM_SUSPICIOUS]
    if not len(suspicious):
        return render_paragraph("No prediction is wrong.")
    tiles = [
        render_prediction(
            evaluation,
            dataset,
            int(i),
            dataset.describe_sample(int(images.sample_ids[i])),
        )
        for i in suspicious
    ]
    note = (
        "Wrong predictions of the highest probability: the label or the network is "
        "mistaken. Below each, where the image is stored."
    )
    return render_paragraph(note, "note") + render_tiles(tiles)


EXPECTED_ERRORS = (UserError, RunError, AttemptError, OSError)
"""What keeps a section from being made; the report says why."""
