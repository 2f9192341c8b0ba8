"""Write the Parquet files beside this one, with packages that the tests do not have.

    pip install polars fastparquet pandas pillow
    python tests/data/prepare/files/make_parquet.py

They were written by polars 2.1.0 and fastparquet 2026.9.0.
"""

import io
from pathlib import Path

import fastparquet
import pandas as pd
import polars as pl
from PIL import Image

FOLDER = Path(__file__).parent
LABELS = ["cat", "dog", "dog", "cat"]


def png(i: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 6), (i * 40, 10, 200 - i * 30)).save(sink, "PNG")
    return sink.getvalue()


IMAGES = [png(i) for i in range(4)]
LISTS = pl.Series([list(data) for data in IMAGES], dtype=pl.List(pl.UInt8))

for name, image, label in [
    ("polars_binary", IMAGES, pl.Series(LABELS, dtype=pl.Categorical)),
    ("polars_lists", LISTS, pl.Series(LABELS, dtype=pl.Enum(["dog", "cat"]))),
    ("polars_struct", [{"bytes": data, "path": "x"} for data in IMAGES], LABELS),
]:
    frame = pl.DataFrame({"image": image, "label": label})
    frame.write_parquet(FOLDER / f"{name}.parquet")

fastparquet.write(
    str(FOLDER / "fastparquet_category.parquet"),
    pd.DataFrame({"image": IMAGES, "label": pd.Categorical(LABELS)}),
)
fastparquet.write(
    str(FOLDER / "fastparquet_bytes.parquet"),
    pd.DataFrame({"image": IMAGES, "label": [label.encode() for label in LABELS]}),
    object_encoding="bytes",
)
