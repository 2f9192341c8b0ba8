"""scikit-learn's scanned digits as a data set: what the quickstart trains on, with nothing to download."""

import numpy as np

from distrain.data.decoding.image import encode_png
from distrain.data.prepare.pack import Geometry, PackOptions, pack_dataset
from distrain.data.prepare.source import Block, BlockRows, ImageSource, Sample
from distrain.data.shards.manifest import MANIFEST_FILE
from distrain.data.storage.store import Store
from distrain.errors import UserError

_PACK_OPTIONS = PackOptions(Geometry("square", 72))


class _DigitReader:
    """Reads scans, PNG files in memory."""

    def __init__(self, png_files: list[bytes]) -> None:
        self._png_files = png_files

    def read_block(self, block: Block) -> BlockRows:
        """The one row of a block."""
        return [Sample(block.name, block.label, self._png_files[block.row_group])]


def pack_digits(train_url: str, val_url: str) -> None:
    """Pack the 1,797 digits (8 x 8 grey, enlarged to 72 x 72): every fifth is for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits come with scikit-learn: pip install 'distrain[quickstart]'"
        ) from None
    digits = load_digits()
    # scans: (1797, 8, 8, 3), 0 to 255
    scans = np.repeat(
        (digits.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=3
    )
    reader = _DigitReader([encode_png(scan) for scan in scans])
    parts: dict[str, list[Block]] = {train_url: [], val_url: []}
    for i, label in enumerate(digits.target.tolist()):
        name = f"digit-{i:04d}"
        parts[val_url if i % 5 == 4 else train_url].append(
            Block(name, name, label, None, 0, row_group=i)
        )
    for url, blocks in parts.items():
        store = Store(url)
        if not store.exists(MANIFEST_FILE):
            classes = tuple(map(str, digits.target_names))
            pack_dataset(
                ImageSource(
                    Store("memory://digits"), "digits", classes, blocks, reader
                ),
                url,
                _PACK_OPTIONS,
            )
