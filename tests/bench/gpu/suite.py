"""Run the project's tests that are marked `gpu`, in a dry run on the CPU: `suite.py pytest SECONDS`."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from common import DRY, RESULTS, Out, main

OPTIONS = [
    "-p",
    "no:cacheprovider",
    "-m",
    "gpu",
    "-W",
    "default",
    "-rfE",
    "--tb=short",
    "-o",
    "junit_family=xunit1",
]


def pytest(out: Out) -> None:
    """Run them; what pytest prints goes to gpu-tests.log, and its report to gpu-tests.xml."""
    report = RESULTS / "gpu-tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        *OPTIONS,
        f"--junitxml={report}",
        "tests/test_gpu.py",
    ]
    if find_spec("pytest_timeout") and not DRY:
        command += ["--timeout", "60"]
    report.unlink(missing_ok=True)  # of an earlier call
    with open(RESULTS / "gpu-tests.log", "wb") as log, out.guarded("tests"):
        limit = max(1.0, out.left())
        code = subprocess.run(
            command, stdout=log, stderr=log, timeout=limit, check=False
        ).returncode
        read(out, report, code)


def read(out: Out, report: Path, code: int) -> None:
    """Write down how the tests ended, and the properties that they recorded."""
    failure = {"error": f"exit code {code}"} if code else {}
    if not report.exists():
        out("tests", **failure)
        return
    suites = ElementTree.parse(report)
    for suite in suites.iter("testsuite"):
        counts = {
            name: int(suite.attrib[name])
            for name in ("tests", "failures", "errors", "skipped")
        }
        out("tests", **counts, **failure)
    for case in suites.iter("testcase"):
        properties = {
            p.attrib["name"]: p.attrib["value"] for p in case.iter("property")
        }
        if properties:
            out("property", test=case.attrib["name"], **properties)


if __name__ == "__main__":
    main({"pytest": pytest})
