"""Photographs of any size, read while training: the same images, whoever reads them."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from under_test import NAME, module

ROOT = Path(__file__).resolve().parent.parent
dataset, loader, images = module("dataset"), module("loader"), module("images")
augment = module("augment")
InputError = module("errors").InputError
TRANSFORM = augment.TrainTransform(img_size=48)
MIXUP = augment.Mixup(num_classes=3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three classes of 5, 6 and 7 training and 3 validation images, each of another size."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        for split, count in (("train", 5 + label), ("val", 3)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = generator.integers(40, 120, 2)
                pixels = generator.integers(0, 120, (height, width, 3)).astype(np.uint8)
                pixels[:, :, label] += 100
                image, exif = Image.fromarray(pixels), Image.Exif()
                exif[0x0112] = 1 + i  # turned upright when it is read
                image.save(folder / f"{i}.jpg", exif=exif)
    return root


def load(root, workers=0, cache=0, transform=TRANSFORM, side=48, crop_pct=0.9):
    crops = dataset.Crops(side, crop_pct, transform, workers, cache)
    return dataset.load(root, 3, None, None, False, crops)


def epoch(split, batch_size, seed=0, number=1):
    images, labels = zip(*split.batches(batch_size, seed, number))
    return np.concatenate(images), np.concatenate(labels)


def test_images_depend_on_seed_epoch_and_place_alone(photographs):
    """Not on who reads them, how many at a time, or whether they were decoded before."""
    train, val = load(photographs)
    assert len(train) == 18 and len(val) == 9 and train.image_shape == (48, 48, 3)
    expected, labels = epoch(train, 4)
    order = np.random.default_rng([0, 1]).permutation(18)
    assert np.array_equal(labels, np.repeat([0, 1, 2], [5, 6, 7])[order])
    for workers, cache, batch_size in ((0, 2**30, 4), (2, 0, 7), (3, 2**30, 18), (1, 0, 1)):
        other, _ = load(photographs, workers, cache)
        assert isinstance(other.photos[0], np.ndarray) == (cache > 0)
        for _ in range(2):  # again, by the same processes
            actual, actual_labels = epoch(other, batch_size)
            assert np.array_equal(actual, expected) and np.array_equal(actual_labels, labels)
    for seed, number in ((0, 2), (1, 1)):
        assert not np.array_equal(epoch(train, 4, seed, number)[0], expected)


def test_an_image_is_transformed_by_a_generator_of_its_own(photographs):
    train, _ = load(photographs)
    actual, _ = epoch(train, 4, seed=3, number=2)
    order = np.random.default_rng([3, 2]).permutation(18)
    for place, index in enumerate(order.tolist()):
        photo = images.decode_one(train.photos[index], upright=True)
        pixels = TRANSFORM.augment(photo, np.random.default_rng([3, 2, index, 1]))
        expected = images.normalise(pixels[None])
        TRANSFORM.erase(expected[0], np.random.default_rng([3, 2, index, 2]))
        assert np.array_equal(actual[place], expected[0])


def test_batches_are_mixed_before_they_are_normalised_and_erased(photographs):
    """As upstream's training does, with timm's prefetcher."""
    train, _ = load(photographs)
    plain, _ = zip(*train.batches(6, 0, 1))
    train.mixup = MIXUP
    mixed, targets = zip(*train.batches(6, 0, 1))
    order = np.random.default_rng([0, 1]).permutation(18)
    for number, (images_of, target) in enumerate(zip(mixed, targets)):
        place = order[6 * number : 6 * number + 6].tolist()
        pixels = np.stack([train.read(index, 0, 1) for index in place])
        generator = np.random.default_rng([0, 1, number, 3])
        pixels, expected = MIXUP(pixels, train.labels[place], generator)
        expected_images = images.normalise(pixels)
        for image, index in zip(expected_images, place):
            TRANSFORM.erase(image, np.random.default_rng([0, 1, index, 2]))
        assert np.array_equal(images_of, expected_images) and np.array_equal(target, expected)
        assert target.shape == (6, 3) and np.allclose(target.sum(1), 1)
    assert not np.array_equal(mixed[0], plain[0])


def test_evaluation_sees_what_predict_sees(photographs):
    _, val = load(photographs, workers=2)
    actual, labels = epoch(val, 4, seed=None, number=None)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for image, path in zip(actual, val.photos):
        expected = images.normalise(images.read_photo(path, 48, 48, 0.9)[None])[0]
        assert np.array_equal(image, expected)


def test_without_a_transform_images_are_cut_as_in_evaluation_and_flipped(photographs):
    train, _ = load(photographs, transform=None)
    train.hflip = 0.3
    actual, _ = epoch(train, 5)
    generator = np.random.default_rng([0, 1])
    order, flips = generator.permutation(18), generator.random(18) < 0.3
    assert 0 < flips.sum() < 18
    for image, index, flipped in zip(actual, order, flips):
        expected = images.normalise(images.read_photo(train.photos[index], 48, 48, 0.9)[None])[0]
        assert np.array_equal(image, expected[:, :, ::-1] if flipped else expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_photograph_is_named_when_it_is_read(photographs, tmp_path, workers):
    shutil.copytree(photographs, tmp_path / "photos")
    damaged = tmp_path / "photos" / "train" / "bee" / "3.jpg"
    train, _ = load(tmp_path / "photos", workers)
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.raises(InputError, match="bee/3.jpg cannot be read .*replace it"):
        epoch(train, 4)


@pytest.mark.parametrize("noticed", [False, True])
def test_a_worker_that_is_killed_ends_the_pass_in_one_line(photographs, noticed):
    """Whether its result is asked for next, or the pool has noticed before it takes a new task."""
    train, _ = load(photographs, workers=1)
    batches = train.batches(2, 0, 1)
    next(batches)
    (pid,) = train.loader.pool._processes
    os.kill(pid, signal.SIGKILL)
    while noticed and not train.loader.pool._broken:
        time.sleep(0.01)
    with pytest.raises(InputError, match="a process that reads images was killed"):
        list(batches)


def test_more_workers_than_the_system_allows_are_one_line(photographs):
    """And those that were started end, which would wait for tasks for ever."""
    train, _ = load(photographs, workers=500)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    before = set(multiprocessing.active_children())
    try:
        with pytest.raises(InputError, match="cannot start 500 processes .* lower --workers"):
            next(train.batches(2, 0, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for process in set(multiprocessing.active_children()) - before:
        process.join(10)
        assert process.exitcode is not None


def test_a_process_without_images_reads_none(photographs):
    _, val = load(photographs, workers=1)
    val.share = lambda count: np.zeros(0, int)
    assert list(val.batches(2)) == []


def test_a_pass_that_ends_early_leaves_no_work_behind(photographs):
    train, _ = load(photographs, workers=1)
    batches = train.batches(2, 0, 1)
    next(batches)
    batches.close()
    expected, _ = epoch(load(photographs)[0], 4)
    assert np.array_equal(epoch(train, 4)[0], expected)


def test_memory_is_that_of_the_job(tmp_path, monkeypatch):
    """The least limit of its control group and those around it, of either version."""
    loader, groups = module("loader"), tmp_path / "cgroup"
    job = tmp_path / "memory" / "slurm" / "job"
    job.mkdir(parents=True)
    groups.write_text("7:memory:/slurm/job\n1:cpu:/\n")
    (job / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (job.parent / "memory.limit_in_bytes").write_text("8000000\n")
    assert loader.memory_limit(groups, tmp_path) == 8_000_000
    (tmp_path / "memory.max").write_text("max\n")
    groups.write_text("0::/elsewhere\n")
    assert loader.memory_limit(groups, tmp_path) == loader.memory_limit(tmp_path / "none")
    (tmp_path / "memory.max").write_text("9000000\n")
    assert loader.memory_limit(groups, tmp_path) == 9_000_000
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    assert loader.default_cache() == loader.memory_limit() // 4 // 4


def test_memory_is_bounded_and_counted(photographs):
    train, val = load(photographs)
    count = images.count_bytes([*train.photos])
    exact = sum(images.decode_one(path).nbytes for path in train.photos)
    assert count == exact  # fewer than are sampled
    split = load(photographs, cache=exact)
    assert isinstance(split[0].photos[0], np.ndarray) and isinstance(split[1].photos[0], Path)
    assert isinstance(load(photographs, cache=exact - 1)[0].photos[0], Path)
    train.loader.workers = 1
    epoch(train, 4)
    assert train.loader.memory.shape == (loader.AHEAD + 1, 4, 48, 48, 3)


def run(*options, program="train.py"):
    command = [sys.executable, ROOT / f"{NAME}_impl" / program, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_a_folder_of_photographs_is_trained_on_and_predicted(impl, photographs, tmp_path):
    """All classes and images without being asked; predict.py finds what --evaluate counts."""
    size = ["--data-dir", photographs, "--img-size", "64", "-b", "6", "--no-progress"]
    options = [*size, "--epochs", "1", "--output", tmp_path, "--workers", "1"]
    result = run(*options)
    assert result.returncode == 0, result.stderr
    assert "18 training and 9 validation images of 3 classes: ant bee cat" in result.stdout
    last = tmp_path / f"last{impl.suffix}.safetensors"
    measured = run("--evaluate", last, "--data-dir", photographs)
    assert "on 9 images of 3 classes" in measured.stdout, measured.stderr
    top1 = float(measured.stdout.split("top-1 ")[1].split(",")[0])
    options = [photographs / "val", "--checkpoint", last, "--topk", "1", "--csv"]
    lines = run(*options, program="predict.py").stdout.splitlines()[1:]
    right = sum(Path(line.split(",")[0]).parent.name in line.split(",")[3:] for line in lines)
    assert len(lines) == 9 and right / 9 == pytest.approx(top1, abs=1e-4)
    shown = ["cam", "--checkpoint", last, "--samples", "4", "--output", tmp_path / "visual"]
    result = run(*shown, program="visualize.py")
    assert result.returncode == 0, result.stderr


def test_photographs_of_many_sizes_need_a_size(photographs, tmp_path):
    result = run("--data-dir", photographs, "--output", tmp_path)
    assert result.returncode == 2 and "give --img-size" in result.stderr


@pytest.mark.parametrize("how", ["Ctrl-C", "killed"])
def test_workers_end_with_the_program(photographs, tmp_path, how):
    options = ["--data-dir", photographs, "--img-size", "64", "-b", "6", "--epochs", "1000"]
    options += ["--output", tmp_path, "--workers", "2"]
    command = [sys.executable, ROOT / f"{NAME}_impl" / "train.py", *options]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("epoch 1/1000: train"):
            break
    if how == "killed":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    status = -signal.SIGKILL if how == "killed" else 128 + signal.SIGINT
    assert process.wait(60) == status
    deadline = time.time() + 10
    while time.time() < deadline and alive(process.pid):
        time.sleep(0.1)
    assert not alive(process.pid)


def alive(session):
    """Whether a process of this session is left, other than as a zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if int(of) == session and state != "Z":
            return True
    return False
