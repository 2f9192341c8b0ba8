"""The fuzz of `tests/data/structure` at full length: `python tests/bench/structure_fuzz.py [CASES] [FIRST_SEED]`.

Random folders, tars and Parquet files, read by distrain and by a plain reader. Prints the cases of each kind as JSON;
ends with a traceback at the first difference, after its smallest example.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from structure.common import run_cases
from structure.kinds import KINDS, NUM_CASES

CASES_PER_ROUND = sum(NUM_CASES.values())


def main(num_cases: int, first_seed: int) -> None:
    """Run rounds of CI's cases with a seed each, until there are enough."""
    counts = dict.fromkeys(KINDS, 0)
    seed = first_seed
    while sum(counts.values()) < num_cases:
        for name, kind in KINDS.items():
            counts[name] += run_cases(kind, seed, NUM_CASES[name])
        sys.stderr.write(f"seed {seed}: {sum(counts.values()):,} cases\n")
        seed += 1
    report = {"cases": sum(counts.values()), **counts, "seconds": time.process_time()}
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="?", type=int, default=100_000)
    parser.add_argument("first_seed", nargs="?", type=int, default=1000)
    args = parser.parse_args()
    main(args.cases, args.first_seed)
