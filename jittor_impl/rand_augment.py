"""RandAugment (arXiv 1909.13719) as in timm 0.6.12, with Pillow: operations, and what draws them.

Nothing here depends on a framework.
"""

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageEnhance, ImageOps
from .images import MEAN

FILL = tuple(round(255 * float(mean)) for mean in MEAN)  # where nothing is left to move in


def affine(image, matrix, resample):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL)


def rotate(image, degrees, resample):
    return image.rotate(degrees, resample, fillcolor=FILL)


def shear_x(image, factor, resample):
    return affine(image, (1, factor, 0, 0, 1, 0), resample)


def shear_y(image, factor, resample):
    return affine(image, (1, 0, 0, factor, 1, 0), resample)


def translate_x(image, share, resample):
    return affine(image, (1, 0, share * image.width, 0, 1, 0), resample)


def translate_y(image, share, resample):
    return affine(image, (1, 0, 0, 0, 1, share * image.height), resample)


def solarize_add(image, add):
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def brightness(image, factor):
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image, factor):
    return ImageEnhance.Contrast(image).enhance(factor)


def color(image, factor):
    return ImageEnhance.Color(image).enhance(factor)


def sharpness(image, factor):
    return ImageEnhance.Sharpness(image).enhance(factor)


RESAMPLING = {rotate, shear_x, shear_y, translate_x, translate_y}  # these take a filter, last


class Op(NamedTuple):
    """An operation of RandAugment: function(image, argument(level)).

    The level is the magnitude / 10; of `signed` ones, half of the levels are negated.
    """

    function: Callable
    argument: Callable | None = None
    signed: bool = False


# By timm's names. Their order decides what a seed draws.
SHARED = {
    "AutoContrast": Op(ImageOps.autocontrast),
    "Equalize": Op(ImageOps.equalize),
    "Invert": Op(ImageOps.invert),
    "Rotate": Op(rotate, lambda level: level * 30, signed=True),
    "SolarizeAdd": Op(solarize_add, lambda level: int(level * 110)),
    "ShearX": Op(shear_x, lambda level: level * 0.3, signed=True),
    "ShearY": Op(shear_y, lambda level: level * 0.3, signed=True),
    "TranslateXRel": Op(translate_x, lambda level: level * 0.45, signed=True),
    "TranslateYRel": Op(translate_y, lambda level: level * 0.45, signed=True),
}


def enhanced(level):
    return level * 1.8 + 0.1


def enhanced_increasing(level):
    return max(0.1, 1 + level * 0.9)


PLAIN = SHARED | {
    "Posterize": Op(ImageOps.posterize, lambda level: int(level * 4)),
    "Solarize": Op(ImageOps.solarize, lambda level: int(level * 256)),
    "Color": Op(color, enhanced),
    "Contrast": Op(contrast, enhanced),
    "Brightness": Op(brightness, enhanced),
    "Sharpness": Op(sharpness, enhanced),
}
INCREASING = SHARED | {  # the larger the magnitude, the further from the image itself
    "PosterizeIncreasing": Op(ImageOps.posterize, lambda level: 4 - int(level * 4)),
    "SolarizeIncreasing": Op(ImageOps.solarize, lambda level: 256 - int(level * 256)),
    "ColorIncreasing": Op(color, enhanced_increasing, signed=True),
    "ContrastIncreasing": Op(contrast, enhanced_increasing, signed=True),
    "BrightnessIncreasing": Op(brightness, enhanced_increasing, signed=True),
    "SharpnessIncreasing": Op(sharpness, enhanced_increasing, signed=True),
}


class RandAugment(NamedTuple):
    """Which operations are drawn, and how strong.

    `num_layers` times one of `ops`, each applied with probability `prob`; its magnitude is normal
    with deviation `magnitude_std`, cut off at 0 and 10. A deviation above 100 stands for uniform
    from 0 to `magnitude`.
    """

    ops: tuple
    magnitude: int
    num_layers: int
    magnitude_std: float
    prob: float

    def draw(self, resamples, generator):
        """Steps [(function, *arguments)], each to be applied to a Pillow image."""
        steps = []
        for index in generator.integers(len(self.ops), size=self.num_layers):
            if generator.random() >= self.prob:
                continue
            function, argument, signed = self.ops[index]
            level = self.draw_magnitude(generator) / 10
            if signed and generator.random() >= 0.5:
                level = -level
            arguments = [argument(level)] if argument else []
            if function in RESAMPLING:
                arguments.append(draw_one(resamples, generator))
            steps.append((function, *arguments))
        return steps

    def draw_magnitude(self, generator):
        if self.magnitude_std > 100:
            return generator.uniform(0, self.magnitude)
        return min(max(generator.normal(self.magnitude, self.magnitude_std), 0), 10)


@lru_cache
def rand_augment(config):
    """timm's text for RandAugment -> RandAugment. Raises ValueError.

    rand-m9-n2-mstd0.5-inc1-p0.5: magnitude 9 (default 10), 2 layers (2), deviation of the magnitude
    0.5 (0), operations that increase with it (0), probability of each 0.5 (0.5), in any order.
    """
    name, *sections = config.split("-")
    matches = [re.fullmatch(r"(m|n|inc)(\d+)|(mstd|p)(\d+(?:\.\d+)?)", text) for text in sections]
    values = {m[1] or m[3]: float(m[2] or m[4]) for m in matches if m}
    limits = {"m": 10, "n": 15, "mstd": math.inf, "inc": 1, "p": 1}
    within = all(value <= limits[key] for key, value in values.items())
    if name != "rand" or len(values) < len(sections) or not within:
        raise ValueError(
            f"auto_augment is {config!r}; give rand-m9-mstd0.5-inc1 or the like: m (magnitude) up "
            "to 10, n (operations) up to 15, mstd (deviation of m), inc (increasing) 0 or 1, "
            "p (probability) up to 1"
        )
    ops = tuple((INCREASING if values.get("inc") else PLAIN).values())
    magnitude, num_layers = int(values.get("m", 10)), int(values.get("n", 2))
    return RandAugment(ops, magnitude, num_layers, values.get("mstd", 0.0), values.get("p", 0.5))


def draw_one(choices, generator):
    return choices[generator.integers(len(choices))] if len(choices) > 1 else choices[0]
