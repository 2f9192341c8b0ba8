"""The fuzz of `tests/data/fuzz.py` at full length: `python tests/bench/fuzz.py [FILES] [FILES_A_PROCESS]`.

100,000 mutated files at batch 64 and 256; seeds are the numbers of the files. Every slice is a process of its own, so
that a crash is found and its seeds are known. Prints JSON; ends with 1 if a slice failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FUZZ = Path(__file__).parents[1] / "data" / "fuzz.py"


def main(files: int, a_process: int) -> int:
    environment = {
        k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"
    }
    failed, totals = [], {"mutated": 0, "bad": 0, "decoded all the same": 0}
    peak = 0
    for first in range(0, files, a_process):
        verdicts = set()
        for batch in (64, 256):
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    str(FUZZ),
                    folder,
                    str(first),
                    str(a_process),
                    str(batch),
                ]
                done = subprocess.run(
                    command,
                    text=True,
                    capture_output=True,
                    check=False,
                    env=environment,
                )
            if done.returncode != 0:
                failed.append(
                    {
                        "first seed": first,
                        "batch": batch,
                        "code": done.returncode,
                        "said": done.stderr[-500:],
                    }
                )
                continue
            told = json.loads(done.stdout.splitlines()[-1])
            verdicts.add(told["verdicts"])
            peak = max(peak, told["peak MiB over the good ones alone"])
            for key in totals if batch == 64 else ():
                totals[key] += told[key]
        if len(verdicts) > 1:
            failed.append(
                {
                    "first seed": first,
                    "said": "verdicts or pixels differ between batches of 64 and of 256",
                }
            )
    sys.stdout.write(
        json.dumps(
            {**totals, "peak MiB over good files alone": peak, "failed": failed},
            indent=1,
        )
        + "\n"
    )
    return bool(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="?", type=int, default=100_000)
    parser.add_argument("slice", nargs="?", type=int, default=2_000)
    args = parser.parse_args()
    raise SystemExit(main(args.files, args.slice))
