"""Hashes of the weights that runs end with, to be compared before and after a change of the code.

`python tests/bench/hashes.py` prints a line for each: the quickstart, every other recipe at a reduced size
on the digits, and one of them on three ranks. Only the command line is used, so that any two versions compare.
Compare them on one machine and in one environment: another CPU or another torch computes other bits.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"
REDUCED = {
    "augment.crop": 64,
    "model.width": 0.05,
    "epochs": 2,
    "global_batch": 252,
    "virtual_workers": 6,
    "device": "cpu",
    "log.every": 1,
    "metrics.port": "null",
}


def weights(recipe: str, folder: Path, *options: str, **settings: object) -> str:
    """Train a recipe to its end: the first 16 digits of its weights' SHA-256."""
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = [
        sys.executable,
        "-m",
        "distrain",
        "train",
        str(CONFIGS / f"{recipe}.yaml"),
        *options,
        *overrides,
    ]
    ended = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False
    )
    found = re.search(r"^weights +([0-9a-f]{16})", ended.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{recipe} did not finish:\n{ended.stdout}{ended.stderr}")
    return found[1]


def show(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # The digits are packed by the quickstart.
        quickstart = weights("quickstart", folder, **{"metrics.port": "null"})
        show(f"quickstart  {quickstart}")
        digits = {
            f"data.{part}": folder / "runs/data/digits" / part
            for part in ("train", "val")
        }
        for recipe in sorted(
            path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "quickstart"
        ):
            short = (
                {"augment.short_side": 72}
                if "short_side" in (CONFIGS / f"{recipe}.yaml").read_text()
                else {}
            )
            show(f"{recipe}  {weights(recipe, folder, **REDUCED, **digits, **short)}")
        ranks = weights(
            "alexnet-bn",
            folder,
            "--workers",
            "3",
            **REDUCED,
            **digits,
            run="runs/three",
        )
        show(f"alexnet-bn on three ranks  {ranks}")


if __name__ == "__main__":
    main()
