"""What images come from: a list of blocks that can be read in any order, whatever holds them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

from distrain.data.shards.parquet import ColumnNames
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store
from distrain.errors import UserError

RETRY_SECONDS = 60.0
"""Seconds for which reading from a source, and writing what is made of it, is tried again."""
MAX_FILE_BYTES = 256 << 20
"""Bytes of an image file; what claims more is refused before it is read."""


class Block(NamedTuple):
    """What one read brings: an image file, or a row group of them."""

    path: str
    """Path in the source's store."""
    name: str
    """How the block is called in a list of what was refused."""
    label: int
    """Of an image file; rows of a group bring theirs along."""
    start: int | None
    """First byte; None: the whole file."""
    num_bytes: int
    """Bytes; 0 where they are not known."""
    num_rows: int = 1
    row_group: int = 0
    """Number of a row group in its file."""


class Sample(NamedTuple):
    """An image file and its label."""

    name: str
    label: int
    data: bytes


class Reject(NamedTuple):
    """Something that is left out, and why."""

    name: str
    reason: str


BlockRows: TypeAlias = list[Sample | Reject] | Reject
"""The rows of a block, or why it is left out as a whole."""


class DatasetProgress(NamedTuple):
    """How far it is."""

    done: int
    """Images, refused ones included."""
    total: int
    num_bytes: int
    """Of what was read, or made of them, so far."""


class BlockReader(Protocol):
    """Reads blocks; it can be sent to another process."""

    def read_block(self, block: Block) -> BlockRows:
        """The rows of a block. Raises OSError."""
        ...


@dataclass
class ImageSource:
    """A labelled set of images, its blocks in an order that depends on nothing but what is there."""

    store: Store
    format_name: str
    """For a person."""
    classes: tuple[str, ...]
    """Names by label."""
    blocks: list[Block]
    reader: BlockReader
    rejects: list[Reject] = field(default_factory=list)
    """What a look at the listing alone has refused."""
    plan_details: Any = None
    """What else the rows depend on, for JSON."""


class OpenedSource(NamedTuple):
    """A source, and how its Parquet files name their columns, if it is made of such."""

    source: ImageSource
    columns: ColumnNames | None


class SourceOptions(NamedTuple):
    """Options of a source, beside its URL."""

    labels_url: str | None
    """URL of a list of labels, or of the devkit of ILSVRC-2012."""
    image_column: str | None
    label_column: str | None


SourceOpener: TypeAlias = Callable[
    [Store, Sequence[DirectoryEntry], SourceOptions], OpenedSource
]
"""Opens files of one kind in a store. Raises UserError and OSError."""
OPENERS_BY_EXTENSION: dict[str, SourceOpener] = {}
"""Every kind of source, by the ending of its files; that of an empty ending opens a folder that has no such files."""


def register_opener(extension: str) -> Callable[[SourceOpener], SourceOpener]:
    """Register a function as what opens files of an ending, written without its dot."""

    def add_opener(opener: SourceOpener) -> SourceOpener:
        assert extension not in OPENERS_BY_EXTENSION, f"two functions open .{extension}"
        OPENERS_BY_EXTENSION[extension] = opener
        return opener

    return add_opener


def name_classes_by_number(count: int, store: Store) -> tuple[str, ...]:
    """Names of classes that have none: their numbers.

    Raises:
        UserError: there are far too many.
    """
    if count > 1 << 20:
        raise UserError(
            f"{store.redacted_url} has a label {count - 1}: labels are numbers from 0, one for each class"
        )
    return tuple(str(i) for i in range(count))


class FileReader:
    """Reads blocks that are a file, or a range of one."""

    def __init__(self, url: str) -> None:
        self._url, self._store = url, Store(url)

    def __reduce__(self) -> tuple[type["FileReader"], tuple[str]]:
        return FileReader, (self._url,)

    def read_block(self, block: Block) -> BlockRows:
        """The one row of a block. Raises OSError."""
        if block.start is None:
            data = self._store.read(block.path, retry_seconds=RETRY_SECONDS)
        else:
            data = self.read_range(
                block.path, block.start, block.start + block.num_bytes
            )
        return [Sample(block.name, block.label, data)]

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes start to end of a file. Raises OSError."""
        data = self._store.read(path, start, end, retry_seconds=RETRY_SECONDS)
        if len(data) != end - start:
            got = f"{len(data)} of {end - start} bytes"
            raise OSError(
                f"{self._store.redacted_url}/{path} gave {got}: it changed, or its server knows no ranges"
            )
        return data
