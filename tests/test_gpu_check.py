"""tools/gpu_check.py, rehearsed without a GPU: the kernels run through cuda_on_cpu.h."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tools.gpu_check import Step, results_of

ROOT = Path(__file__).resolve().parent.parent


def check(output, jittor, steps):
    command = [sys.executable, ROOT / "tools" / "gpu_check.py", "--device=cpu"]
    command += [f"--output={output}", f"--steps={steps}"]
    command += [f"--jittor-python={jittor}", f"--torch-python={sys.executable}"]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = (output / "results.jsonl").read_text().splitlines()
    return result, {found["step"]: found for found in map(json.loads, lines)}


def test_rehearsal_on_a_cpu(tmp_path):
    jittor = os.environ.get("JITTOR_PYTHON")
    if not jittor:
        pytest.skip("needs the Pythons of both environments; run tests/run.py")
    steps = "inventory,kernels,torch models,operators,floors,memcheck"
    result, found = check(tmp_path, jittor, steps)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(found) == steps.split(",")
    assert found.pop("memcheck")["summary"] == "skipped: needs a GPU"
    assert all(step["ok"] for step in found.values()), found
    assert re.fullmatch(r"\d\d cases, 0 wrong", found["kernels"]["summary"])
    assert len(found["floors"]["rows"]) > 20 and found["floors"]["rows"][0]["floor_ms"] > 0
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert len(whole["steps"]) == 6 and "PyTorch" in whole["inventory"]
    assert (tmp_path / "gpu.png").stat().st_size > 5000


def test_a_step_that_fails_stops_no_other(tmp_path):
    """Their number is the exit status; a step that proves nothing about numbers does not count."""
    result, found = check(tmp_path, "/nowhere/python", "inventory,build,operators,floors")
    assert result.returncode == 2, result.stdout + result.stderr
    assert not found["build"]["ok"] and "/nowhere/python: No such" in found["build"]["summary"]
    assert not found["operators"]["ok"] and found["floors"]["ok"]


def test_a_step_ends_in_time(tmp_path):
    """As by Ctrl-C, so that it tells what it found; what is behind the time of all is left out."""
    code = "import time\ntry: time.sleep(60)\nfinally: print('one failed so far')"
    step = Step("sleep", 60, [[sys.executable, "-c", code]], tmp_path / "sleep")
    found = step.run(time.monotonic() + 1.5)
    assert not found["ok"] and found["seconds"] < 10
    assert "one failed so far" in (tmp_path / "sleep.log").read_text()
    assert "no time is left" in step.run(time.monotonic())["summary"]


def test_jittor_compiles_beside_the_steps_that_do_without_it(tmp_path):
    log = tmp_path / "order"

    def step(name, seconds, **others):
        code = f"import time; time.sleep({seconds}); print('{name}', file=open('{log}', 'a'))"
        return Step(name, 60, [[sys.executable, "-c", code]], tmp_path / name, **others)

    steps = [step("build", 2), step("kernels", 0, beside_build=True), step("operators", 0)]
    names = [step.name for step, _ in results_of(steps, time.monotonic() + 60)]
    assert names == log.read_text().split() == ["kernels", "build", "operators"]


def test_ctrl_c_ends_what_was_started(tmp_path):
    """The build beside a step too."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tools.gpu_check import Step, results_of
sleep = [[sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]]
steps = [Step(n, 60, sleep, Path({str(tmp_path)!r}, n), beside_build=True) for n in ("build", "b")]
list(results_of(steps, time.monotonic() + 60))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    logs, start = [tmp_path / "build.log", tmp_path / "b.log"], time.monotonic()
    while not all(log.exists() and "begun" in log.read_text().splitlines() for log in logs):
        assert time.monotonic() < start + 60
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(40) != 0


def test_every_cuda_kernel_is_checked():
    source = (ROOT / "tools" / "gpu" / "kernels.cu").read_text()
    headers = (ROOT / "jittor_impl" / "kernels").glob("*_cuda.h")
    assert [h.name for h in headers if f'"{h.name}"' not in source] == []
