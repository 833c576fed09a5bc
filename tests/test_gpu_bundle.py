"""tools/gpu_bundle.py, on wheels that are planted: nothing is downloaded."""

import csv
import ensurepip
import io
import shutil
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path

import pytest
from tools import gpu_bundle


def plant_wheel(folder, name, version, files=()):
    """A wheel with these files, {name: bytes}, and nothing that it needs."""
    stem = f"{name.replace('-', '_')}-{version}"
    files = {
        **dict(files),
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{stem}.dist-info/RECORD": "",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    return folder / f"{stem}-py3-none-any.whl"


def test_of_onednn_only_what_jittor_links_to_is_carried(tmp_path):
    library = tmp_path / "library.so"
    source = "int answer(void) { return 42; }\n"
    command = ["gcc", "-g", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(command, input=source, text=True, check=True)
    lib = "onednn_cpu_gomp-2021.2.0.data/data/lib"
    copies = ("libdnnl.so", "libdnnl.so.2", "libdnnl.so.2.2", "libmkldnn.so", "libmkldnn.so.2")
    files = {f"{lib}/{name}": library.read_bytes() for name in copies}
    wheel = plant_wheel(tmp_path, "onednn-cpu-gomp", "2021.2.0", files)
    before = wheel.stat().st_size
    gpu_bundle.make_small(wheel)
    assert wheel.stat().st_size < before / 2
    with zipfile.ZipFile(wheel) as small:
        contents = {name: small.read(name) for name in small.namelist()}
    libraries = {name.rpartition("/")[2]: name for name in contents if name.startswith(lib)}
    assert set(libraries) == {"libmkldnn.so", "libdnnl.so.2"}
    stripped = contents[libraries["libmkldnn.so"]]
    assert b"answer" in stripped and len(stripped) < len(library.read_bytes())
    record = next(name for name in contents if name.endswith("RECORD"))
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(contents.pop(record).decode()))}
    assert rows.pop(record) == ["", ""] and set(rows) == set(contents)
    for name, (digest, size) in rows.items():
        expected = urlsafe_b64encode(sha256(contents[name]).digest()).decode().rstrip("=")
        assert (digest, int(size)) == (f"sha256={expected}", len(contents[name]))


def test_what_is_too_large_to_carry_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "large.whl").write_bytes(bytes(2_000_000))
    gpu_bundle.report(tmp_path)
    assert "   2.0 MB  wheels/large.whl\n" in capsys.readouterr().out
    monkeypatch.setattr(gpu_bundle, "LIMIT", 1)
    with pytest.raises(SystemExit, match="more than 1 MB"):
        gpu_bundle.report(tmp_path)


def test_environments_have_the_bundle_and_what_the_machine_has(tmp_path, monkeypatch):
    """Without a network; what the bundle has comes before what the machine has."""
    wheels = tmp_path / "bundle" / "wheels"
    for name, version in (("jittor", "1.3.11.0"), ("numpy", "0.1")):
        plant_wheel(wheels, name, version, {f"{name}.py": f"version = '{version}'\n"})
    pip = next(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"))
    shutil.copy(pip, wheels)
    needed = {"jittor": ["jittor==1.3.11.0", "numpy<1", "pytest"], "torch": ["numpy", "pytest"]}
    monkeypatch.setattr(gpu_bundle, "requirements", needed.get)
    gpu_bundle.install(tmp_path / "bundle", {name: tmp_path / name for name in needed})
    found = {}
    for name in needed:
        code = "import importlib.util as u, numpy, ruff; print(numpy.__file__, ruff.__file__)"
        code += "; print(u.find_spec('jittor').origin if u.find_spec('jittor') else '-')"
        command = [tmp_path / name / "bin" / "python", "-c", code]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found[name] = [str(tmp_path / name) in place for place in result.stdout.split()]
    # NumPy, ruff and Jittor of the environment itself.
    assert found == {"jittor": [True, False, True], "torch": [False, False, False]}


def test_a_bundle_that_is_not_there(tmp_path):
    command = [sys.executable, gpu_bundle.__file__, "--install", f"--bundle={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and f"error: no wheels in {tmp_path}; make gpu-b" in result.stderr
