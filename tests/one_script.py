"""A script that a test has as text: `one_script.py TEXT ARGUMENTS`. What a run imports is loaded beforehand."""

import sys

import distrain.trainer  # noqa: F401


def main() -> None:
    _, text, *arguments = sys.argv
    sys.argv = ["-c", *arguments]
    exec(compile(text, "script", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
