"""data/prepare.py, run through its command line.

Small archives and a web server on this machine stand for the official ones.
"""

import hashlib
import importlib.util
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from under_test import module

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "prepare.py"
SPEC = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(prepare)

SMALL = ["--sample-classes", "3", "--sample-train", "8", "--sample-val", "2"]


def run_script(*args, **options):
    """Run prepare.py in a process of its own."""
    command = [sys.executable, SCRIPT, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture
def run(capsys):
    """Run prepare.py in this process, which takes a tenth of the time.

    The result is that of run_script().
    """

    def call(*args):
        status = prepare.main(list(map(str, args)))
        return subprocess.CompletedProcess(args, status, *capsys.readouterr())

    return call


def assert_error(result, *words):
    """The run ended with status 2 and one line on stderr, which holds all `words`."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert re.fullmatch(r"prepare\.py: error: .+; .+\n", result.stderr), result.stderr
    for word in words:
        assert word in result.stderr


def contents(folder):
    """{relative path: bytes} of all files in a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The files of a small complete data set."""
    folder = tmp_path_factory.mktemp("drawn") / "set"
    result = run_script("--sample", *SMALL, "--output", folder)
    assert result.returncode == 0, result.stderr
    return contents(folder)


@pytest.fixture
def folder(files, tmp_path):
    """A copy of the small data set, to be damaged."""
    for name, data in files.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "set"


@pytest.fixture
def archive(files, tmp_path):
    """The small data set as a zip archive in the official layout."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            file.writestr(f"tiny-imagenet-200/{name}", data)
    return path


# The command line


@pytest.mark.parametrize(
    "args, words",
    [
        (["--frobnicate"], ["--frobnicate"]),
        (["--zip"], ["--zip"]),
        (["--sample", "--verify"], ["--sample", "--verify"]),
        (["--sample", "--sample-classes", "11"], ["--sample-classes"]),
        (["--sample", "--sample-train", "0"], ["--sample-train", "less than 1"]),
        (["--sample", "--sample-val", "two"], ["--sample-val", "two"]),
        (["--sample", "--seed", "-1"], ["--seed", "less than 0"]),
        (["--verify", "--seed", "1"], ["--seed", "--sample"]),
    ],
)
def test_wrong_command_is_one_line(run, args, words, tmp_path):
    assert_error(run(*args, "--output", tmp_path / "set"), "--help", *words)
    assert not list(tmp_path.iterdir())


# --sample


def test_sample_depends_on_the_seed_alone(run, files, tmp_path):
    for seed in (0, 1):
        result = run("--sample", *SMALL, "--seed", seed, "--output", tmp_path / str(seed))
        assert result.returncode == 0
    assert contents(tmp_path / "0") == files
    other = contents(tmp_path / "1")
    images = [name for name in files if name.endswith(".JPEG")]
    assert other.keys() == files.keys()
    assert len({data[name] for data in (files, other) for name in images}) == 2 * len(images)


def test_sample_has_the_layout_of_the_real_set(run, tmp_path):
    folder = tmp_path / "set"
    sizes = ["--sample-classes", 10, "--sample-train", 16, "--sample-val", 2]
    *_, last = run("--sample", *sizes, "--output", folder).stdout.splitlines()
    assert last == f"{folder}: 10 classes, 160 training, 20 validation images"
    wnids = (folder / "wnids.txt").read_text().split()
    names = dict(line.split("\t") for line in (folder / "words.txt").read_text().splitlines())
    assert len(set(wnids)) == 10 and list(names) == wnids and len(set(names.values())) == 10
    assert sorted(path.name for path in (folder / "train").iterdir()) == wnids
    annotations = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    labels = [line.split("\t")[1] for line in annotations]
    assert Counter(labels) == dict.fromkeys(wnids, 2)
    modes = Counter()
    for path in folder.rglob("*.JPEG"):
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.size == (64, 64)
            modes[image.mode] += 1
    assert modes == {"RGB": 170, "L": 10}


def test_sample_classes_share_colours_and_differ_in_shape():
    """Mean colour must vary within every class.

    Each box must hold the shape, which differs from its ground.
    """
    for shape in prepare.SHAPES.values():
        means = []
        for number in range(8):
            image, (left, top, right, bottom) = prepare.draw(shape, np.random.default_rng(number))
            pixels = np.asarray(image, np.float64)
            means.append(pixels.mean((0, 1)))
            assert 0 <= left < right < 64 and 0 <= top < bottom < 64
            inside = pixels[top : bottom + 1, left : right + 1]
            assert inside.std((0, 1)).mean() > 10
        assert np.ptp(means, axis=0).min() > 40


# --zip


def test_zip_round_trip(files, archive, tmp_path):
    result = run_script("--zip", "set.zip", "--output", "new/set", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert contents(tmp_path / "new" / "set") == files
    assert result.stdout.splitlines() == [
        "unpacking ...",
        "unpacking: done",
        f"{tmp_path}/new/set: 3 classes, 24 training, 6 validation images",
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set"]


@pytest.mark.parametrize("task", ["--zip", "--sample"])
def test_existing_folder_is_left_alone(run, task, archive, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "precious").write_text("mine")
    command = [task, archive] if task == "--zip" else [task]
    assert_error(run(*command, "--output", tmp_path / "set"), "exists", "remove")
    assert contents(tmp_path / "set") == {"precious": b"mine"}


def member(name, mode=0):
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # the constructor would tidy it
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    "info",
    [
        member("/tmp/evil"),
        member("../evil"),
        member("evil"),
        member("tiny-imagenet-200"),
        member("tiny-imagenet-200/../../evil"),
        member("tiny-imagenet-200/.. /evil"),
        member("tiny-imagenet-200//evil"),
        member("tiny-imagenet-200/../../evil/"),
        member("C:/evil"),
        member("tiny-imagenet-200/C:/evil"),
        member("tiny-imagenet-200\\evil"),
        member("tiny-imagenet-200/..\\..\\evil"),
        member("tiny-imagenet-200/evil\0.JPEG"),
        member("tiny-imagenet-200/link", 0o120777),
        member("tiny-imagenet-200/fifo", 0o010644),
        member("__MACOSX/../../evil"),
        member(".DS_Store/../evil"),
        member("tiny-imagenet-200/.hidden/..\\evil"),
        member("__MACOSX/link", 0o120777),
    ],
    ids=lambda info: info.filename.encode("unicode_escape").decode(),
)
def test_escaping_member_is_refused_by_name(run, info, archive, tmp_path):
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(info, "/etc/passwd")
    result = run("--zip", archive, "--output", tmp_path / "sub" / "set")
    assert_error(result, repr(info.filename), "not a plain file")
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize(
    "lost, said",
    [
        ("words.txt", "words.txt is missing"),
        ("val/val_annotations.txt", "val_annotations.txt is missing"),
        ("val/images/val_3.JPEG", "val_3.JPEG"),
        ("train/n00000002/images/n00000002_5.JPEG", "n00000002_5.JPEG"),
        ("train/n00000002/n00000002_boxes.txt", "n00000002_boxes.txt"),
    ],
)
def test_incomplete_archive_is_refused(run, lost, said, files, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for name, data in files.items():
            if name != lost:
                file.writestr(f"tiny-imagenet-200/{name}", data)
    assert_error(run("--zip", tmp_path / "set.zip", "--output", tmp_path / "set"), "set.zip", said)
    assert [path.name for path in tmp_path.iterdir()] == ["set.zip"]


JUNK = [
    *(".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/", "__MACOSX/tiny-imagenet-200/._train"),
    *("tiny-imagenet-200/.DS_Store", "tiny-imagenet-200/train/Thumbs.db"),
    "tiny-imagenet-200/train/.ipynb_checkpoints/images/n00000001_0.JPEG",
    "tiny-imagenet-200/train/n00000001/images/._n00000001_0.JPEG",
    *("tiny-imagenet-200/val/images/DESKTOP.INI", "tiny-imagenet-200/val/images/._val_0.JPEG"),
]


def test_what_systems_leave_in_archives_is_not_unpacked(run, files, archive, tmp_path):
    with zipfile.ZipFile(archive, "a") as file:
        for name in JUNK:
            file.writestr(name, b"")
    result = run("--zip", archive, "--output", tmp_path / "set")
    assert (result.returncode, result.stderr) == (0, "")
    assert contents(tmp_path / "set") == files


def test_what_systems_leave_in_folders_is_passed_over(run, folder):
    for name in JUNK:
        path = folder / name.removeprefix("tiny-imagenet-200/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(b"")
    for task in ([], ["--verify"]):
        result = run(*task, "--output", folder)
        assert (result.returncode, result.stderr) == (0, "")
        assert "3 classes, 24 training, 6 validation images" in result.stdout


def flip_a_byte(data):
    start = data.index(b"JFIF")  # stored without compression, so this lies inside a member
    return data[:start] + b"j" + data[start + 1 :]


@pytest.mark.parametrize(
    "damage, said",
    [
        (flip_a_byte, "CRC"),
        (lambda data: data[: len(data) // 2], "not a zip file"),
        (lambda data: b"<html>Moved</html>", "not a zip file"),
        (lambda data: b"", "not a zip file"),
        (lambda data: data[1000:], "damaged"),
    ],
)
def test_damaged_archive(run, damage, said, files, tmp_path):
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in files.items():
            file.writestr(f"tiny-imagenet-200/{name}", data)
    archive.write_bytes(damage(archive.read_bytes()))
    assert_error(run("--zip", archive, "--output", tmp_path / "set"), "set.zip", said)
    assert list(tmp_path.iterdir()) == [archive]


def test_member_that_comes_twice(run, archive, tmp_path):
    with zipfile.ZipFile(archive, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("tiny-imagenet-200/wnids.txt", "n00000009\n")
    assert_error(run("--zip", archive, "--output", tmp_path / "set"), "File exists", "wnids.txt")
    assert list(tmp_path.iterdir()) == [archive]


def test_error_is_one_line_whatever_it_quotes(run, tmp_path):
    (tmp_path / "two\nlines.zip").write_bytes(b"")
    result = run("--zip", tmp_path / "two\nlines.zip", "--output", tmp_path / "set")
    assert_error(result, "two lines.zip")


def test_missing_archive_and_unusable_output(run, archive, tmp_path):
    result = run("--zip", tmp_path / "no.zip", "--output", tmp_path / "set")
    assert_error(result, "no.zip", "No such file")
    assert_error(run("--zip", archive, "--output", archive / "set"), str(archive))


def test_full_disk(archive, tmp_path):
    """A limit on the size of a file stands for a full disk: both make write() fail."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    result = run_script("--zip", archive, "--output", tmp_path / "set", preexec_fn=limit)
    assert_error(result, "File too large", "free space")
    assert list(tmp_path.iterdir()) == [archive]


def stopped_unpacking(archive, tmp_path, signal_number):
    """Run --zip in a process that sends itself a signal before it writes its third file."""
    code = f"""
import importlib.util, itertools, os, signal, sys
# A test run in the background of a shell ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
spec = importlib.util.spec_from_file_location("prepare", {str(SCRIPT)!r})
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)
copy, count = prepare.shutil.copyfileobj, itertools.count(1)
def copyfileobj(source, target):
    if next(count) == 3:
        os.kill(os.getpid(), {int(signal_number)})
    copy(source, target)
prepare.shutil.copyfileobj = copyfileobj
sys.exit(prepare.main(["--zip", {str(archive)!r}, "--output", {str(tmp_path / "set")!r}]))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_killed_unpacking_leaves_no_half_set_and_is_cleaned_up(run, files, archive, tmp_path):
    assert stopped_unpacking(archive, tmp_path, signal.SIGKILL).returncode == -signal.SIGKILL
    (leftover,) = set(tmp_path.iterdir()) - {archive}
    assert len(contents(leftover)) == 3
    assert run("--zip", archive, "--output", tmp_path / "set").returncode == 0
    assert contents(tmp_path / "set") == files
    assert set(tmp_path.iterdir()) == {archive, tmp_path / "set"}


def test_ctrl_c_is_one_line_and_leaves_nothing(archive, tmp_path):
    result = stopped_unpacking(archive, tmp_path, signal.SIGINT)
    assert result.returncode == 130
    assert re.fullmatch("prepare.py: error: interrupted; .+\n", result.stderr)
    assert list(tmp_path.iterdir()) == [archive]


def test_bar_on_a_terminal(run, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = run("--zip", archive, "--output", tmp_path / "set")
    assert "unpacking: 100%" in result.stderr
    assert result.stdout == f"{tmp_path}/set: 3 classes, 24 training, 6 validation images\n"


# --verify


def test_verify_counts(run, folder):
    result = run("--verify", "--output", folder)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("train    8  val   2\n") == 3
    assert "3 classes, 24 training, 6 validation images, 0 broken" in result.stdout


def test_verify_names_every_broken_image(run, folder):
    images = sorted(folder.rglob("*.JPEG"))
    truncated, text, large, empty = images[1], images[9], images[20], images[-1]
    truncated.write_bytes(truncated.read_bytes()[:-300])
    text.write_text("404 not found\n")
    Image.new("RGB", (65, 64)).save(large)
    empty.write_bytes(b"")
    result = run("--verify", "--output", folder)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 4
    for line, path in zip(lines, (truncated, text, large, empty)):
        assert re.fullmatch(rf"prepare\.py: error: {path} .+; .+", line)
    assert "4 broken" in result.stdout


@pytest.mark.parametrize(
    "name, old, new, said",
    [
        ("val/val_annotations.txt", "val_4.JPEG", "val_99.JPEG", "val_4.JPEG"),
        ("val/val_annotations.txt", "val_4.JPEG\tn00000002", "val_4.JPEG\tn00000009", "n00000009"),
        ("val/val_annotations.txt", "val_4.JPEG\t", "val_4.JPEG ", "line 5"),
        ("val/val_annotations.txt", "val_4.JPEG", "val_3.JPEG", "val_4.JPEG"),
        (
            "val/val_annotations.txt",
            "val_4.JPEG",
            "val_3.JPEG\tn00000001\t0\t0\t9\t9\nval_4.JPEG",
            "repeats",
        ),
        ("val/val_annotations.txt", "n00000002", "n00000001", "n00000002"),
        (
            "train/n00000003/n00000003_boxes.txt",
            "n00000003_1.JPEG",
            "n00000003_77.JPEG",
            "n00000003_77.JPEG",
        ),
        (
            "train/n00000003/n00000003_boxes.txt",
            "n00000003_1.JPEG\t",
            "n00000003_1.JPEG\tx",
            "line 2",
        ),
        ("wnids.txt", "n00000002\n", "", "n00000002"),
        ("wnids.txt", "n00000002", "n00000002\nn00000002", "repeats"),
        ("words.txt", "n00000002", "n00000007", "n00000002"),
    ],
)
def test_verify_checks_the_lists(run, name, old, new, said, folder):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    assert_error(run("--verify", "--output", folder), str(folder), Path(name).name, said)


def test_verify_wants_images_of_each_class(run, folder):
    for path in folder.glob("train/n00000002/images/*.JPEG"):
        path.unlink()
    (folder / "train" / "n00000002" / "n00000002_boxes.txt").write_text("")
    assert_error(run("--verify", "--output", folder), "no training images")


def test_verify_without_a_data_set(run, tmp_path):
    assert_error(run("--verify", "--output", tmp_path / "nothing"), "nothing", "missing")


def sort_validation(folder, inner="", below=""):
    """Move the validation images to val/<inner>/<class>/<below>, as many scripts do."""
    for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        (folder / "val" / inner / wnid / below).mkdir(parents=True, exist_ok=True)
        (folder / "val" / "images" / name).rename(folder / "val" / inner / wnid / below / name)


def to_image_folder(folder):
    """Make it train/<class>/*.png and val/<class>/*.png of 40x24 pixels, without any list."""
    sort_validation(folder)
    for path in [*folder.rglob("*.txt")]:
        path.unlink()
    for path in [*folder.rglob("*.JPEG")]:
        place = path.parent.parent if path.parent.name == "images" else path.parent
        Image.open(path).resize((40, 24)).save(place / f"{path.stem}.PNG")
        path.unlink()
    for number, name in enumerate(("a cat", "dog.v2", "狗 二"), 1):
        for split in ("train", "val"):
            (folder / split / f"n0000000{number}").rename(folder / split / name)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: sort_validation(folder),
        lambda folder: sort_validation(folder, below="images"),
        lambda folder: sort_validation(folder, inner="images"),
        to_image_folder,
    ],
    ids=["sorted", "sorted with images/", "sorted below images/", "any data set"],
)
def test_verify_takes_the_layouts_that_train_takes(run, folder, change):
    change(folder)
    train, val = module("dataset").load(folder, 3, 8, 2)
    assert (len(train), len(val)) == (24, 6)
    result = run("--verify", "--output", folder)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("train    8  val   2\n") == 3
    assert "3 classes, 24 training, 6 validation images, 0 broken" in result.stdout
    broken = [min(folder.rglob(f"{name}.[JP][PN]*G")) for name in ("n00000002_5", "val_4")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-300])
    result = run("--verify", "--output", folder)
    assert result.returncode == 2 and "2 broken" in result.stdout
    for path, line in zip(broken, result.stderr.splitlines()):
        assert line == f"prepare.py: error: {path} cannot be read (truncated); replace it"


@pytest.mark.parametrize("linked", ["train", "train/n00000002", "val", "."])
def test_verify_follows_links(run, folder, linked):
    images = [folder / "train" / "n00000002" / "images" / "n00000002_3.JPEG"]
    images.append(folder / "val" / "images" / "val_1.JPEG")
    for path in images:
        path.write_bytes(path.read_bytes()[:-300])
    path = folder / linked
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    result = run("--verify", "--output", folder)
    assert result.returncode == 2 and "2 broken" in result.stdout
    for path, line in zip(images, result.stderr.splitlines()):
        assert path.name in line and "truncated" in line


@pytest.mark.parametrize("task", [[], ["--verify"]])
def test_lists_written_on_windows(run, folder, task):
    lists = list(folder.rglob("*.txt"))
    assert len(lists) == 6
    for path in lists:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    result = run(*task, "--output", folder)
    assert (result.returncode, result.stderr) == (0, "")


def test_verify_names_list_and_images_and_following_it_mends_the_set(run, folder):
    (folder / "wnids.txt").write_text("n00000001\nn00000003\n")
    (folder / "words.txt").write_text("n00000001\n")
    boxes = folder / "train" / "n00000003" / "n00000003_boxes.txt"
    boxes.write_text("gone.JPEG\t0\t0\t1\t1\n")
    image = folder / "train" / "n00000002" / "images" / "n00000002_0.JPEG"
    Image.open(image).resize((9, 5)).save(image)
    result = run("--verify", "--output", folder)
    wnids, words, boxed, size = result.stderr.splitlines()
    for line, path in ((wnids, "wnids.txt"), (words, "words.txt"), (boxed, boxes.name)):
        assert path in line and line.endswith(
            "; mend the list, or delete it: train.py does not read it"
        )
    assert f"{image} is 9x5 pixels, most images are 64x64; resize it" in size
    for path in (folder / "wnids.txt", folder / "words.txt", boxes):
        path.unlink()
    Image.open(image).resize((64, 64)).save(image)
    assert run("--verify", "--output", folder).returncode == 0


def test_verify_names_a_validation_class_that_is_missing_beside_broken_images(run, folder):
    sort_validation(folder)
    shutil.rmtree(folder / "val" / "n00000003")
    (folder / "val" / "other").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "val" / "other" / "1.png")
    (folder / "train" / "n00000001" / "images" / "n00000001_0.JPEG").write_bytes(b"")
    result = run("--verify", "--output", folder)
    classes, image = result.stderr.splitlines()
    assert "train/ and val/ disagree about class 'n00000003', 'other'; add or remove" in classes
    assert "n00000001_0.JPEG cannot be read (not an image)" in image


def test_verify_prints_any_name_on_any_terminal(folder):
    to_image_folder(folder)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = run_script("--verify", "--output", folder, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\\u72d7 \\u4e8c  train    8  val   2" in result.stdout


def test_verify_of_no_data_set_says_what_is_lacking(run, folder):
    shutil.rmtree(folder / "val")
    assert_error(run("--verify", "--output", folder), f"{folder} is not", "lacks val/; give")


def test_verify_advises_nobody_to_remove_data(run, folder):
    to_image_folder(folder)
    for path in folder.glob("val/*/*.PNG"):
        path.write_bytes(b"")
    result = run("--verify", "--output", folder)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 6
    assert "remove" not in result.stderr and "prepare it again" not in result.stderr


# Download


class Server(ThreadingHTTPServer):
    """Serves `data`; `ranges` collects the Range headers; `stop_after` bytes it hangs up."""

    data, ranges, honours_range, stop_after, status = b"", None, True, None, None


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers["Range"]
        self.server.ranges.append(wanted)
        start = 0
        if wanted and self.server.honours_range:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        body = self.server.data[start:]
        if self.server.status or wanted and not body:
            self.send_error(self.server.status or 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.stop_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(archive, monkeypatch):
    """A web server that has the small archive, which prepare.py now downloads."""
    server = Server(("127.0.0.1", 0), Handler)
    server.data, server.ranges = archive.read_bytes(), []
    monkeypatch.setenv("no_proxy", "*")
    url = f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip"
    monkeypatch.setattr(prepare, "URL", url)
    monkeypatch.setattr(prepare, "MD5", hashlib.md5(server.data).hexdigest())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def download(run, tmp_path):
    """Run the form without arguments to tmp_path/new/set.

    The archive's part file then lies in tmp_path/new, too.
    """
    (tmp_path / "new").mkdir()
    return lambda: run("--output", tmp_path / "new" / "set")


@pytest.fixture
def part(tmp_path):
    return tmp_path / "new" / "tiny-imagenet-200.zip.part"


def test_download(server, download, part, files):
    result = download()
    assert (result.returncode, result.stderr) == (0, "")
    assert "downloading ...\ndownloading: done\n" in result.stdout
    assert contents(part.parent) == {f"set/{name}": data for name, data in files.items()}
    assert server.ranges == [None]
    again = download()
    assert (
        again.returncode == 0
        and again.stdout.startswith("already there: ")
        and len(server.ranges) == 1
    )


def test_broken_download_is_resumed(server, download, part, files):
    server.stop_after = len(server.data) // 2
    assert_error(download(), "broke off", "run the same command again")
    assert part.read_bytes() == server.data[: server.stop_after]
    server.stop_after = None
    assert download().returncode == 0
    assert server.ranges == [None, f"bytes={len(server.data) // 2}-"]
    assert contents(part.parent / "set") == files and not part.exists()


def test_server_without_ranges_starts_over(server, download, part, files):
    server.honours_range = False
    part.write_bytes(b"something else")
    assert download().returncode == 0
    assert contents(part.parent / "set") == files


def test_complete_part_needs_no_network(server, download, part, files):
    part.write_bytes(server.data)
    assert download().returncode == 0
    assert server.ranges == [] and contents(part.parent / "set") == files


@pytest.mark.parametrize("excess", [None, 0, 1])
def test_wrong_md5_removes_the_part(excess, server, download, part):
    """Also where the server answers 416, because the part is as long as the file or longer."""
    wrong = server.data if excess is None else b"y" * (len(server.data) + excess)
    if excess is None:
        server.data = wrong = b"<html>Log in to the wireless network</html>"
    else:
        part.write_bytes(wrong)
    assert_error(download(), hashlib.md5(wrong).hexdigest(), prepare.MD5, "removed", "--zip")
    assert list(part.parent.iterdir()) == []


def test_server_error_keeps_the_part(server, download, part, monkeypatch):
    monkeypatch.setattr(server, "status", 503)
    part.write_bytes(b"begun")
    assert_error(download(), "503", "--zip FILE")
    assert part.read_bytes() == b"begun"


def test_no_network_says_what_to_do(download, part, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(prepare, "URL", "http://127.0.0.1:9/tiny-imagenet-200.zip")
    part.write_bytes(b"begun")
    assert_error(download(), prepare.URL, prepare.MD5, "--zip FILE", "--sample")
    assert part.read_bytes() == b"begun"


def test_incomplete_set_is_not_taken_for_complete(run, folder):
    (folder / "words.txt").unlink()
    assert_error(run("--output", folder), str(folder), "words.txt is missing", "remove")


def test_data_of_another_kind_is_checked_by_the_command_that_is_advised(run, folder):
    own = folder.rename(folder.parent / "my  own 'data'")  # two spaces
    to_image_folder(own)
    result = run("--output", own)
    assert_error(result, f"{own} is not a complete TinyImageNet (wnids.txt is missing)", "move or")
    command = result.stderr.split(": ")[-1]
    checked = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "24 training, 6 validation images, 0 broken" in checked.stdout


def test_advice_of_train_where_there_is_no_data_set_downloads_it(server, run, files, tmp_path):
    place = tmp_path / "my data" / "tiny"
    dataset = module("dataset")
    with pytest.raises(dataset.InputError, match="no data set at .*--data-dir") as caught:
        dataset.load(place, 3, 8, 2)
    _, script, *arguments = shlex.split(str(caught.value).split(": ")[-1])
    assert Path(script).resolve() == SCRIPT
    result = run(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert contents(place) == files
    dataset.load(place, 3, 8, 2)
