"""The training transforms by themselves; test_augment_oracles.py has them beside timm's."""

import numpy as np
import pytest
from PIL import Image
from under_test import module

augment, images, rand_augment = module("augment"), module("images"), module("rand_augment")
TrainTransform, Mixup = augment.TrainTransform, augment.Mixup


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def generator(*seed):
    return np.random.default_rng(seed)


def test_an_image_is_its_generators_alone():
    transform, image = TrainTransform(32), noise(50, 70, 3)
    one, again = (transform(image, generator(3, 1, 4)) for _ in range(2))
    assert one.shape == (3, 32, 32) and one.dtype == np.float32 and one.flags.c_contiguous
    assert np.array_equal(one, again)
    assert np.array_equal(one, transform(Image.fromarray(image), generator(3, 1, 4)))
    others = [transform(image, generator(3, 1, index)) for index in range(4)]
    assert all(not np.array_equal(one, other) for other in others)
    assert np.array_equal(image, noise(50, 70, 3))


def test_the_steps_of_upstreams_loader_are_the_transform():
    """Those that stand before and after mixing: augment(), normalise(), erase()."""
    transform, image = TrainTransform(32, reprob=1), noise(50, 70, 3)
    whole, same = transform(image, generator(5)), generator(5)
    pixels = transform.augment(image, same)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    steps = images.normalise(pixels[None])[0]
    assert not np.array_equal(whole, steps)
    transform.erase(steps, same)
    assert np.array_equal(whole, steps)


@pytest.mark.parametrize("auto_augment", [None, "rand-m9-n15-mstd0.5-inc1-p1"])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 7), (7, 1), (2, 2), (1, 500), (500, 1)])
def test_images_of_few_pixels(height, width, auto_augment):
    for img_size in (1, 2, 16):
        transform = TrainTransform(img_size, auto_augment=auto_augment, reprob=1)
        for seed in range(40):
            result = transform(noise(height, width, 3, seed=seed), generator(seed))
            assert result.shape == (3, img_size, img_size) and np.isfinite(result).all()


def test_a_ratio_that_fits_no_pixel():
    box = augment.draw_crop(1, 1, (1, 1), (0.01, 0.02), generator(0))
    assert box == (0, 0, 1, 1)


def test_colour_jitter_where_randaugment_is_off():
    drawn = TrainTransform(8, auto_augment=None).draw(9, 9, generator(0))
    assert {step[0] for step in drawn[3]} == {augment.brightness, augment.contrast, augment.color}
    assert TrainTransform(8, auto_augment=None, color_jitter=0).draw(9, 9, generator(0))[3] == []
    functions = {op.function for op in rand_augment.INCREASING.values()}
    drawn = [TrainTransform(8).draw(9, 9, generator(seed)) for seed in range(400)]
    assert {step[0] for _, _, _, steps in drawn for step in steps} == functions


def test_erasing_fills_a_box_with_normal_noise():
    transform = TrainTransform(8, reprob=1)
    erased = []
    for seed in range(200):
        image = np.full((3, 64, 48), 100, np.float32)
        transform.erase(image, generator(seed))
        changed = (image != 100).all(axis=0)
        assert np.array_equal(changed, (image != 100).any(axis=0))
        rows, columns = changed.any(axis=1), changed.any(axis=0)
        assert np.array_equal(changed, rows[:, None] & columns)  # a box
        assert 0.015 < changed.mean() < 0.35
        erased.append(image[:, changed].ravel())
    erased = np.concatenate(erased)
    assert abs(erased.mean()) < 5 / len(erased) ** 0.5  # five standard errors
    assert abs(erased.var() - 1) < 5 * (2 / len(erased)) ** 0.5
    kept = np.full((3, 64, 48), 100, np.float32)
    TrainTransform(8, reprob=0).erase(kept, generator(0))
    assert (kept == 100).all()


@pytest.mark.parametrize(
    "text, magnitude, num_layers, magnitude_std, increasing, prob",
    [
        ("rand-m9-mstd0.5-inc1", 9, 2, 0.5, True, 0.5),
        ("rand", 10, 2, 0, False, 0.5),
        ("rand-n3-m0-p0.25-inc0", 0, 3, 0, False, 0.25),
        ("rand-mstd101-p1", 10, 2, 101, False, 1),
    ],
)
def test_text_of_randaugment(text, magnitude, num_layers, magnitude_std, increasing, prob):
    table = rand_augment.INCREASING if increasing else rand_augment.PLAIN
    expected = (tuple(table.values()), magnitude, num_layers, magnitude_std, prob)
    assert rand_augment.rand_augment(text) == expected and len(table) == 15


WRONG_TEXTS = ["", "v0", "rand-", "rand-m", "rand-m11", "rand-m9.5", "rand-n16", "rand-x1"]
WRONG_TEXTS += ["rand-m-1", "rand-inc2", "rand-p1.5", "rand-m9-m9", "rand-m9 ", "Rand-m9", "randm9"]


@pytest.mark.parametrize("text", WRONG_TEXTS)
def test_wrong_texts_of_randaugment(text):
    with pytest.raises(ValueError, match="^auto_augment is ") as error:
        TrainTransform(8, auto_augment=text)
    assert repr(text) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make, name, value",
    [
        (TrainTransform, "img_size", 0),
        (TrainTransform, "scale", (0, 1)),
        (TrainTransform, "scale", (0.5, 0.4)),
        (TrainTransform, "scale", (0.5, 1.1)),
        (TrainTransform, "ratio", (0, 1)),
        (TrainTransform, "ratio", (2, 1)),
        (TrainTransform, "ratio", (1, float("nan"))),
        (TrainTransform, "ratio", (1, float("inf"))),
        (TrainTransform, "interpolation", "nearest"),
        (TrainTransform, "hflip", 1.5),
        (TrainTransform, "color_jitter", -0.1),
        (TrainTransform, "color_jitter", float("inf")),
        (TrainTransform, "reprob", float("nan")),
        (Mixup, "num_classes", 0),
        (Mixup, "mixup", -1),
        (Mixup, "cutmix", float("nan")),
        (Mixup, "cutmix", float("inf")),
        (Mixup, "prob", 2),
        (Mixup, "switch_prob", -0.5),
        (Mixup, "smoothing", 1.1),
    ],
)
def test_wrong_options_are_named(make, name, value):
    needed = {TrainTransform: {"img_size": 8}, Mixup: {"num_classes": 10}}[make]
    make(**needed)
    with pytest.raises(ValueError, match=f"^{name} is .*; give "):
        make(**(needed | {name: value}))


def batch(n, dtype=np.float32):
    if dtype == np.uint8:
        return noise(n, 12, 16, 3), np.arange(n) % 5
    return generator(n).standard_normal((n, 3, 12, 16), np.float32), np.arange(n) % 5


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_mixing_batches_of_any_size(n, dtype):
    pixels, labels = batch(n, dtype)
    kinds = set()
    for seed in range(40):
        mixup = Mixup(num_classes=5)
        lam, box = mixup.draw(16, 12, generator(seed))
        mixed, targets = mixup(pixels, labels, generator(seed))
        assert mixed.shape == pixels.shape and mixed.dtype == dtype
        assert targets.shape == (n, 5) and targets.dtype == np.float32
        assert targets.sum(axis=1) == pytest.approx(1, abs=1e-6)
        # The share of an image's own label, but for smoothing, is that of its pixels.
        other = labels[::-1] != labels
        own = targets[np.arange(n), labels][other]
        assert own == pytest.approx(0.9 * lam + 0.02, abs=1e-6)
        if box and other.any():
            kept = (mixed == pixels).all(axis=3 if dtype == np.uint8 else 1)[other]
            # Noise alike in two images: in uint8, one pixel of 2^24.
            assert kept.mean(axis=(1, 2)) == pytest.approx(lam, abs=1e-6)
        kinds.add(box is None)
    assert kinds == {True, False}
    assert np.array_equal(pixels, batch(n, dtype)[0])


@pytest.mark.parametrize("options", [{"prob": 0}, {"mixup": 0, "cutmix": 0}])
def test_without_mixing_targets_are_smoothed(options):
    pixels, labels = batch(4)
    mixed, targets = Mixup(num_classes=5, **options)(pixels, labels, generator(0))
    assert np.array_equal(mixed, pixels)
    expected = np.full((4, 5), 0.02, np.float32)
    expected[np.arange(4), labels] = 0.92
    assert targets == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("options, cut", [({"mixup": 0}, True), ({"cutmix": 0}, False)])
def test_one_kind_of_mixing_alone(options, cut):
    boxes = [Mixup(num_classes=5, **options).draw(16, 12, generator(i))[1] for i in range(20)]
    assert all((box is not None) == cut for box in boxes)


def test_the_last_odd_pixel_of_cutmix_is_lost():
    """As in timm 0.6.12; a box of half of the area of 100 x 100 is 70 pixels, of 102 x 102 72."""
    for side, expected in ((100, 70), (101, 70), (102, 72), (103, 72)):
        for seed in range(50):
            left, top, right, bottom = augment.draw_cutmix(side, side, 0.5, generator(seed))
            assert 0 <= left <= right <= side and 0 <= top <= bottom <= side
            for low, high in ((left, right), (top, bottom)):
                assert high - low == expected or low == 0 or high == side
