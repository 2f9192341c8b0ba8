"""Every combination of model, loss, optimizer, precision, reduction and place of normalising, on a fake GPU.

`python tests/bench/fake_gpu.py` takes about a quarter of an hour; the tests run a cover of all pairs of choices.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_gpu import config, whole
from test_fake_gpu import FACTORS


def main() -> int:
    failed = 0
    cases = [
        dict(zip(FACTORS, values, strict=True))
        for values in itertools.product(*FACTORS.values())
    ]
    for case in cases:
        try:
            whole(config(**case))
        except Exception as error:  # each is named, and the rest goes on
            failed += 1
            sys.stdout.write(
                f"{case}\n  {type(error).__name__}: {str(error).splitlines()[0]}\n"
            )
    sys.stdout.write(f"{len(cases) - failed} of {len(cases)} combinations ran\n")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
