"""Parquet files in the hub's layout as a source of images: `image: struct<bytes, path>` or bytes, `label: int`."""

import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from distrain.data.prepare.source import (
    FILE_LIMIT,
    PATIENCE,
    Block,
    Opened,
    Refused,
    Rows,
    Sample,
    Source,
    Wanted,
    numbered,
    opens,
)
from distrain.data.shards.parquet import (
    Columns,
    DamagedError,
    Features,
    Footer,
    Piece,
    binary,
    chunk,
    features,
    has_dictionary,
    parse_footer,
    read_footer,
    read_group,
    unpacked_bytes,
)
from distrain.data.storage.backend import Entry
from distrain.data.storage.store import Store
from distrain.errors import UserError

GROUP_LIMIT = 1 << 30
"""Bytes that the images of a row group may unpack to; what claims more is refused before it is read."""
ROW_LIMIT = 1 << 20
"""Rows of a row group."""
_AT_ONCE = 16
_OPEN = 8


class GroupReader:
    """Reads row groups."""

    def __init__(
        self, url: str, columns: Columns, classes: int, sizes: dict[str, int]
    ) -> None:
        """`sizes`: bytes of each file."""
        self._how = (url, columns, classes, sizes)
        self._store, self.columns, self._classes, self._sizes = (
            Store(url),
            columns,
            classes,
            sizes,
        )
        self._footers: OrderedDict[str, Footer] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(
        self,
    ) -> tuple[type["GroupReader"], tuple[str, Columns, int, dict[str, int]]]:
        return GroupReader, self._how

    def footer(self, path: str) -> Footer:
        """A file's footer. Raises OSError."""
        footer = self._footers.get(path)  # several threads ask
        if footer is None:
            try:
                footer = parse_footer(
                    read_footer(self._store, path, self._sizes[path], PATIENCE)[1]
                )
            except (DamagedError, UserError) as error:
                raise OSError(
                    f"{self._store.name}/{path} changed meanwhile: {error}"
                ) from None
            with self._lock:
                self._footers[path] = footer
                if len(self._footers) > _OPEN:
                    self._footers.popitem(last=False)
        return footer

    def read(self, block: Block) -> Rows:
        """The rows of a group. Raises OSError."""
        pieces = [self.piece(block, column) for column in self.columns]
        return self.rows(block, pieces)

    def piece(self, block: Block, column: str) -> Piece:
        """The bytes of a column of a group. Raises OSError."""
        start, end = chunk(self.footer(block.file), block.group, column)
        return Piece(start, self._store.read(block.file, start, end, patience=PATIENCE))

    def rows(self, block: Block, pieces: Sequence[Piece]) -> Rows:
        """The rows of a group whose columns were read; a damaged group is refused whole."""
        footer, size = self.footer(block.file), self._sizes[block.file]
        try:
            table = read_group(pieces, size, footer, block.group, self.columns)
        except DamagedError as error:
            return Refused(f"{block.name} of {block.rows} rows", str(error))
        if table.num_rows != block.rows:
            return Refused(
                f"{block.name} of {block.rows} rows",
                f"damaged row group: it has {table.num_rows} rows",
            )
        data, offsets = binary(table.column(self.columns.image.partition(".")[0]))
        labels = table.column(self.columns.label).to_pylist()
        rows: list[Sample | Refused] = []
        for i, label in enumerate(labels):
            name = f"{block.name} row {i}"
            length = offsets[i + 1] - offsets[i]
            if not length:
                rows.append(Refused(name, "no bytes"))
            elif length > FILE_LIMIT:
                rows.append(
                    Refused(name, f"{length} bytes are over the limit of {FILE_LIMIT}")
                )
            elif label is None or not 0 <= label < self._classes:
                rows.append(
                    Refused(name, f"label {label} is none of {self._classes} classes")
                )
            else:
                rows.append(
                    Sample(name, label, bytes(data[offsets[i] : offsets[i + 1]]))
                )
        return rows


@opens("parquet")
def open_parquet(store: Store, files: Sequence[Entry], wanted: Wanted) -> Opened:
    """Hub Parquet as a source.

    Raises:
        UserError: the files do not hold labelled images, or not all of one kind.
        OSError: they cannot be read.
    """
    sizes = {
        file.name: store.size(file.name) if file.size is None else file.size
        for file in files
    }

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        raw = list(
            pool.map(
                lambda name: read_footer(store, name, sizes[name], PATIENCE)[1], sizes
            )
        )
    footers = [
        _parsed(store, name, data) for name, data in zip(sizes, raw, strict=True)
    ]
    expected: Features | None = None
    blocks, refused = list[Block](), list[Refused]()
    for name, footer in zip(sizes, footers, strict=True):
        here = features(
            footer, f"{store.name}/{name}", wanted.image_column, wanted.label_column
        )
        expected = expected or here
        if here != expected:
            first = next(iter(sizes))
            raise UserError(
                f"{store.name}: {name} has other columns or class names than {first}: take one kind"
            )
        for g in range(footer.num_row_groups):
            block = Block(
                name, f"{name} row group {g}", -1, 0, 0, footer.row_group(g).num_rows, g
            )
            reason = _too_much(footer, block, expected.columns, sizes[name])
            if reason is not None:
                refused.append(Refused(block.name, reason))
            elif block.rows:
                start, end = chunk(footer, g, expected.columns.image)
                blocks.append(block._replace(start=start, size=end - start))
    assert expected is not None
    classes = expected.classes or _numbered(
        store, sizes, footers, expected.columns.label, blocks
    )
    reader = GroupReader(store.url, expected.columns, len(classes), sizes)
    details = [expected.columns, [zlib.crc32(data) for data in raw]]
    return Opened(
        Source(store, "Parquet", classes, blocks, reader, refused, details),
        expected.columns,
    )


def _too_much(footer: Footer, block: Block, columns: Columns, size: int) -> str | None:
    """Why a row group is not read: what its footer says of it is beyond limits, or beyond its file."""
    if not 0 <= block.rows <= ROW_LIMIT:
        return f"its {block.rows} rows are over the limit of {ROW_LIMIT}"
    for column in columns:
        start, end = chunk(footer, block.group, column)
        if not 0 <= start <= end <= size:
            return f"its column {column} lies outside the file"
        claimed = unpacked_bytes(footer, block.group, column)
        if not 0 <= claimed <= GROUP_LIMIT:
            return f"its {block.rows} rows say {claimed} bytes, over the limit of {GROUP_LIMIT}"
        if (
            column == columns.image
            and has_dictionary(footer, block.group, column)
            and block.rows * claimed > GROUP_LIMIT
        ):
            return f"its {block.rows} rows may repeat {claimed} bytes, over the limit of {GROUP_LIMIT}"
    return None


def _parsed(store: Store, name: str, data: bytes) -> Footer:
    try:
        return parse_footer(data)
    except DamagedError as error:
        raise UserError(
            f"{store.name}/{name} cannot be read ({error}): fetch it again"
        ) from None


def _numbered(
    store: Store,
    sizes: dict[str, int],
    footers: Sequence[Footer],
    column: str,
    blocks: Sequence[Block],
) -> tuple[str, ...]:
    """Names for labels that have none: their numbers. The columns of labels are read for it."""

    read: dict[str, set[int]] = {name: set() for name in sizes}
    for block in blocks:
        read[block.file].add(block.group)

    def largest(file: tuple[str, Footer]) -> int:
        name, footer = file
        most = -1
        for g in range(footer.num_row_groups):
            if g not in read[name]:
                continue
            start, end = chunk(footer, g, column)
            piece = Piece(start, store.read(name, start, end, patience=PATIENCE))
            try:
                labels = read_group([piece], sizes[name], footer, g, [column]).column(
                    column
                )
            except DamagedError as error:
                raise UserError(
                    f"{store.name}/{name} has labels that cannot be read ({error}): fetch it again"
                ) from None
            most = max(
                [most, *(label for label in labels.to_pylist() if label is not None)]
            )
        return most

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        count = 1 + max(pool.map(largest, zip(sizes, footers, strict=True)))
    return numbered(count, store)
