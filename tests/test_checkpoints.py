"""--init and --evaluate of the files that people have, of every origin."""

import collections
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from under_test import module

ROOT = Path(__file__).resolve().parent.parent
weights, checkpoint, models, read_pth = (
    module(name) for name in ("weights", "checkpoint", "models", "read_pth")
)
InputError = module("errors").InputError


def arrays_of(num_classes=3, variant="overlock_xxt", **kwargs):
    model = models.OverLoCK(**models.VARIANTS[variant], num_classes=num_classes, **kwargs)
    return checkpoint.model_arrays(model)


@pytest.fixture(scope="module")
def state():
    """The state dict of XXT with 3 classes, as arrays."""
    return arrays_of()


class Storage:
    """Marks an array that `torch_save` writes as a storage of its own."""

    def __init__(self, array):
        self.array = array


STORAGES = {"f4": "FloatStorage", "f8": "DoubleStorage", "f2": "HalfStorage", "i8": "LongStorage"}


class TorchPickler(pickle._Pickler):
    """torch.save's pickles, without PyTorch: arrays as _rebuild_tensor_v2 of a storage."""

    def __init__(self, file, legacy):
        super().__init__(file, protocol=2)
        self.storages, self.legacy = [], legacy

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        self.storages.append(value.array)
        name = "BFloat16Storage" if value.array.dtype == np.uint16 else None
        kind = Global("torch", name or STORAGES[value.array.dtype.str[1:]])
        key = str(len(self.storages) - 1)
        view = (None,) if self.legacy else ()
        return ("storage", kind, key, "cpu", value.array.size, *view)

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            return self.write(f"c{value.module}\n{value.name}\n".encode())
        if isinstance(value, np.ndarray):
            strides = tuple(
                int(s) // value.itemsize for s in np.empty(value.shape, value.dtype).strides
            )
            flat = Storage(np.ascontiguousarray(value).reshape(-1))
            arguments = (flat, 0, value.shape, strides, False, collections.OrderedDict())
            self.save(Global("torch._utils", "_rebuild_tensor_v2"))
            self.save(arguments)
            return self.write(pickle.REDUCE)
        return super().save(value, save_persistent_id)


class Global:
    def __init__(self, module, name):
        self.module, self.name = module, name


def torch_save(content, path, legacy=False):
    """Write `content` as torch.save does; uint16 arrays as bfloat16."""
    file = io.BytesIO()
    pickler = TorchPickler(file, legacy)
    pickler.dump(content)
    if not legacy:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", file.getvalue())
            for i, array in enumerate(pickler.storages):
                archive.writestr(f"archive/data/{i}", array.tobytes())
        return
    with open(path, "wb") as f:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, f, protocol=2)
        f.write(file.getvalue())
        pickle.dump([str(i) for i in range(len(pickler.storages))], f, protocol=2)
        for array in pickler.storages:
            f.write(np.int64(array.size).tobytes() + array.tobytes())


def assert_loaded(path, state, rounding=0.0, **options):
    read = weights.read_weights(path, **options)
    assert read.arrays.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_allclose(read.arrays[key], value, rtol=rounding, atol=0)
    return read


def prefixed(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    "suffix", [".pth", ".pt", ".bin", ".tar", ".pth.tar", ".ckpt", ".safetensors", ""]
)
def test_what_is_in_a_file_decides_and_not_its_suffix(state, tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    torch_save(state, path)
    assert_loaded(path, state)
    torch_save(state, path, legacy=True)
    assert_loaded(path, state)
    save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, path)
    assert weights.read_weights(path).arrays.keys() == state.keys()


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "backbone.",
        "module._orig_mod.",
        "model.backbone.",
        "a.b.",
    ],
)
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict", "net"])
def test_any_key_and_any_prefix(state, tmp_path, prefix, key):
    content = prefixed(prefix, state)
    torch_save({key: content, "epoch": 3} if key else content, tmp_path / "file.pth")
    assert not assert_loaded(tmp_path / "file.pth", state).notes


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema", "ema_state_dict"])
def test_averaged_weights_are_taken_on_request(state, tmp_path, key):
    averaged = {name: value + 1 for name, value in state.items()}
    path = tmp_path / "model_best.pth.tar"
    torch_save({"state_dict": state, key: prefixed("module.", averaged)}, path)
    read = assert_loaded(path, state)
    assert "took state_dict; --use-ema takes the averaged weights" in read.notes[0]
    read = assert_loaded(path, averaged, use_ema=True)
    assert f"took {key}.module" in read.notes[0]
    torch_save({key: averaged}, path)
    assert "averaged weights (EMA) alone" in assert_loaded(path, averaged).notes[0]
    torch_save(state, path)
    with pytest.raises(InputError, match="leave --use-ema out"):
        weights.read_weights(path, use_ema=True)


def test_what_is_no_part_of_a_classifier_is_named_and_left_out(state, tmp_path):
    detector = prefixed("backbone.", {**state, "extra_norm.0.weight": state["head.1.weight"]})
    detector |= {"decode_head.conv.weight": state["head.1.weight"], "neck.0.bias": np.zeros(3)}
    path = tmp_path / "detector.pth"
    torch_save({"meta": {"seed": 1}, "state_dict": detector, "optimizer": {"lr": 0.1}}, path)
    read = assert_loaded(path, state)
    assert read.notes[0].endswith(
        "left out what a classifier has not: decode_head, extra_norm, neck"
    )


def as_bfloat16(array):
    """The upper half of a float32's bits, cut off; other types stay."""
    if array.dtype != np.float32:
        return array
    return (
        (np.ascontiguousarray(array).reshape(-1).view(np.uint32) >> 16)
        .astype(np.uint16)
        .reshape(array.shape)
    )


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype, rounding", [("f2", 2**-10), ("f8", 0), ("bfloat16", 2**-7)])
def test_any_type_of_number(state, tmp_path, dtype, rounding, legacy):
    def convert(value):
        if value.dtype != np.float32:
            return value
        return as_bfloat16(value) if dtype == "bfloat16" else value.astype(dtype)

    # Without the numbers that float16 has as subnormals.
    large = {key: np.where(abs(v) < 1e-3, 0, v).astype(v.dtype) for key, v in state.items()}
    torch_save({key: convert(value) for key, value in large.items()}, tmp_path / "file.pth", legacy)
    read = assert_loaded(tmp_path / "file.pth", large, rounding)
    model = models.OverLoCK(**models.VARIANTS["overlock_xxt"], num_classes=3, seed=1)
    checkpoint.load_model(model, read.arrays, "file")
    loaded = checkpoint.model_arrays(model)
    assert all(loaded[key].dtype == state[key].dtype for key in state)


def test_bfloat16_in_safetensors(tmp_path):
    header = json.dumps(
        {"patch_embed2.0.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    )
    data = np.array([0x3F80, 0xC000], "<u2").tobytes()  # 1 and -2
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    read = weights.read_weights(tmp_path / "file").arrays["patch_embed2.0.weight"]
    assert read.dtype == np.float32 and read.tolist() == [1, -2]


def test_what_jittor_saves(impl, state, tmp_path):
    """jt.save's pickle, Vars of NumPy arrays and a checksum behind it; here without Jittor."""
    if impl.name == "jittor":
        content = {key: impl.array(value) for key, value in state.items()}
        impl.jt.save(content, str(tmp_path / "file.pkl"))
        expected = {key: value.reshape(value.shape or (1,)) for key, value in state.items()}
    else:
        data = pickle.dumps(state, 4)
        (tmp_path / "file.pkl").write_bytes(data + bytes(20) + b"HCAJSLHD")
        expected = state
    assert_loaded(tmp_path / "file.pkl", expected)


def test_a_whole_pickled_module(impl, state, tmp_path):
    """Its classes are not looked up, only its state is read."""
    if impl.name != "torch":
        pytest.skip("Jittor's modules cannot be pickled")
    model = models.overlock_xxt(num_classes=3)
    for legacy in (True, False):
        impl.torch.save(model, tmp_path / "file.pth", _use_new_zipfile_serialization=not legacy)
        assert_loaded(tmp_path / "file.pth", state)
        impl.torch.save({"ema": model}, tmp_path / "file.pth")
        assert_loaded(tmp_path / "file.pth", state, use_ema=True)


def test_torch_save_in_both_formats_and_types(impl, state, tmp_path):
    if impl.name != "torch":
        pytest.skip("torch_impl's environment has torch.save itself")
    torch = impl.torch
    for legacy in (True, False):
        for dtype, rounding in ((torch.bfloat16, 2**-8), (torch.float64, 0)):
            tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
            tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
            tensors["head.4.weight"] = torch.nn.Parameter(tensors["head.4.weight"])
            path = tmp_path / "file.pth"
            torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
            assert_loaded(path, state, rounding)


HTML = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 6900000\n"


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors", "file"])
@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty; fetch it again"),
        (HTML, "a web page and not a checkpoint; download the file itself"),
        (POINTER, "a Git LFS pointer and not the file itself; `git lfs pull`"),
        (b"\x1f\x8b\x08 gzip", "a compressed archive; unpack it first"),
        (b"PK\3\4 half an archive", "truncated, fetch it again"),
        (b"only text", "truncated, fetch it again"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, reason, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        weights.read_weights(tmp_path / name)
    assert reason in str(caught.value) and str(tmp_path / name) in str(caught.value)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_nothing_of_a_file_is_executed(state, tmp_path, kind):
    content = {"state_dict": state, "extra": Hostile(tmp_path / "executed")}
    if kind == "pickle":
        (tmp_path / "file").write_bytes(pickle.dumps(content))
    else:
        torch_save(content, tmp_path / "file", legacy=kind == "legacy")
    assert_loaded(tmp_path / "file", state)
    assert not (tmp_path / "executed").exists()


def test_a_hostile_size_is_refused(tmp_path):
    """A storage that the older format says is larger than the file asks for no memory."""
    file = io.BytesIO()
    pickler = TorchPickler(file, legacy=True)
    pickler.dump({"weight": np.zeros(7, np.float32)})
    data = file.getvalue().replace(b"K\x07N", b"\x8a\x06\0\0\0\0\0\x10N")  # its size: 2**44
    with open(tmp_path / "file", "wb") as f:
        for value in (0x1950A86A20F9469CFC6C, 1001, {}):
            pickle.dump(value, f, protocol=2)
        f.write(data)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_pth.read(tmp_path / "file")


def test_state_dicts_that_do_not_count_batches(state):
    counted = "num_batches_tracked"
    uncounted = {key: value for key, value in state.items() if not key.endswith(counted)}
    model = models.OverLoCK(**models.VARIANTS["overlock_xxt"], num_classes=3, seed=1)
    assert len(uncounted) < len(state) and checkpoint.load_model(model, uncounted, "file") == []
    assert all(np.array_equal(v, state[k]) for k, v in checkpoint.model_arrays(model).items())


def test_the_right_model_is_named(state):
    model = models.overlock_xxt(num_classes=3)
    with pytest.raises(InputError, match="another model .*; give --model overlock_xt$"):
        checkpoint.load_model(model, arrays_of(variant="overlock_xt"), "file")
    with pytest.raises(InputError, match="none of the variants"):
        other = {**state, "blocks1.7.ls.weight": state["head.1.weight"]}
        checkpoint.load_model(model, other, "file")


@pytest.fixture
def train(impl, dataset, tmp_path):
    """Runs train.py on three classes and returns its result."""

    def run(*options):
        sizes = ["--num-classes", 3, "--train-per-class", 2, "--val-per-class", 6, "--epochs", 1]
        output = ["--data-dir", dataset, "--output", tmp_path / "out", "--no-progress"]
        program = ROOT / f"{impl.name}_impl" / "train.py"
        command = [sys.executable, program, *sizes, *output, *options]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True)

    return run


def test_a_merged_checkpoint_is_measured_and_trained_merged(impl, train, tmp_path):
    model = models.overlock_xxt(num_classes=3)
    model.eval()
    torch_save(checkpoint.model_arrays(model), tmp_path / "branches.pth")
    model.reparam()
    path = tmp_path / "overlock_xxt_reparam.pth"
    torch_save(checkpoint.model_arrays(model), path)
    losses = []
    for file in (tmp_path / "branches.pth", path):
        result = train("--evaluate", file)
        assert result.returncode == 0, result.stderr
        assert f"{file} does not say which classes" in result.stdout
        losses.append(float(result.stdout.partition("val loss ")[2].split(",")[0]))
    assert abs(losses[0] - losses[1]) <= 1e-4  # as printed
    result = train("--init", path)
    assert result.returncode == 0, result.stderr
    assert "has merged branches, and so has this model" in result.stdout
    last = tmp_path / "out" / f"last{impl.suffix}.safetensors"
    assert weights.is_merged(checkpoint.read_checkpoint(last).arrays)
    assert train("--resume", last, "--epochs", 2).returncode == 0


def test_a_backbone_is_trained_and_not_measured(state, train, tmp_path):
    backbone = {key: v for key, v in state.items() if not key.startswith(("head.", "aux_head."))}
    torch_save(prefixed("backbone.", backbone), tmp_path / "backbone.pth")
    result = train("--init", tmp_path / "backbone.pth")
    assert result.returncode == 0, result.stderr
    assert "has no classifier; left at their initial values: head, aux_head" in result.stdout
    result = train("--evaluate", tmp_path / "backbone.pth")
    assert result.returncode == 2 and "there is nothing to evaluate" in result.stderr


def test_other_classes_are_not_measured(impl, train, dataset, tmp_path):
    assert train().returncode == 0
    last = tmp_path / "out" / f"last{impl.suffix}.safetensors"
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    (other / "train" / "n02").rename(other / "train" / "n025")
    annotations = other / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("\tn02\t", "\tn025\t"))
    result = train("--evaluate", last, "--data-dir", other)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "class 2 is n02 there and n025 in" in result.stderr
    assert result.stderr.rstrip().endswith(f"give the --data-dir that it was trained on, {dataset}")
    assert train("--evaluate", last).returncode == 0
