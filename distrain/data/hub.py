"""Parquet files in the hub's layout as a source of images: `image: struct<bytes, path>` or bytes, `label: int`."""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from distrain.data.parquet import (
    Columns,
    DamagedError,
    Features,
    Footer,
    Piece,
    binary,
    chunk,
    features,
    parse_footer,
    read_footer,
    read_group,
    unpacked_bytes,
)
from distrain.data.source import FILE_LIMIT, PATIENCE, Block, Refused, Sample, Source
from distrain.data.store import Entry, Store
from distrain.errors import UserError

GROUP_LIMIT = 1 << 30
"""Bytes that the images of a row group may unpack to; what claims more is refused before it is read."""
_AT_ONCE = 16
_OPEN = 8


class GroupReader:
    """Reads row groups."""

    def __init__(self, url: str, columns: Columns, classes: int, sizes: dict[str, int]) -> None:
        """`sizes`: bytes of each file."""
        self._how = (url, columns, classes, sizes)
        self._store, self.columns, self._classes, self._sizes = Store(url), columns, classes, sizes
        self._footers: OrderedDict[str, Footer] = OrderedDict()

    def __reduce__(self) -> tuple[type["GroupReader"], tuple[str, Columns, int, dict[str, int]]]:
        return GroupReader, self._how

    def footer(self, path: str) -> Footer:
        """A file's footer. Raises OSError."""
        if path not in self._footers:
            self._footers[path] = parse_footer(read_footer(self._store, path, self._sizes[path], PATIENCE)[1])
            if len(self._footers) > _OPEN:
                self._footers.popitem(last=False)
        return self._footers[path]

    def read(self, block: Block) -> list[Sample | Refused]:
        """The rows of a group. Raises OSError."""
        pieces = [self.piece(block, column) for column in self.columns]
        return self.rows(block, pieces)

    def piece(self, block: Block, column: str) -> Piece:
        """The bytes of a column of a group. Raises OSError."""
        start, end = chunk(self.footer(block.file), block.group, column)
        return Piece(start, self._store.read(block.file, start, end, patience=PATIENCE))

    def rows(self, block: Block, pieces: Sequence[Piece]) -> list[Sample | Refused]:
        """The rows of a group whose columns were read; a damaged group is refused whole."""
        footer, size = self.footer(block.file), self._sizes[block.file]
        try:
            table = read_group(pieces, size, footer, block.group, self.columns)
        except DamagedError as error:
            return [Refused(f"{block.name} of {block.rows} rows", str(error))]
        data, offsets = binary(table.column(self.columns.image.partition(".")[0]))
        labels = table.column(self.columns.label).to_pylist()
        rows: list[Sample | Refused] = []
        for i, label in enumerate(labels):
            name = f"{block.name} row {i}"
            length = offsets[i + 1] - offsets[i]
            if not length:
                rows.append(Refused(name, "no bytes"))
            elif length > FILE_LIMIT:
                rows.append(Refused(name, f"{length} bytes are over the limit of {FILE_LIMIT}"))
            elif label is None or not 0 <= label < self._classes:
                rows.append(Refused(name, f"label {label} is none of {self._classes} classes"))
            else:
                rows.append(Sample(name, label, bytes(data[offsets[i] : offsets[i + 1]])))
        return rows


def open_parquet(
    store: Store, files: Sequence[Entry], image_column: str | None, label_column: str | None
) -> tuple[Source, Columns]:
    """Hub Parquet as a source.

    Raises:
        UserError: the files do not hold labelled images, or not all of one kind.
        OSError: they cannot be read.
    """
    sizes = {file.name: store.size(file.name) if file.size is None else file.size for file in files}

    def footer_of(name: str) -> Footer:
        try:
            return parse_footer(read_footer(store, name, sizes[name], PATIENCE)[1])
        except DamagedError as error:
            raise UserError(f"{store.name}/{name} cannot be read ({error}): fetch it again") from None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        footers = list(pool.map(footer_of, sizes))
    told: Features | None = None
    blocks, refused = list[Block](), list[Refused]()
    for name, footer in zip(sizes, footers, strict=True):
        here = features(footer, f"{store.name}/{name}", image_column, label_column)
        told = told or here
        if here != told:
            first = next(iter(sizes))
            raise UserError(f"{store.name}: {name} has other columns or class names than {first}: take one kind")
        for g in range(footer.num_row_groups):
            where, claimed = f"{name} row group {g}", unpacked_bytes(footer, g, told.columns.image)
            start, end = chunk(footer, g, told.columns.image)
            rows = footer.row_group(g).num_rows
            if claimed > GROUP_LIMIT:
                refused.append(
                    Refused(where, f"its {rows} images say {claimed} bytes, over the limit of {GROUP_LIMIT}")
                )
            elif rows:
                blocks.append(Block(name, where, -1, start, end - start, rows, g))
    assert told is not None
    classes = told.classes or _numbered(store, sizes, footers, told.columns.label)
    reader = GroupReader(store.url, told.columns, len(classes), sizes)
    return Source(store, "Parquet", classes, blocks, reader, refused), told.columns


def _numbered(store: Store, sizes: dict[str, int], footers: Sequence[Footer], column: str) -> tuple[str, ...]:
    """Names for labels that have none: their numbers. The columns of labels are read for it."""

    def largest(file: tuple[str, Footer]) -> int:
        name, footer = file
        most = -1
        for g in range(footer.num_row_groups):
            start, end = chunk(footer, g, column)
            piece = Piece(start, store.read(name, start, end, patience=PATIENCE))
            labels = read_group([piece], sizes[name], footer, g, [column]).column(column)
            most = max([most, *(label for label in labels.to_pylist() if label is not None)])
        return most

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        count = 1 + max(pool.map(largest, zip(sizes, footers, strict=True)))
    return numbered(count, store)


def numbered(count: int, store: Store) -> tuple[str, ...]:
    """Names of classes that have none.

    Raises:
        UserError: there are far too many.
    """
    if count > 1 << 20:
        raise UserError(f"{store.name} has a label {count - 1}: labels are numbers from 0, one for each class")
    return tuple(str(i) for i in range(count))
