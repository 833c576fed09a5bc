"""Run every test, in each environment its part, and print one summary.

python tests/run.py .venv-jittor/bin/python .venv-torch/bin/python [pytest options]
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def run_part(name, python, others, options):
    """Run the tests of framework `name`: (line of the summary, skips, whether all passed)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {**os.environ, "OVERLOCK_TESTS": name, **others}
        command = [python, "-m", "pytest", "-q", f"--junit-xml={report}", *options, str(TESTS)]
        start = time.perf_counter()
        status = subprocess.run(command, env=environment).returncode
        seconds = time.perf_counter() - start
        if not report.exists():
            return f"{name:8} pytest ended with status {status} and no report", [], False
        suite = ET.parse(report).getroot().find("testsuite")
        counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        skips = [
            f"{case.get('classname')}::{case.get('name')}: {case.find('skipped').get('message')}"
            for case in suite.iter("testcase")
            if case.find("skipped") is not None
        ]
        failed, skipped = counts["failures"] + counts["errors"], counts["skipped"]
        passed = counts["tests"] - failed - skipped
        line = f"{name:8} {passed} passed, {failed} failed, {skipped} skipped, {seconds:.0f} s"
        return line, skips, status == 0


def main():
    pythons = [os.path.abspath(p) for p in sys.argv[1:3]]
    others = {"JITTOR_PYTHON": pythons[0], "TORCH_PYTHON": pythons[1]}
    parts = zip(("jittor", "torch"), pythons)
    results = [run_part(name, python, others, sys.argv[3:]) for name, python in parts]
    print("\n--- summary ---")
    for line, skips, _ in results:
        print(line)
        for skip in skips:
            print(f"         skipped {skip}")
    sys.exit(0 if all(passed for _, _, passed in results) else 1)


if __name__ == "__main__":
    main()
