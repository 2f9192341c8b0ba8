"""Time, size and memory of `distrain report` over runs of 10,000 and 100,000 logged steps.

    python tests/bench/reports.py

Each report is made in a process of its own, five times; the medians are printed, and their ratio.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = (10_000, 100_000)
REPEATS = 5
EVAL_EVERY = 100


def write_run(folder: Path, steps: int) -> None:
    """Write the run directory of a run that logged every step."""
    (folder / "attempts").mkdir(parents=True)
    (folder / "config.yaml").write_text("epochs: 10\n")
    attempt = {
        "session": "s",
        "who": "",
        "process": "",
        "from_step": 0,
        "counter": 1,
        "ended": True,
        "failed": False,
        "outcome": "finished",
        "step": steps,
        "steps": steps,
    }
    (folder / "attempts/001.json").write_text(json.dumps(attempt))
    common = {"epoch": 0, "top1": 0.5, "top5": 0.8, "seconds": 0.25}
    with (folder / "metrics-001.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = 7 / math.sqrt(step) + 0.5 * math.sin(step * step)
            train = {
                "kind": "train",
                "step": step,
                **common,
                "loss": loss,
                "lr": 0.01,
                "images_per_second": 500 + 50 * math.sin(step),
                "data_wait": 0.01,
                "bad_samples": step // 5000,
                "phase_seconds": {"forward": 0.1, "backward": 0.2, "reduction": 0.1},
            }
            file.write(json.dumps(train) + "\n")
            if step % EVAL_EVERY == 0:
                counts = {
                    "top1_count": 1,
                    "top5_count": 1,
                    "samples": 2,
                    "classes": 10,
                }
                record = {"kind": "eval", "step": step, **common, "loss": loss}
                file.write(json.dumps({**record, **counts}) + "\n")


def report_once(run: str, page: str) -> None:
    """Make one report, and print its seconds and the process's peak memory in MB."""
    import distrain

    distrain.report  # noqa: B018 - the import is not timed
    start = time.perf_counter()
    distrain.report(run, to=page, curves_only=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_mb": peak}))


def main() -> None:
    """Measure both lengths."""
    medians = {}
    with tempfile.TemporaryDirectory() as folder:
        for steps in STEPS:
            run = Path(folder) / str(steps)
            write_run(run, steps)
            page = run / "report.html"
            command = [sys.executable, __file__, str(run), str(page)]
            results = [
                json.loads(subprocess.check_output(command)) for _ in range(REPEATS)
            ]
            medians[steps] = statistics.median(r["seconds"] for r in results)
            peak = statistics.median(r["peak_mb"] for r in results)
            size = page.stat().st_size / 1e6
            sys.stdout.write(
                f"{steps:>7,} steps: {medians[steps]:.2f} s, page {size:.2f} MB, "
                f"peak memory {peak:.0f} MB\n"
            )
    sys.stdout.write(f"ratio {medians[STEPS[1]] / medians[STEPS[0]]:.2f}\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        report_once(*sys.argv[1:])
    else:
        main()
