"""Both implementations as packages: imported from anywhere, beside anything, under any name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "assert overlock_xxt(num_classes=3).eval() is not False\n"


@pytest.fixture(params=["jittor", "torch"])
def python(request):
    """A function that runs the framework's Python in a folder; its `name` is the framework's."""
    if "JITTOR_PYTHON" not in os.environ:
        pytest.skip("JITTOR_PYTHON is not set; `make test` sets it")
    executable = os.environ["JITTOR_PYTHON"] if request.param == "jittor" else sys.executable

    def run(*arguments, cwd, path=()):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
        command = [executable, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run.name = request.param
    return run


@pytest.fixture
def project(tmp_path):
    """A user's folder whose modules have the names of ours."""
    for name in ("models", "ops", "layers", "contmix", "dataset", "train", "checkpoint", "errors"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    return tmp_path


def test_import_beside_modules_of_the_same_names(python, project):
    code = f"from {python.name}_impl.models import overlock_xxt\n{BUILD}"
    code += "import dataset, layers, models, ops, train\n"
    code += "assert models.mine and ops.mine and layers.mine and dataset.mine and train.mine\n"
    (project / "main.py").write_text(code)
    python("main.py", cwd=project, path=[ROOT])


def test_a_copy_under_another_name(python, project):
    """Inside another package; its programs run too."""
    copy = project / "vendor" / "overlock_port"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / f"{python.name}_impl", copy, ignore=ignored)
    python("-c", f"from vendor.overlock_port.models import overlock_xxt\n{BUILD}", cwd=project)
    assert "--batch-size" in python(copy / "train.py", "--help", cwd=project / "vendor")


def test_the_programs_run_from_anywhere(python, project):
    program = ROOT / f"{python.name}_impl" / "train.py"
    assert "--batch-size" in python(program, "--help", cwd=project, path=[project])
    module = f"{python.name}_impl.train"
    assert "--batch-size" in python("-m", module, "--help", cwd=project, path=[ROOT])


@pytest.mark.parametrize("order", [("jittor", "torch"), ("torch", "jittor")])
def test_both_in_one_process(order, tmp_path):
    """With both frameworks installed: here, PyTorch's packages stand behind Jittor's."""
    if "JITTOR_PYTHON" not in os.environ:
        pytest.skip("JITTOR_PYTHON is not set; `make test` sets it")
    import torch

    packages = str(Path(torch.__file__).parent.parent)
    code = f"import sys; sys.path += [{str(ROOT)!r}, {packages!r}]\n"
    code += "import numpy as np\n"
    for name in order:
        code += f"from {name}_impl.models import overlock_xxt as {name}_xxt\n"
    code += """
from jittor_impl.aligned.start import jt
import torch
images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
with jt.no_grad(), torch.no_grad():
    ours = jittor_xxt(num_classes=3)
    ours.eval()
    theirs = torch_xxt(num_classes=3).eval()
    ours, theirs = ours(jt.array(images)).numpy(), theirs(torch.from_numpy(images)).numpy()
assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max(), (ours, theirs)
"""
    command = [os.environ["JITTOR_PYTHON"], "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
