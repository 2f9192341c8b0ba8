"""The same labelled images in every shape that `distrain pack` reads, made by the packages that people use."""

import io
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from photos import encoded, picture

CLASSES = ("n01440764", "n01443537", "n01484850")


class Image(NamedTuple):
    label: int
    name: str
    data: bytes


def images(each: int = 20) -> list[Image]:
    """Photographs of three classes, sorted by class."""
    return [
        Image(
            label,
            f"{name}_{i:03d}.JPEG",
            encoded(picture(100 * label + i, 40 + i, 60), quality=90),
        )
        for label, name in enumerate(CLASSES)
        for i in range(each)
    ]


def folder(place: Path, found: Sequence[Image]) -> str:
    for image in found:
        (place / "photos" / CLASSES[image.label]).mkdir(parents=True, exist_ok=True)
        (place / "photos" / CLASSES[image.label] / image.name).write_bytes(image.data)
    return str(place / "photos")


def zipped(place: Path, found: Sequence[Image]) -> str:
    with zipfile.ZipFile(place / "photos.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for image in found:
            file.writestr(f"train/{CLASSES[image.label]}/{image.name}", image.data)
    return f"zip://train::{place / 'photos.zip'}"


def tar_of(files: Sequence[tuple[str, bytes]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def tar_of_tars(place: Path, found: Sequence[Image]) -> str:
    inner = [
        (
            f"{name}.tar",
            tar_of(
                [(image.name, image.data) for image in found if image.label == label]
            ),
        )
        for label, name in enumerate(CLASSES)
    ]
    (place / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    return str(place / "ILSVRC2012_img_train.tar")


def webdataset(place: Path, found: Sequence[Image]) -> str:
    """By the webdataset package's own writer; labels as .cls and as .json by turns."""
    import webdataset as wds

    (place / "wds").mkdir()
    with wds.ShardWriter(
        f"file:{place}/wds/train-%04d.tar", maxcount=25, verbose=0
    ) as writer:
        for i, image in enumerate(found):
            label = (
                {"cls": image.label}
                if i % 2
                else {"json": {"label": image.label, "name": image.name}}
            )
            writer.write(
                {
                    "__key__": f"{CLASSES[image.label]}/{i:06d}",
                    "jpg": image.data,
                    **label,
                }
            )
    return str(place / "wds")


def hub(place: Path, found: Sequence[Image], column: str = "image") -> str:
    """By datasets' own writer."""
    import datasets

    datasets.disable_progress_bars()
    names = datasets.ClassLabel(names=list(CLASSES))
    features = datasets.Features(
        {"id": datasets.Value("int64"), column: datasets.Image(), "label": names}
    )
    rows = [
        {"id": i, column: {"bytes": im.data, "path": im.name}, "label": im.label}
        for i, im in enumerate(found)
    ]
    whole = datasets.Dataset.from_list(rows, features=features)
    (place / "hub").mkdir()
    for i in range(3):
        part = whole.shard(3, i, contiguous=True)
        part.to_parquet(
            str(place / "hub" / f"train-{i:05d}-of-00003.parquet"), batch_size=7
        )
    return str(place / "hub")


SHAPES = {
    "folder": folder,
    "zip": zipped,
    "archive of archives": tar_of_tars,
    "webdataset": webdataset,
    "hub": hub,
}
