"""Sources of images: a list of blocks that can be read in any order, in any layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

from distrain.data.shards.parquet import ColumnNames
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store
from distrain.errors import UserError

RETRY_SECONDS = 60.0
"""Seconds for which reads from a source and writes of the result are retried."""
MAX_FILE_BYTES = 256 << 20
"""Largest image file in bytes; one that claims more is rejected before it is read."""
_MAX_CLASSES = 1 << 20


class Block(NamedTuple):
    """Unit of reading: one image file, or one row group of image files."""

    path: str
    """Path in the source's store."""
    name: str
    """Display name, for the list of rejects."""
    label: int
    """Label of an image file; -1 for a row group, whose rows have their own labels."""
    start: int | None
    """First byte in the file; None: the block is the whole file."""
    num_bytes: int
    """Size in bytes; 0 if unknown."""
    num_rows: int = 1
    row_group: int = 0
    """Index of the row group in its file."""


class Sample(NamedTuple):
    """Image file and its label."""

    name: str
    label: int
    data: bytes


class Reject(NamedTuple):
    """Image, or part of a source, that is left out, and the reason."""

    name: str
    reason: str
    num_images: int = 1
    """Number of images that are left out with it, such as the rows of a row group."""


BlockRows: TypeAlias = list[Sample | Reject] | Reject
"""Rows of a block, or the reason why the whole block is left out."""


class DatasetProgress(NamedTuple):
    """Progress of one pass over a data set."""

    done: int
    """Images processed so far, rejects included."""
    total: int
    num_bytes: int
    """Bytes read (index, verify) or encoded (pack) so far by this process; 0 where they
    are not counted."""
    stage: str = ""
    """What is being done, where a command goes over the images several times."""


class BlockReader(Protocol):
    """Reader of blocks; it can be sent to another process."""

    def read_block(self, block: Block) -> BlockRows:
        """Read the rows of a block. Raises OSError."""
        ...


@dataclass
class ImageSource:
    """Labeled set of images; the order of its blocks depends on its contents alone."""

    store: Store
    format_name: str
    """Name of the layout, for messages."""
    classes: tuple[str, ...]
    """Class names by label."""
    blocks: list[Block]
    reader: BlockReader
    rejects: list[Reject] = field(default_factory=list)
    """Files and row groups that were rejected without reading their images."""
    plan_details: Any = None
    """JSON value of everything else that the rows depend on."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about the source: one sentence each."""
    planned_blocks: list[Block] | None = None
    """What the plan of a data set names instead of `blocks`, which are selected."""
    location: str = ""
    """Folder, file or pattern as the user gave it, for messages."""


class OpenedSource(NamedTuple):
    """Source, and the column names of its Parquet files (None for other layouts)."""

    source: ImageSource
    columns: ColumnNames | None


class SourceOptions(NamedTuple):
    """Options of a source, besides its URL."""

    labels_url: str | None
    """URL of a list of labels, or of the devkit of ILSVRC-2012."""
    image_column: str | None
    label_column: str | None


SourceOpener: TypeAlias = Callable[
    [Store, Sequence[DirectoryEntry], SourceOptions], OpenedSource
]
"""Function that opens files of one kind in a store. Raises UserError and OSError."""
OPENERS_BY_EXTENSION: dict[str, SourceOpener] = {}
"""Opener of each file extension; the empty one opens a folder without such files."""


def register_opener(extension: str) -> Callable[[SourceOpener], SourceOpener]:
    """Register the decorated function for files of an extension (without its dot)."""

    def add_opener(opener: SourceOpener) -> SourceOpener:
        assert extension not in OPENERS_BY_EXTENSION, f"two functions open .{extension}"
        OPENERS_BY_EXTENSION[extension] = opener
        return opener

    return add_opener


def name_classes_by_number(count: int, store: Store) -> tuple[str, ...]:
    """Return "0", "1", ... as the names of `count` classes that have no names.

    Raises:
        UserError: there are more than a million classes.
    """
    # One stray label would otherwise make a tuple of billions of names.
    if count > _MAX_CLASSES:
        raise UserError(
            f"{store.redacted_url} has the label {count - 1}, which is too large: "
            "labels are numbers from 0, one per class"
        )
    return tuple(str(i) for i in range(count))


class FileReader:
    """Reader of blocks that are one image file each, or a byte range of a file."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._store = Store(url)

    # A store holds locks and connections, so each process opens one for itself.
    def __reduce__(self) -> tuple[type["FileReader"], tuple[str]]:
        return FileReader, (self._url,)

    def read_block(self, block: Block) -> BlockRows:
        """Read the only row of a block. Raises OSError."""
        if block.start is None:
            data = self._store.read(block.path, retry_seconds=RETRY_SECONDS)
        else:
            end = block.start + block.num_bytes
            data = self.read_range(block.path, block.start, end)
        return [Sample(block.name, block.label, data)]

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Read bytes start to end of a file. Raises OSError."""
        data = self._store.read(path, start, end, retry_seconds=RETRY_SECONDS)
        # A server that ignores ranges sends the whole file; a shrunken file is short.
        if len(data) != end - start:
            raise OSError(
                f"{self._store.redacted_url}/{path} returned {len(data)} of "
                f"{end - start} bytes: it changed, or its server does not support "
                "range requests"
            )
        return data
