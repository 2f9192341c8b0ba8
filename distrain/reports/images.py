"""Images of a data set in a page, with what a network predicts of them."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import encode_png, open_rgb
from distrain.data.shards.dataset import Dataset
from distrain.inference.evaluation import Evaluation
from distrain.reports.html_page import escape
from distrain.reports.numbers import format_percent

_MAX_SIDE = 128
_JPEG_QUALITY = 85
_PIXEL_LIMIT = 1 << 28


def encode_data_url(data: bytes, kind: str) -> str:
    """Return the bytes of a file as a URL; kind is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def render_thumbnail(dataset: Dataset, sample_id: int, alt: str) -> str:
    """Return an image of a data set, at most 128 pixels wide and high."""
    row = dataset[sample_id]
    try:
        image = open_rgb(bytes(row.data), _PIXEL_LIMIT, dataset.manifest.reading)
    except BadImageError as error:
        return f"<p>{escape(error)}</p>"
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    url = encode_data_url(file.getvalue(), "jpeg")
    return f'<img src="{url}" alt="{escape(alt)}">'


def render_prediction(
    evaluation: Evaluation, dataset: Dataset, index: int, note: str = ""
) -> str:
    """Return a tile: an image, its class, and the five highest classes with bars.

    Args:
        evaluation: of the data set.
        dataset: where the images are.
        index: row of the image in `evaluation.images`.
        note: line below it.
    """
    images = evaluation.images
    label = int(images.labels[index])
    name = evaluation.classes[label]
    lines = []
    top = zip(images.top_classes[index], images.top_probabilities[index], strict=True)
    for number, probability in top:
        is_right = ' class="right"' if number == label else ""
        lines.append(
            f"<li{is_right}><span>{escape(evaluation.classes[number])}</span> "
            f"{format_percent(float(probability), 1)}"
            f'<i style="width:{100 * float(probability):.1f}%"></i></li>'
        )
    image = render_thumbnail(
        dataset, int(images.sample_ids[index]), f"image of class {name}"
    )
    shown_note = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<div class="tile">{image}<strong>{escape(name)}</strong>'
        f"<ol>{''.join(lines)}</ol>{shown_note}</div>"
    )


def render_tiles(tiles: Sequence[str]) -> str:
    """Return tiles side by side."""
    return f'<div class="tiles">{"".join(tiles)}</div>'


def render_filters(filters: NDArray[np.float32]) -> str:
    """Return the filters as one picture, in rows of 16.

    Each is scaled by its own extremes, with zero in the middle gray.

    Args:
        filters: shape (n, height, width, 3).
    """
    n, height, width, _ = filters.shape
    columns = min(16, n)
    rows = -(-n // columns)
    scale = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    scaled = filters / np.where(scale > 0, scale, 1)
    pixels = np.round(127.5 + 127.5 * scaled).astype(np.uint8)

    # A pixel between two filters, the same gray as zero.
    grid = np.full((rows * columns, height + 1, width + 1, 3), 128, np.uint8)
    grid[:n, :-1, :-1] = pixels
    grid = grid.reshape(rows, columns, height + 1, width + 1, 3).swapaxes(1, 2)
    sheet = grid.reshape(rows * (height + 1), columns * (width + 1), 3)
    url = encode_data_url(encode_png(np.ascontiguousarray(sheet)), "png")
    alt = f"{n} filters of {height} x {width} pixels"
    return f'<img class="filters" src="{url}" alt="{alt}">'
