"""All kinds of sources that are fuzzed, and how many cases of each CI runs."""

from structure.archives import LABELED, NESTED
from structure.common import Kind
from structure.folders import FOLDERS
from structure.names import SHARD_NAMES
from structure.parquets import PARQUET
from structure.tars import CLASS_FOLDER_TARS, SAMPLES

KINDS: dict[str, Kind] = {
    "folders": FOLDERS,
    "samples": SAMPLES,
    "class folder tars": CLASS_FOLDER_TARS,
    "archives of archives": NESTED,
    "labeled archives": LABELED,
    "parquet": PARQUET,
    "shard names": SHARD_NAMES,
}
NUM_CASES = {
    "folders": 500,
    "samples": 400,
    "class folder tars": 300,
    "archives of archives": 150,
    "labeled archives": 150,
    "parquet": 350,
    "shard names": 150,
}
"""Cases of each kind in CI: 2,000 in all."""
