"""The training transforms beside timm's, which is made to draw from the same generator.

What the installed timm does differently from 0.6.12, which upstream names, is said where it shows.
"""

import math
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from under_test import module

timm_data = pytest.importorskip("timm.data")
timm_augment = pytest.importorskip("timm.data.auto_augment")
timm_erasing = pytest.importorskip("timm.data.random_erasing")
timm_mixup = pytest.importorskip("timm.data.mixup")
timm_transforms = pytest.importorskip("timm.data.transforms")
torchvision = pytest.importorskip("torchvision.transforms")
matplotlib = pytest.importorskip("matplotlib")
augment, rand_augment = module("augment"), module("rand_augment")
DRAWS = 10_000
EPS = float(np.finfo(np.float32).eps)
OPS = rand_augment.PLAIN | rand_augment.INCREASING
RESAMPLES = list(augment.RESAMPLES.values())


class Source:
    """What Python's random, NumPy's and PyTorch's give, from one generator."""

    def __init__(self, generator):
        self.uniform, self.gauss, self.beta = generator.uniform, generator.normal, generator.beta
        self.random = self.rand = generator.random
        self.integers = generator.integers

    def randint(self, low, high):
        """Python's, which may be `high`."""
        return int(self.integers(low, high, endpoint=True))

    def integer(self, low, high, size=None):
        """NumPy's randint, which may not."""
        assert size is None
        return int(self.integers(low, high))

    def choice(self, options, size=None, replace=True, p=None):
        assert replace and p is None
        indices = self.integers(len(options), size=size)
        return options[indices] if size is None else [options[index] for index in indices]


@pytest.fixture
def timm_draws_from(monkeypatch):
    """A function that makes timm and torchvision draw from a generator."""

    def set_source(generator):
        source = Source(generator)
        for part in (timm_augment, timm_erasing, timm_transforms):
            monkeypatch.setattr(part, "random", source)
        for name in ("choice", "rand", "beta"):
            monkeypatch.setattr(np.random, name, getattr(source, name))
        monkeypatch.setattr(np.random, "randint", source.integer)
        monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor([generator.random()]).double())

        def noise(per_pixel, rand_color, patch_size, **_):
            assert per_pixel
            return torch.from_numpy(generator.standard_normal(patch_size, np.float32))

        monkeypatch.setattr(timm_erasing, "_get_pixels", noise)

    return set_source


@pytest.fixture(scope="module")
def photo():
    """A photograph of 512 x 600 pixels that matplotlib brings along."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(path).convert("RGB")


@pytest.fixture(scope="module")
def pictures(photo):
    noise = np.random.default_rng(0).integers(0, 256, (33, 47, 3)).astype(np.uint8)
    dark = (np.asarray(photo.resize((64, 64))) // 3 + 20).astype(np.uint8)
    flat = np.full((8, 8, 3), 77, np.uint8)
    return [photo.resize((224, 224)), *map(Image.fromarray, (noise, dark, flat))]


def timm_op(name, magnitude, resample):
    hparams = {"img_mean": rand_augment.FILL, "interpolation": resample}
    return timm_augment.AugmentOp(name, prob=1, magnitude=magnitude, hparams=hparams)


@pytest.mark.parametrize("name", OPS)
def test_operations_are_timms(name, pictures, monkeypatch):
    function, argument, signed = OPS[name]
    changed = 0
    for magnitude in (0, 0.5, 2.5, 5, 7.3, 9, 9.99, 10):
        for sign in (1, -1):
            negate = 0 if sign == 1 else 1  # timm's: where random() is above 0.5
            monkeypatch.setattr(timm_augment.random, "random", lambda draw=negate: draw)
            for resample in RESAMPLES:
                theirs = timm_op(name, magnitude, resample)
                level = magnitude / 10 * (sign if signed else 1)
                ours = [argument(level)] if argument else []
                expected = theirs.level_fn(magnitude, theirs.hparams) if argument else ()
                assert tuple(ours) == expected
                if function in rand_augment.RESAMPLING:
                    ours.append(resample)
                for picture in pictures:
                    actual, wanted = function(picture, *ours), theirs(picture)
                    assert np.array_equal(np.asarray(actual), np.asarray(wanted))
                    changed += not np.array_equal(np.asarray(actual), np.asarray(picture))
    assert changed >= 16
    assert (theirs.level_fn is None) == (argument is None)
    assert theirs.kwargs["fillcolor"] == rand_augment.FILL == (124, 116, 104)


def test_operations_are_listed_as_timms():
    assert set(rand_augment.PLAIN) == set(timm_augment._RAND_TRANSFORMS)
    assert set(rand_augment.INCREASING) == set(timm_augment._RAND_INCREASING_TRANSFORMS)


def timm_transform(img_size, auto_augment, interpolation="random", **options):
    """timm's transforms for training, drawing RandAugment's operations in our order."""
    transform = timm_data.create_transform(
        img_size,
        is_training=True,
        auto_augment=auto_augment,
        interpolation=interpolation,
        re_mode="pixel",
        **options,
    )
    for step in transform.transforms:
        if isinstance(step, timm_augment.RandAugment):
            ours = rand_augment.rand_augment(auto_augment).ops
            names = [next(name for name in OPS if OPS[name] is op) for op in ours]
            by_name = {op.name: op for op in step.ops}
            step.ops = [by_name[name] for name in names]
    return transform


@pytest.mark.parametrize(
    "auto_augment, interpolation",
    [
        ("rand-m9-mstd0.5-inc1", "random"),
        ("rand-m5-n4-mstd2-p0.8", "bicubic"),
        ("rand-m7-n3-mstd101-inc1", "bilinear"),
    ],
)
def test_whole_transforms_are_timms(auto_augment, interpolation, photo, timm_draws_from):
    """Of the same draws, in the same order: equal pixels, normalised and erased."""
    ours = augment.TrainTransform(
        64, auto_augment=auto_augment, interpolation=interpolation, reprob=0.5
    )
    theirs = timm_transform(64, auto_augment, interpolation, re_prob=0.5)
    small = photo.resize((90, 70))
    for seed in range(150):
        generator, same = (np.random.default_rng([7, seed]) for _ in range(2))
        timm_draws_from(same)
        actual, expected = ours(small, generator), theirs(small).numpy()
        # As in test_oracles.py, normalising: five roundings in ours, three in theirs.
        assert np.abs(actual - expected).max() <= 8 * EPS / 2 * max(1, np.abs(expected).max())
        assert generator.random() == same.random()  # both drew as often


def test_colour_jitter_is_torchvisions(photo, monkeypatch):
    """Of the same factors in the same order."""
    small, theirs = photo.resize((64, 64)), torchvision.ColorJitter(0.4, 0.4, 0.4)
    functions = [augment.brightness, augment.contrast, augment.color]  # in torchvision's order
    for seed in range(20):
        steps = augment.draw_color_jitter(0.4, np.random.default_rng(seed))
        factors = {functions.index(function): factor for function, factor in steps}
        drawn = (list(factors), *(factors[index] for index in range(3)), None)
        monkeypatch.setattr(theirs, "get_params", lambda *_, drawn=drawn: drawn)
        actual = small
        for function, factor in steps:
            actual = function(actual, factor)
        assert np.array_equal(np.asarray(actual), np.asarray(theirs(small)))


def mixed_by_timm(images, labels, uint8, **options):
    if uint8:  # (n, H, W, 3) -> (n, 3, H, W)
        pairs = list(zip(images.transpose(0, 3, 1, 2).copy(), labels))
        mixed, targets = timm_mixup.FastCollateMixup(**options)(pairs)
        return mixed.numpy().transpose(0, 2, 3, 1), targets.numpy()  # (n, 3, H, W) -> (n, H, W, 3)
    mixed, targets = torch.from_numpy(images.copy()), torch.from_numpy(labels)
    return [tensor.numpy() for tensor in timm_mixup.Mixup(**options)(mixed, targets)]


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize(
    "mixup, cutmix, prob, switch_prob, smoothing",
    [(0.8, 1.0, 1, 0.5, 0.1), (0.2, 0, 0.7, 0.5, 0), (0, 0.5, 1, 0.5, 0.3), (1, 1, 1, 0.2, 0.1)],
)
def test_mixing_is_timms(mixup, cutmix, prob, switch_prob, smoothing, uint8, timm_draws_from):
    """Of the same draws: the same bits, images and targets.

    timm 0.6.12 takes CutMix's box one pixel smaller where its side is odd; a newer timm does not.
    The sides drawn here are even.
    """
    generator = np.random.default_rng(0)
    images = generator.standard_normal((6, 3, 20, 28), np.float32)
    if uint8:
        images = generator.integers(0, 256, (6, 20, 28, 3)).astype(np.uint8)
    labels = np.array([0, 3, 3, 6, 2, 0])
    ours = augment.Mixup(7, mixup, cutmix, prob, switch_prob, smoothing)
    options = dict(mixup_alpha=mixup, cutmix_alpha=cutmix, prob=prob, switch_prob=switch_prob)
    options |= dict(label_smoothing=smoothing, num_classes=7)
    kinds = set()
    for seed in range(300):
        generator, same = (np.random.default_rng([7, seed]) for _ in range(2))
        lam, box = ours.draw(28, 20, np.random.default_rng([7, seed]))
        if box is not None and not has_even_sides(ours, seed):
            continue
        timm_draws_from(same)
        actual = ours(images, labels, generator)
        expected = mixed_by_timm(images, labels, uint8, **options)
        for one, other in zip(actual, expected):
            assert one.dtype == other.dtype and np.array_equal(one, other)
        assert generator.random() == same.random()
        kinds.add("none" if lam == 1 else "mixup" if box is None else "cutmix")
    assert kinds >= {kind for kind, a in (("mixup", mixup), ("cutmix", cutmix)) if a}


def has_even_sides(mixup, seed):
    """Whether the sides of CutMix's box, before it is cut off at the edges, are even."""
    drawn = []

    def record(width, height, lam, generator):
        drawn.extend(int(side * math.sqrt(1 - lam)) for side in (width, height))
        return 0, 0, 1, 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "draw_cutmix", record)
        mixup.draw(28, 20, np.random.default_rng([7, seed]))
    return all(side % 2 == 0 for side in drawn)


def distance(ours, theirs):
    """Kolmogorov and Smirnov's distance of two samples, as a share of what chance exceeds once
    in a thousand times."""
    ours, theirs = np.sort(ours), np.sort(theirs)
    values = np.concatenate([ours, theirs])
    ranks = [
        np.searchsorted(sample, values, side="right") / len(sample) for sample in (ours, theirs)
    ]
    sizes = (len(ours) + len(theirs)) / (len(ours) * len(theirs))
    return np.abs(ranks[0] - ranks[1]).max() / math.sqrt(-math.log(0.001 / 2) / 2 * sizes)


def assert_alike(ours, theirs, names):
    """Samples (draws, quantities), column by column."""
    ours, theirs = np.array(ours, float), np.array(theirs, float)
    assert ours.shape[1] == theirs.shape[1] == len(names) and len(ours) > 0.4 * DRAWS
    for name, one, other in zip(names, ours.T, theirs.T):
        assert distance(one, other) < 1, name


@pytest.fixture
def seeded():
    """Python's, NumPy's and PyTorch's own generators from a fixed seed, put back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    yield
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])


def describe(left, top, right, bottom):
    """Area, log of the aspect, position."""
    w, h = right - left, bottom - top
    return w * h, math.log(w / h), left, top


BOX = ("area", "aspect", "left", "top")


@pytest.mark.parametrize("width, height", [(500, 375), (64, 64), (90, 300)])
def test_crops_are_distributed_as_timms(width, height, seeded):
    generator, image = np.random.default_rng(1), Image.new("RGB", (width, height))
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    ours = [augment.draw_crop(width, height, scale, ratio, generator) for _ in range(DRAWS)]
    get_params = timm_transforms.RandomResizedCropAndInterpolation.get_params
    theirs = [get_params(image, scale, ratio) for _ in range(DRAWS)]  # top, left, height, width
    theirs = [(left, top, left + w, top + h) for top, left, h, w in theirs]
    assert_alike([describe(*box) for box in ours], [describe(*box) for box in theirs], BOX)
    # Another range is told apart.
    other = [augment.draw_crop(width, height, (0.12, 1), ratio, generator) for _ in range(DRAWS)]
    areas = [[describe(*box)[0] for box in boxes] for boxes in (ours, other)]
    assert distance(*areas) > 1


def test_erasing_is_distributed_as_timms(seeded):
    generator, transform = np.random.default_rng(2), augment.TrainTransform(64, reprob=0.9)
    eraser = timm_erasing.RandomErasing(0.9, mode="pixel", max_count=1, device="cpu")
    samples = []
    for erase in (lambda image: transform.erase(image.numpy(), generator), eraser):
        sample = []
        for _ in range(DRAWS):
            image = torch.full((3, 40, 56), 100.0)
            erase(image)
            changed = image[1].numpy() != 100
            rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
            if len(rows):
                box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
                sample.append((*describe(*box), image[1, rows[0], columns[0]].item()))
        samples.append(sample)
    assert_alike(*samples, (*BOX, "noise"))
    for sample in samples:  # five standard errors of nine tenths
        assert abs(len(sample) / DRAWS - 0.9) < 5 * math.sqrt(0.9 * 0.1 / DRAWS)


def test_colour_jitter_is_distributed_as_torchvisions(seeded):
    """The three factors, and in which order they act."""
    generator = np.random.default_rng(4)
    functions = augment.brightness, augment.contrast, augment.color
    jitter = torchvision.ColorJitter(0.4, 0.4, 0.4)  # as timm makes it of 0.4
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    ours, theirs = [], []
    for _ in range(DRAWS):
        steps = augment.draw_color_jitter(0.4, generator)
        factors, order = dict(steps), [functions.index(function) for function, _ in steps]
        ours.append([*(factors[function] for function in functions), *order])
        order, *factors, hue = jitter.get_params(*ranges)
        assert hue is None
        theirs.append([*factors, *(place for place in order.tolist() if place < 3)])
    assert_alike(ours, theirs, ("brightness", "contrast", "color", "first", "second", "third"))


def test_operations_are_distributed_as_timms(seeded, monkeypatch):
    """Which are applied, how many of two, with which arguments and filters."""
    config, generator, theirs = "rand-m9-mstd0.5-inc1", np.random.default_rng(3), []
    names = {op.function: name for name, op in rand_augment.INCREASING.items()}
    functions = list(names)

    def record(function, _, *arguments, **options):
        if function in rand_augment.RESAMPLING:
            arguments += (timm_augment._interpolation(options),)
        theirs[-1].append((function, *arguments))

    for function, name in names.items():
        monkeypatch.setitem(timm_augment.NAME_TO_OP, name, partial(record, function))
    transform = timm_augment.rand_augment_transform(config, dict(img_mean=rand_augment.FILL))
    for _ in range(DRAWS):
        theirs.append([])
        transform(None)
    drawer = rand_augment.rand_augment(config)
    ours = [drawer.draw(RESAMPLES, generator) for _ in range(DRAWS)]

    counts = [[len(steps) for steps in drawn] for drawn in (ours, theirs)]
    assert distance(*counts) < 1 and set(counts[0]) == {0, 1, 2}
    ours, theirs = ([step for steps in drawn for step in steps] for drawn in (ours, theirs))
    chosen = [[functions.index(step[0]) for step in drawn] for drawn in (ours, theirs)]
    assert distance(*chosen) < 1
    for function in functions:
        of_ours, of_theirs = (
            [list(map(float, step[1:])) for step in drawn if step[0] == function]
            for drawn in (ours, theirs)
        )
        assert min(len(of_ours), len(of_theirs)) > 500
        for one, other in zip(np.array(of_ours).T, np.array(of_theirs).T):
            assert distance(one, other) < 1, names[function]


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 1.0), (0.8, 0), (0.2, 0.5)])
def test_mixing_is_distributed_as_timms(mixup, cutmix, seeded):
    """lam, whether it is CutMix, and its box.

    The installed timm keeps the odd pixels that 0.6.12 takes off, half a pixel of 224 in the mean:
    too little to show in 10,000 draws.
    """
    generator, ours, theirs = np.random.default_rng(4), [], []
    drawer = augment.Mixup(10, mixup, cutmix)
    mixer = timm_mixup.Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, num_classes=10)
    for _ in range(DRAWS):
        lam, box = drawer.draw(224, 224, generator)
        ours.append((lam, box is not None, *(box or (0, 0, 0, 0))))
        lam, cut = mixer._params_per_batch()
        top, bottom, left, right = 0, 0, 0, 0
        if cut:
            (top, bottom, left, right), lam = timm_mixup.cutmix_bbox_and_lam((3, 224, 224), lam)
        theirs.append((lam, cut, left, top, right, bottom))
    assert_alike(ours, theirs, ("lam", "cutmix", "left", "top", "right", "bottom"))
    other = augment.Mixup(10, mixup / 2, cutmix)
    other = [other.draw(224, 224, generator)[0] for _ in range(DRAWS)]
    assert distance([row[0] for row in ours], other) > 1  # another alpha is told apart
