"""`distrain ARGUMENTS` in a folder: `one_command.py FOLDER ARGUMENTS`. What a run imports is loaded beforehand."""

import os
import sys

import distrain.trainer  # noqa: F401
from distrain.cli.main import main as run_command


def main() -> None:
    _, folder, *arguments = sys.argv
    os.chdir(folder)
    sys.argv = ["distrain", *arguments]
    # As with `python -m`.
    sys.path.insert(0, folder)
    run_command()


if __name__ == "__main__":
    main()
