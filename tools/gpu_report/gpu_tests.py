"""The tests that need a GPU, as figures: how many passed, and what the others said. Failing tests are a result, not an error."""

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
        print(json.dumps(figures(ElementTree.parse(report).getroot())))


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
