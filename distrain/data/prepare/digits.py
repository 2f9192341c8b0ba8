"""scikit-learn's scanned digits as a data set: what the quickstart trains on, with nothing to download."""

import numpy as np

from distrain.data.decoding.image import png
from distrain.data.prepare.pack import Geometry, Treatment, pack
from distrain.data.prepare.source import Block, Rows, Sample, Source
from distrain.data.shards.manifest import MANIFEST
from distrain.data.storage.store import Store
from distrain.errors import UserError

_TREATMENT = Treatment(Geometry("square", 72))


class _Scans:
    """Reads scans, PNG files in memory."""

    def __init__(self, files: list[bytes]) -> None:
        self._files = files

    def read(self, block: Block) -> Rows:
        """The one row of a block."""
        return [Sample(block.name, block.label, self._files[block.group])]


def pack_digits(train: str, val: str) -> None:
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
    reader = _Scans([png(scan) for scan in scans])
    parts: dict[str, list[Block]] = {train: [], val: []}
    for i, label in enumerate(digits.target.tolist()):
        name = f"digit-{i:04d}"
        parts[val if i % 5 == 4 else train].append(
            Block(name, name, label, None, 0, group=i)
        )
    for url, blocks in parts.items():
        store = Store(url)
        if not store.exists(MANIFEST):
            classes = tuple(map(str, digits.target_names))
            pack(
                Source(Store("memory://digits"), "digits", classes, blocks, reader),
                url,
                _TREATMENT,
            )
