"""What a reader finds in a source, and the comparison of distrain with a plain reader."""

import io
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import seed as set_seed
from hypothesis.strategies import SearchStrategy
from PIL import Image

from distrain.data.prepare.open import open_source
from distrain.data.prepare.source import Reject
from distrain.errors import UserError

# What systems leave. Written down here again, so that a name that is lost from the list
# of distrain is missed.
JUNK = (
    ".DS_Store",
    "._0.jpg",
    ".hidden.png",
    "Thumbs.db",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "Desktop.ini",
    "Icon\r",
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    ".ipynb_checkpoints",
    "__pycache__",
    ".git",
    "#recycle",
    ".Trash-1000",
    "0.jpg:Zone.Identifier",
    "0.jpg@SynoEAStream",
    "~$notes.txt",
    "_SUCCESS",
)
IMAGE_SUFFIXES = ("jpg", "JPEG", "png", "Png", "webp", "tif", "gif", "bmp", "ppm")
RARE_SUFFIXES = ("avif", "JP2", "pgm", "jfif", "heic")
OTHER_SUFFIXES = ("txt", "csv", "json", "md", "pdf", "zip", "html")
LOSS = "lost without a word"


class Found(NamedTuple):
    """One image: where it is, its class, and its bytes."""

    name: str
    class_name: str
    data: bytes | str
    """`image N` for a file of the pool, which is easier to read."""


class Reading(NamedTuple):
    """What a source holds."""

    images: list[Found]
    classes: tuple[str, ...]
    rejects: list[str]
    """Name of each thing that is left out."""
    mentions: Sequence[str] = ()
    """Names that a note or a reject must hold."""
    counts: Sequence[str] = ()
    """Counts of what is passed over, as a note must have them."""


class Refusal(NamedTuple):
    """A source that cannot be read as it is."""

    names: list[str]
    """The message must hold one of these names."""


class Read(NamedTuple):
    """What distrain made of a source."""

    reading: Reading
    notes: list[str]


class Kind(NamedTuple):
    """One kind of sources: how to make one, and how to read it plainly."""

    cases: SearchStrategy[Any]
    write: Callable[[Any, Path], dict[str, Any]]
    """Write a case to a folder; returns arguments of `open_source`."""
    read: Callable[[Any, dict[str, Any]], Reading | Refusal]
    """The plain reader: gets the case and the arguments."""
    has_names: bool = True
    """Whether images have names of their own."""


@cache
def make_pool() -> tuple[bytes, ...]:
    """Files of 40 images, each of one color: no two have equal bytes."""
    pool: list[bytes] = []
    for i in range(40):
        sink = io.BytesIO()
        color = (6 * i, 255 - 6 * i, 37 * i % 256)
        Image.new("RGB", (5, 4), color).save(sink, ("JPEG", "PNG")[i % 2])
        pool.append(sink.getvalue())
    assert len(set(pool)) == len(pool)
    return tuple(pool)


def label_data(data: bytes) -> bytes | str:
    """The number of a file of the pool, or the bytes of another one."""
    pool = make_pool()
    return f"image {pool.index(data)}" if data in pool else data


def is_junk_path(path: str) -> bool:
    """Whether a part of a path is hidden or of what systems leave."""
    parts = [part for part in path.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part in JUNK for part in parts)


def get_suffix(name: str) -> str:
    """The last extension of a file, in lowercase."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def count_other_files(names: Iterable[str]) -> list[str]:
    """What a note says of files beside images that are none by their names."""
    counts = Counter(map(get_suffix, names))
    return [f" {count} .{suffix} (" for suffix, count in counts.items()]


def is_image_name(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return is_usual_image_name(name) or get_suffix(name).upper() in {
        suffix.upper() for suffix in RARE_SUFFIXES
    }


def is_usual_image_name(name: str) -> bool:
    """Whether it says so in one of the usual ways."""
    return get_suffix(name) in {suffix.lower() for suffix in IMAGE_SUFFIXES}


def escape(name: str) -> str:
    """A name of any bytes as text."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_mentioned(name: str, text: str) -> bool:
    """Whether a message holds a name, as it is or escaped."""
    forms = (name, escape(name), repr(name)[1:-1], ascii(name)[1:-1])
    return any(form in text for form in forms)


def read_with_distrain(options: dict[str, Any]) -> Read | str:
    """Read all images of a source; a refusal gives its message."""
    try:
        source = open_source(**options).source
    except UserError as error:
        return str(error)
    images: list[Found] = []
    rejects = [reject.name for reject in source.rejects]
    for block in source.blocks:
        rows = source.reader.read_block(block)
        if isinstance(rows, Reject):
            rejects.extend([rows.name] * rows.num_images)
            continue
        assert len(rows) == block.num_rows, f"{block.name}: {LOSS}"
        for row in rows:
            if isinstance(row, Reject):
                rejects.append(row.name)
            else:
                name = source.classes[row.label]
                images.append(Found(row.name, name, label_data(row.data)))
    return Read(Reading(images, source.classes, rejects), source.notes)


def compare(found: Read | str, expected: Reading | Refusal, *, has_names: bool) -> None:
    """Assert that distrain read what the plain reader did."""
    if isinstance(expected, Refusal):
        assert isinstance(found, str), f"not refused: {expected.names}"
        is_named = any(is_mentioned(name, found) for name in expected.names)
        assert is_named, f"{found!r} names none of {expected.names}"
        return
    assert not isinstance(found, str), f"refused: {found}"
    reading = found.reading

    # The images, their classes and their bytes.
    def strip(image: Found) -> Found:
        return image if has_names else image._replace(name="")

    assert sorted(map(strip, reading.images)) == sorted(map(strip, expected.images))
    assert reading.classes == expected.classes

    # What is left out.
    if has_names:
        assert sorted(reading.rejects) == sorted(expected.rejects)
    else:
        assert len(reading.rejects) == len(expected.rejects), reading.rejects
    text = "\n".join([*found.notes, *reading.rejects])
    # A long list names the first ones and counts the others.
    for name in sorted(expected.mentions)[:2]:
        assert is_mentioned(name, text), f"{name!r}: {LOSS} in {text!r}"
    for count in expected.counts:
        assert count in text, f"{count!r}: {LOSS} in {text!r}"


def check_case(kind: Kind, case: Any) -> None:
    """Write one case, and compare the two readers."""
    folder = Path(tempfile.mkdtemp(prefix="structure-"))
    try:
        options = kind.write(case, folder)
        expected = kind.read(case, options)
        found = read_with_distrain(options)
        note(f"expected {expected}")
        note(f"found {found}")
        compare(found, expected, has_names=kind.has_names)
    finally:
        shutil.rmtree(folder)


def run_cases(kind: Kind, seed: int, num_cases: int) -> int:
    """Check random cases of a kind; returns how many there were."""
    count = 0

    @set_seed(seed)
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.cases)
    def check(case: Any) -> None:
        nonlocal count
        count += 1
        check_case(kind, case)

    check()
    return count
