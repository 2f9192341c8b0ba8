"""Run directories as training leaves them, written by hand."""

import json
from pathlib import Path
from typing import Any

from distrain.data.storage.store import Store
from distrain.monitor.records import MetricsRecord
from distrain.monitor.sinks import MetricsFile

CONFIG = "run: {run}\nepochs: 4\nschedule:\n  name: constant\n  lr: {lr}\n"


def write_run(
    folder: Path,
    attempts: list[list[MetricsRecord]],
    *,
    starts: list[int] | None = None,
    lr: float = 0.1,
    **changes: Any,
) -> Path:
    """Write a run: a list of records per attempt, and where each one started.

    Keywords change the record of the last attempt; all attempts before it failed.
    """
    (folder / "attempts").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(run=folder, lr=lr))
    for number, records in enumerate(attempts, 1):
        is_last = number == len(attempts)
        record: dict[str, Any] = {
            "session": "s",
            "who": "somebody",
            "process": "",
            "from_step": starts[number - 1] if starts else 0,
            "counter": 1,
            "ended": True,
            "workers": 1,
        }
        if is_last:
            end = {"failed": False, "outcome": "finished", "step": 40, "steps": 40}
            record |= {**end, **changes}
        else:
            record |= {"failed": True, "outcome": "failed", "error": "power <cut>"}
        path = folder / "attempts" / f"{number:03d}.json"
        path.write_text(json.dumps(record))
        file = MetricsFile(Store(str(folder)), number, warn=print)
        for one in records:
            file.write_record(one)
        file.close()
    return folder
