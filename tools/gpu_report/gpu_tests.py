"""The tests that need a GPU, as figures: how many passed, and what the others said.

Failing tests are a result, not an error; that none was run is an error.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tools.gpu_report.parts import ROOT


def main() -> None:
    """Runs the tests and prints one JSON object."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-q", f"--junitxml={report}", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        if not report.is_file():
            sys.exit(done.stdout + done.stderr)
        root = ElementTree.parse(report).getroot()
    why = nothing_run(root)
    if why is not None:
        sys.exit(why)
    print(json.dumps(figures(root)))


def nothing_run(root: ElementTree.Element) -> str | None:
    """Why a JUnit report says nothing of a GPU: it has no test, or all were skipped. None if one passed or failed."""
    counts = figures(root)
    if counts["passed"] or counts["failed"]:
        return None
    reasons = {skipped.get("message") or "no reason given" for skipped in root.iter("skipped")}
    return f"no test was run: {counts['skipped']} skipped ({'; '.join(sorted(reasons))})" if reasons else "no test was found"


def figures(root: ElementTree.Element) -> dict[str, object]:
    """Counts the cases of a JUnit report; {"passed", "failed": {name: message}, "skipped", "seconds"}."""
    cases = list(root.iter("testcase"))
    failed = {
        case.get("name", "?"): (problem.get("message") or "?").splitlines()[0][:300]
        for case in cases
        for problem in (*case.findall("failure"), *case.findall("error"))
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    seconds = round(sum(float(case.get("time", 0)) for case in cases), 1)
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped, "seconds": seconds}


if __name__ == "__main__":
    main()
