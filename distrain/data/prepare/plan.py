"""Plan of a data set: everything that it is made from, to recognize it later.

An unfinished pack keeps its plan in `.pack` (see `pack_notes`). A finished data set
keeps the plan's SHA-256 beside its manifest: the same command then finds it complete.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from distrain.data.decoding.image import describe_codecs
from distrain.data.decoding.pixel_hash import HASH_NAME
from distrain.data.prepare.source import RETRY_SECONDS, ImageSource
from distrain.data.shards.manifest import MANIFEST_FILE, READING, Manifest
from distrain.data.storage.store import Store

PLAN_FILE = "plan.json"


def encode_plan(source: ImageSource, options: Mapping[str, Any]) -> bytes:
    """Encode everything that a data set depends on as JSON."""
    digest = hashlib.sha256()
    for block in source.planned_blocks or source.blocks:
        digest.update(json.dumps(block).encode())
    plan = {
        **options,
        "details": source.plan_details,
        "classes": source.classes,
        "blocks": digest.hexdigest(),
        "software": describe_codecs(),
        "reading": READING,
        # A shard that is finished without hashes would stay without them.
        "pixel_hash": HASH_NAME,
    }
    return json.dumps(plan, indent=1).encode()


def write_finished_plan(store: Store, plan: bytes) -> None:
    """Write what recognizes a data set, before its manifest makes it one."""
    data = json.dumps({"sha256": _hash_plan(plan)}).encode()
    store.write(PLAN_FILE, data, retry_seconds=RETRY_SECONDS)


def find_finished(store: Store, plan: bytes) -> Manifest | None:
    """Return the manifest of a finished data set of this plan, or None.

    Raises:
        UserError: the manifest is damaged.
        OSError: the store cannot be read.
    """
    if not store.exists(MANIFEST_FILE) or not store.exists(PLAN_FILE):
        return None
    data = store.read(PLAN_FILE, retry_seconds=RETRY_SECONDS)
    if _hash_plan(plan).encode() not in data:
        return None
    return Manifest.load(store)


def _hash_plan(plan: bytes) -> str:
    return hashlib.sha256(plan).hexdigest()
