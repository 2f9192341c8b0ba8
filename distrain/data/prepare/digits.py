"""scikit-learn's scanned digits, for the quickstart: a data set without a download."""

import numpy as np

from distrain.data.decoding.image import encode_png
from distrain.data.prepare.pack import pack_dataset
from distrain.data.prepare.pack_options import Geometry, PackOptions
from distrain.data.prepare.source import Block, BlockRows, ImageSource, Sample
from distrain.data.shards.manifest import MANIFEST_FILE
from distrain.data.storage.store import Store
from distrain.errors import UserError

_PACK_OPTIONS = PackOptions(Geometry("square", 72))


class _DigitReader:
    """Reader of scans, which are PNG files in memory."""

    def __init__(self, png_files: list[bytes]) -> None:
        self._png_files = png_files

    def read_block(self, block: Block) -> BlockRows:
        """Return the only row of a block."""
        return [Sample(block.name, block.label, self._png_files[block.row_group])]


def pack_digits(train_url: str, val_url: str) -> None:
    """Pack the 1,797 digits (8 x 8 gray, enlarged to 72 x 72) into two data sets.

    Every fifth digit is for validation. A set that exists already is left as it is.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits data set comes with scikit-learn, which is not installed: "
            "pip install 'distrain[quickstart]'"
        ) from None

    # Scale the gray levels from 0..16 to 0..255; scans: (1797, 8, 8, 3)
    digits = load_digits()
    gray = (digits.images * (255 / 16)).round().astype(np.uint8)
    scans = np.repeat(gray[..., None], 3, axis=3)
    reader = _DigitReader([encode_png(scan) for scan in scans])

    # Split: `row_group` is the index of a scan in the reader.
    blocks_by_url: dict[str, list[Block]] = {train_url: [], val_url: []}
    for i, label in enumerate(digits.target.tolist()):
        name = f"digit-{i:04d}"
        block = Block(name, name, label, None, 0, row_group=i)
        blocks_by_url[val_url if i % 5 == 4 else train_url].append(block)

    # memory:// keeps pack in this process, the only one that has the scans.
    source_store = Store("memory://digits")
    classes = tuple(map(str, digits.target_names))
    for url, blocks in blocks_by_url.items():
        if not Store(url).exists(MANIFEST_FILE):
            source = ImageSource(source_store, "digits", classes, blocks, reader)
            pack_dataset(source, url, _PACK_OPTIONS)
