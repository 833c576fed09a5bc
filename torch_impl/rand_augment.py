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
    """An operation of RandAugment: function(image, argument), argument(level, sign).

    The level is the magnitude / 10, the sign 1 or -1.
    """

    function: Callable
    argument: Callable | None = None


# By timm's names. Their order decides what a seed draws.
SHARED = {
    "AutoContrast": Op(ImageOps.autocontrast),
    "Equalize": Op(ImageOps.equalize),
    "Invert": Op(ImageOps.invert),
    "Rotate": Op(rotate, lambda level, sign: sign * level * 30),
    "SolarizeAdd": Op(solarize_add, lambda level, _: int(level * 110)),
    "ShearX": Op(shear_x, lambda level, sign: sign * level * 0.3),
    "ShearY": Op(shear_y, lambda level, sign: sign * level * 0.3),
    "TranslateXRel": Op(translate_x, lambda level, sign: sign * level * 0.45),
    "TranslateYRel": Op(translate_y, lambda level, sign: sign * level * 0.45),
}


def enhanced(level, _):
    return level * 1.8 + 0.1


def enhanced_increasing(level, sign):
    return max(0.1, 1 + sign * level * 0.9)


PLAIN = SHARED | {
    "Posterize": Op(ImageOps.posterize, lambda level, _: int(level * 4)),
    "Solarize": Op(ImageOps.solarize, lambda level, _: int(level * 256)),
    "Color": Op(color, enhanced),
    "Contrast": Op(contrast, enhanced),
    "Brightness": Op(brightness, enhanced),
    "Sharpness": Op(sharpness, enhanced),
}
INCREASING = SHARED | {  # the larger the magnitude, the further from the image itself
    "PosterizeIncreasing": Op(ImageOps.posterize, lambda level, _: 4 - int(level * 4)),
    "SolarizeIncreasing": Op(ImageOps.solarize, lambda level, _: 256 - int(level * 256)),
    "ColorIncreasing": Op(color, enhanced_increasing),
    "ContrastIncreasing": Op(contrast, enhanced_increasing),
    "BrightnessIncreasing": Op(brightness, enhanced_increasing),
    "SharpnessIncreasing": Op(sharpness, enhanced_increasing),
}


class RandAugment(NamedTuple):
    """Which operations are drawn, and how strong (arXiv 1909.13719, in timm's variant).

    `layers` times one of `ops`, each applied with probability `prob`; its magnitude is normal with
    deviation `std`, cut off at 0 and 10. Above 100, `std` stands for uniform from 0 to `magnitude`.
    """

    ops: tuple
    magnitude: int
    layers: int
    std: float
    prob: float

    def draw(self, resamples, generator):
        """Steps [(function, *arguments)], each to be applied to a Pillow image."""
        steps = []
        for index in generator.integers(len(self.ops), size=self.layers):
            if generator.random() >= self.prob:
                continue
            function, argument = self.ops[index]
            level, sign = self.draw_magnitude(generator) / 10, draw_sign(generator)
            arguments = [argument(level, sign)] if argument else []
            if function in RESAMPLING:
                arguments.append(draw_one(resamples, generator))
            steps.append((function, *arguments))
        return steps

    def draw_magnitude(self, generator):
        if self.std > 100:
            return generator.uniform(0, self.magnitude)
        return min(max(generator.normal(self.magnitude, self.std), 0), 10)


@lru_cache
def rand_augment(config):
    """timm's text for RandAugment -> RandAugment. Raises ValueError.

    rand-m9-n2-mstd0.5-inc1-p0.5: magnitude 9 (default 10), 2 layers (2), deviation of the magnitude
    0.5 (0), operations that increase with it (0), probability of each 0.5 (0.5), in any order.
    """
    name, *sections = config.split("-")
    matches = [re.fullmatch(r"(m|n|inc)(\d+)|(mstd|p)(\d+(?:\.\d+)?)", text) for text in sections]
    values = {m[1] or m[3]: float(m[2] or m[4]) for m in matches if m}
    limits = {"m": 10, "inc": 1, "p": 1}
    within = all(value <= limits.get(key, math.inf) for key, value in values.items())
    if name != "rand" or len(values) < len(sections) or not within:
        raise ValueError(
            f"auto_augment is {config!r}; give rand and what departs from -m10-n2-mstd0-inc0-p0.5, "
            "such as rand-m9-mstd0.5-inc1: magnitude up to 10, operations, its deviation, whether "
            "they increase with it, probability"
        )
    ops = tuple((INCREASING if values.get("inc") else PLAIN).values())
    magnitude, layers = int(values.get("m", 10)), int(values.get("n", 2))
    return RandAugment(ops, magnitude, layers, values.get("mstd", 0.0), values.get("p", 0.5))


def draw_sign(generator):
    return 1 if generator.random() < 0.5 else -1


def draw_one(choices, generator):
    return choices[generator.integers(len(choices))] if len(choices) > 1 else choices[0]
