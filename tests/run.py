"""Run every test, in each environment its part, and print one summary.

python tests/run.py .venv-jittor/bin/python .venv-torch/bin/python [pytest options]

On a CPU the parts run side by side, each with one thread, which takes half the time on two cores.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from under_test import BESIDE_TORCH, DEVICE

TESTS = Path(__file__).resolve().parent


def run_part(name, python, files, environment):
    """Run `files` beside framework `name`: (line of the summary, skips, whether all passed)."""
    part = "both" if files is BESIDE else name
    with tempfile.TemporaryDirectory() as folder:
        report, output = Path(folder) / "report.xml", Path(folder) / "output"
        command = [python, "-m", "pytest", "-q", f"--junit-xml={report}", *sys.argv[3:], *files]
        start = time.perf_counter()
        with open(output, "w") as f:
            environment = {**os.environ, **environment, "OVERLOCK_TESTS": name}
            status = subprocess.run(command, env=environment, stdout=f, stderr=f).returncode
        seconds = time.perf_counter() - start
        print(f"--- {part} ---\n{output.read_text(errors='replace')}", flush=True)
        if not report.exists():
            return f"{part:8} pytest ended with status {status} and no report", [], False
        suite = ET.parse(report).getroot().find("testsuite")
        counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        skips = [
            f"{case.get('classname')}::{case.get('name')}: {case.find('skipped').get('message')}"
            for case in suite.iter("testcase")
            if case.find("skipped") is not None
        ]
        failed, skipped = counts["failures"] + counts["errors"], counts["skipped"]
        passed = counts["tests"] - failed - skipped
        line = f"{part:8} {passed} passed, {failed} failed, {skipped} skipped, {seconds:.0f} s"
        return line, skips, status == 0


BESIDE = [str(TESTS / f"test_{name}.py") for name in BESIDE_TORCH]


def main():
    jittor, torch = (os.path.abspath(python) for python in sys.argv[1:3])
    environment = {"JITTOR_PYTHON": jittor, "TORCH_PYTHON": torch}
    mirrored = [str(TESTS), *(f"--ignore={file}" for file in BESIDE)]
    parts, lanes = [("torch", torch, mirrored), ("jittor", jittor, [str(TESTS)])], 1
    if DEVICE == "cpu":
        parts.append(("torch", torch, BESIDE))
        environment["OMP_NUM_THREADS"] = "1"
        lanes = len(os.sched_getaffinity(0))
    print(f"{len(parts)} parts, {min(lanes, len(parts))} at a time; each is shown when it is done")
    with ThreadPoolExecutor(lanes) as pool:
        results = list(pool.map(lambda part: run_part(*part, environment), parts))
    print("--- summary ---")
    for line, skips, _ in results:
        print(line)
        for skip in skips:
            print(f"         skipped {skip}")
    sys.exit(0 if all(passed for _, _, passed in results) else 1)


if __name__ == "__main__":
    main()
