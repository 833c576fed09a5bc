"""The training transforms of timm 0.6.12, as the official train.py uses them, in NumPy and Pillow.

All that is random is drawn from the NumPy generator that is passed in. What was drawn is applied
by functions without chance, which give timm's pixels for the same parameters. Nothing here depends
on a framework: both implementations get the same arrays, bit by bit.

The official training mixes images before they are normalised and erased (timm's "prefetcher"):
TrainTransform.augment(), Mixup, normalise(), TrainTransform.erase(). With --no-prefetcher it mixes
last: TrainTransform(), Mixup.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from .images import normalise
from .rand_augment import brightness, color, contrast, draw_one, rand_augment

RESAMPLES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
ATTEMPTS = 10  # to draw a box that fits
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


def check(name, value, low, high=math.inf):
    """Raise a ValueError that names the option unless low <= value <= high."""
    if not (low <= value <= high and math.isfinite(value)):
        wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} is {value}; give a number {wanted}")


def draw_color_jitter(strength, generator):
    """torchvision's ColorJitter(strength, strength, strength) as steps, in random order."""
    if strength == 0:
        return []
    factors = generator.uniform(max(0, 1 - strength), 1 + strength, size=3)
    steps = list(zip((brightness, contrast, color), factors.tolist()))
    return [steps[i] for i in generator.permutation(3)]


def draw_sides(area, areas, ratios, generator):
    """Two sides, rounded, of a box: its share of `area` is uniform, the log of their ratio too."""
    area *= generator.uniform(*areas)
    ratio = math.exp(generator.uniform(*map(math.log, ratios)))
    return round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))


def draw_place(width, height, w, h, generator):
    """The box (left, top, right, bottom) of w x h pixels at a place in an image."""
    top = int(generator.integers(height - h, endpoint=True))
    left = int(generator.integers(width - w, endpoint=True))
    return left, top, left + w, top + h


def draw_crop(width, height, scale, ratio, generator):
    """Box (left, top, right, bottom) in an image, as torchvision's RandomResizedCrop draws it.

    Where ten draws do not fit: the largest central one that `ratio` allows. A box without a pixel,
    on which theirs fails, does not fit.
    """
    for _ in range(ATTEMPTS):
        w, h = draw_sides(width * height, scale, ratio, generator)
        if 0 < w <= width and 0 < h <= height:
            return draw_place(width, height, w, h, generator)
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def draw_erasing(width, height, generator):
    """Box (left, top, right, bottom) of random erasing (arXiv 1708.04896); None if none fits."""
    for _ in range(ATTEMPTS):
        h, w = draw_sides(width * height, ERASED_AREA, ERASED_ASPECT, generator)
        if w < width and h < height:
            return draw_place(width, height, w, h, generator)
    return None


@dataclass(frozen=True)
class TrainTransform:
    """A photograph as it is trained on, new for each generator. Raises ValueError by option.

    timm's create_transform(is_training=True), with its names: a crop of `scale` of the area and of
    aspect `ratio`, resized; flipped with probability `hflip`; RandAugment as `auto_augment` says,
    or `color_jitter` where it is None; normalised; with probability `reprob` a box of noise.
    """

    img_size: int
    scale: tuple = (0.08, 1.0)
    ratio: tuple = (3 / 4, 4 / 3)
    interpolation: str = "random"  # bilinear or bicubic
    hflip: float = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    reprob: float = 0.25

    def __post_init__(self):
        check("img_size", self.img_size, 1)
        for name, most in (("scale", 1), ("ratio", math.inf)):
            low, high = getattr(self, name)
            if not (0 < low <= high <= most and math.isfinite(high)):
                limit = "" if most == math.inf else f", up to {most}"
                raise ValueError(f"{name} is {low} {high}; give two numbers above 0{limit}, rising")
        if self.interpolation not in ("random", *RESAMPLES):
            choices = ", ".join(RESAMPLES)
            raise ValueError(f"interpolation is {self.interpolation}; give random, {choices}")
        check("hflip", self.hflip, 0, 1)
        check("color_jitter", self.color_jitter, 0)
        check("reprob", self.reprob, 0, 1)
        if self.auto_augment is not None:
            rand_augment(self.auto_augment)

    def __call__(self, image, generator):
        """(H, W, 3) uint8 or a Pillow image, RGB -> (3, img_size, img_size) float32."""
        image = normalise(self.augment(image, generator)[None])[0]
        self.erase(image, generator)
        return image

    def augment(self, image, generator):
        """(H, W, 3) uint8 or a Pillow image, RGB -> (img_size, img_size, 3) uint8.

        All but normalising and erasing.
        """
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        return self.apply(image, *self.draw(image.width, image.height, generator))

    def draw(self, width, height, generator):
        """What apply() takes for an image of this size: the box, the filter, the flip, steps."""
        names = RESAMPLES if self.interpolation == "random" else [self.interpolation]
        resamples = [RESAMPLES[name] for name in names]
        box = draw_crop(width, height, self.scale, self.ratio, generator)
        resample, flip = draw_one(resamples, generator), generator.random() < self.hflip
        if self.auto_augment is None:
            steps = draw_color_jitter(self.color_jitter, generator)
        else:
            steps = rand_augment(self.auto_augment).draw(resamples, generator)
        return box, resample, flip, steps

    def apply(self, image, box, resample, flip, steps):
        """A Pillow image -> (img_size, img_size, 3) uint8."""
        image = image.crop(box).resize((self.img_size, self.img_size), resample)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for function, *arguments in steps:
            image = function(image, *arguments)
        return np.asarray(image)

    def erase(self, image, generator):
        """Random erasing in timm's mode "pixel", in place: `image` (3, H, W) float32."""
        if generator.random() >= self.reprob:
            return
        box = draw_erasing(image.shape[2], image.shape[1], generator)
        if box is not None:
            left, top, right, bottom = box
            shape = (3, bottom - top, right - left)
            image[:, top:bottom, left:right] = generator.standard_normal(shape, np.float32)


def draw_cutmix(width, height, lam, generator):
    """CutMix's box (left, top, right, bottom) of 1 - lam of the area, cut off at the edges.

    As in timm 0.6.12, in which odd sides lose a pixel; newer ones keep it.
    """
    share = math.sqrt(1 - lam)
    half_w, half_h = int(width * share) // 2, int(height * share) // 2
    y, x = int(generator.integers(height)), int(generator.integers(width))
    left, top = max(x - half_w, 0), max(y - half_h, 0)
    return left, top, min(x + half_w, width), min(y + half_h, height)


@dataclass(frozen=True)
class Mixup:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a batch with itself reversed.

    timm's Mixup in mode "batch", for batches of any size. With probability `prob` a batch is mixed,
    with `switch_prob` by CutMix; by the share lam of an image that stays, which is drawn from
    Beta(a, a), a = `mixup` or `cutmix` (0: never). Targets are smoothed by `smoothing`.
    Raises ValueError by option.
    """

    num_classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.1

    def __post_init__(self):
        check("num_classes", self.num_classes, 1)
        for name in ("mixup", "cutmix"):
            check(name, getattr(self, name), 0)
        for name in ("prob", "switch_prob", "smoothing"):
            check(name, getattr(self, name), 0, 1)

    def __call__(self, images, labels, generator):
        """Images (n, 3, H, W) float32 or (n, H, W, 3) uint8, labels (n,) -> images, targets.

        Images keep shape and type; uint8 are rounded, as by timm's FastCollateMixup. Targets are
        (n, num_classes) float32 and sum to 1.
        """
        height, width = images.shape[1:3] if images.dtype == np.uint8 else images.shape[2:]
        lam, box = self.draw(width, height, generator)
        return self.apply(images, lam, box), self.targets(labels, lam)

    def draw(self, width, height, generator):
        """lam and CutMix's box (left, top, right, bottom), which is None where images are mixed."""
        if not (self.mixup or self.cutmix) or generator.random() >= self.prob:
            return 1.0, None
        cut = self.cutmix > 0
        if self.mixup and self.cutmix:
            cut = generator.random() < self.switch_prob
        alpha = self.cutmix if cut else self.mixup
        lam = generator.beta(alpha, alpha)
        if not cut:
            return lam, None
        left, top, right, bottom = box = draw_cutmix(width, height, lam, generator)
        return 1 - (right - left) * (bottom - top) / (width * height), box

    def apply(self, images, lam, box):
        """Mix the images of a batch, each with that at its place in the batch reversed."""
        if lam == 1:
            return images
        if box is not None:
            left, top, right, bottom = box
            area = np.s_[..., top:bottom, left:right]  # of (n, 3, H, W)
            if images.dtype == np.uint8:
                area = np.s_[:, top:bottom, left:right]  # of (n, H, W, 3)
            mixed = images.copy()
            mixed[area] = images[::-1][area]
            return mixed
        kept, rest = np.float32(lam), np.float32(1 - lam)
        mixed = np.empty_like(images)
        for image, other, result in zip(images, images[::-1], mixed):  # each fits a cache
            total = np.multiply(image, kept, dtype=np.float32)
            total += np.multiply(other, rest, dtype=np.float32)
            result[:] = np.rint(total) if images.dtype == np.uint8 else total
        return mixed

    def targets(self, labels, lam):
        """(n, num_classes) float32: lam of the one label, 1 - lam of the other, smoothed."""
        off = self.smoothing / self.num_classes
        targets = np.full((len(labels), self.num_classes), off, np.float32)
        targets[np.arange(len(labels)), labels] = 1 - self.smoothing + off
        return targets * np.float32(lam) + targets[::-1] * np.float32(1 - lam)
