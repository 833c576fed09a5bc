"""Recipes: the options of training that belong together, and what they mean in an epoch.

tiny is the published experiment. paper is OverLoCK's training on ImageNet: the values of upstream's
train.py and scripts, with the meaning that timm 0.6.12 gives them. finetune starts from such
weights: ConvNeXt's fine-tuning at 224 pixels (its TRAINING.md), with this network's drop path, for
one GPU.
"""

import argparse
import copy
import math

from .augment import Mixup, TrainTransform
from .errors import InputError
from .loader import default_workers
from .program import number

# Stochastic depth by variant; XXT is not upstream's, and as small as XT.
DROP_PATH = {
    "overlock_xxt": 0.1,
    "overlock_xt": 0.1,
    "overlock_t": 0.15,
    "overlock_s": 0.4,
    "overlock_b": 0.5,
}
TINY = dict(
    epochs=20, sched="constant", lr=1e-3, warmup_epochs=0, warmup_lr=1e-6, min_lr=1e-5,
    cooldown_epochs=0, weight_decay=0.01, bias_decay=True, layer_decay=1.0, clip_grad=0.0,
    ema_decay=0.0, drop_path=0.0, img_size=None, crop_pct=0.925, scale=None, ratio=(3 / 4, 4 / 3),
    train_interpolation="random", hflip=0.5, aa="none", color_jitter=0.4, reprob=0.0, mixup=0.0,
    cutmix=0.0, mixup_prob=1.0, mixup_switch_prob=0.5, smoothing=0.0,
)  # fmt: skip
PAPER = dict(
    epochs=300, sched="cosine", lr=None, warmup_epochs=5, cooldown_epochs=10, weight_decay=0.05,
    bias_decay=False, clip_grad=5.0, ema_decay=0.9999, img_size=224, scale=(0.08, 1.0),
    aa="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1,
)  # fmt: skip
FINETUNE = dict(
    epochs=30, sched="cosine", lr=5e-5, min_lr=1e-6, weight_decay=1e-8, bias_decay=False,
    layer_decay=0.8, img_size=224, scale=(0.08, 1.0), aa="rand-m9-mstd0.5-inc1", reprob=0.25,
    smoothing=0.1,
)  # fmt: skip
RECIPES = {"tiny": TINY, "paper": {**TINY, **PAPER}, "finetune": {**TINY, **FINETUNE}}
# What needs --scale, beside --aa and --reprob, which are off by default.
CROP_OPTIONS = ("ratio", "train_interpolation", "color_jitter")
# The place of each part for layer-wise learning rates, in order of execution.
LAYERS = (
    ("patch_embed1",),
    ("blocks1",),
    ("patch_embed2", "blocks2"),
    ("patch_embed3", "blocks3"),
    ("patch_embed4", "blocks4", "high_level_proj"),
    ("sub_blocks3",),
    ("patch_embedx", "sub_blocks4"),
    ("aux_head", "head"),
)


def choose_recipe(words=None):
    """The values of the recipe that the command line `words` names, for its --model."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--model", default="overlock_xxt")
    try:
        args, _ = parser.parse_known_args(words)
    except argparse.ArgumentError:  # what is wrong, the real parser says better
        return recipe("tiny", "overlock_xxt")
    return recipe(args.recipe, args.model)


def recipe(name, model):
    """{option: value} of a recipe; of tiny where there is none of this name."""
    values = RECIPES.get(name, TINY)
    return values if values is TINY else {**values, "drop_path": DROP_PATH.get(model, 0.0)}


def add_recipe_options(parser):
    """--recipe and the options whose defaults it sets, and how images are read for them."""
    of_recipes = "the values below: the published experiment, the paper's, or fine-tuning"
    parser.add_argument("--recipe", choices=RECIPES, default="tiny", help=of_recipes)
    count, share = number(int, 0), number(float, 0, maximum=1)
    positive = number(float, 0, exclusive=True)

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=number(int, 1), help="epochs in all, those before --resume included")
    add("--sched", choices=("constant", "cosine"), help="learning rate over the epochs")
    add("--lr", type=positive, help="learning rate of AdamW; None: 1e-3 x images a step / 1024")
    add("--warmup-epochs", type=count, help="epochs in which the learning rate rises")
    add("--warmup-lr", type=positive, help="where it rises from")
    add("--min-lr", type=number(float, 0), help="where the cosine ends")
    add("--cooldown-epochs", type=count, help="epochs at --min-lr after the cosine's --epochs")
    add("--layer-decay", type=positive, help="learning rate of each part by that of the next one")
    add("--weight-decay", type=number(float, 0), help="weight decay of AdamW")
    decay = "weight decay on vectors and biases too"
    add("--bias-decay", action=argparse.BooleanOptionalAction, help=decay)
    add("--clip-grad", type=number(float, 0), help="largest norm of all gradients; 0: no clipping")
    add("--ema-decay", type=share, help="of averaged weights, evaluated beside the others; 0: none")
    parts = "split each step in N parts of --batch-size, for the step of an N times larger batch"
    add("--grad-accumulation", type=number(int, 1), default=1, metavar="N", help=parts)
    again = "compute blocks again in the backward pass, which saves memory"
    add("--grad-checkpointing", action="store_true", help=again)
    add("--drop-path", type=number(float, 0, maximum=0.99), help="stochastic depth, last block's")
    add("--smoothing", type=share, help="label smoothing")

    add = parser.add_argument_group("images and augmentation").add_argument
    size = "side of the network's images; None: images of one size, kept as they are"
    add("--img-size", type=number(int, 32, maximum=8192), help=size)
    crop = "evaluation: share of the resized image's side that is cut out (with --img-size)"
    add("--crop-pct", type=number(float, 0.01, maximum=1), help=crop)
    area = "random resized crop: bounds of its share of the area; None: as in evaluation"
    add("--scale", type=positive, nargs=2, metavar=("MIN", "MAX"), help=area)
    ratio = "bounds of its aspect ratio"
    add("--ratio", type=positive, nargs=2, metavar=("MIN", "MAX"), help=ratio)
    kinds = ("random", "bilinear", "bicubic")
    add("--train-interpolation", choices=kinds, help="how the crop is resized")
    add("--hflip", type=share, help="probability of a flip from left to right")
    add("--aa", metavar="POLICY", help="RandAugment as timm writes it, or none")
    add("--color-jitter", type=number(float, 0), help="colour jitter where --aa is none")
    add("--reprob", type=share, help="probability of random erasing")
    add("--mixup", type=number(float, 0), help="mixup's alpha; 0: none")
    add("--cutmix", type=number(float, 0), help="cutmix's alpha; 0: none")
    add("--mixup-prob", type=share, help="probability of mixup or cutmix")
    add("--mixup-switch-prob", type=share, help="probability of cutmix where both are on")
    ahead = "processes that read images ahead of the step (with --img-size)"
    add("--workers", type=count, default=default_workers(), help=ahead)
    cache = "memory for decoded images (with --img-size); None: a quarter of the job's"
    add("--cache-gib", type=number(float, 0, maximum=2**20), help=cache)


def images_per_step(args):
    return args.batch_size * args.grad_accumulation


def total_epochs(args):
    return args.epochs + args.cooldown_epochs


def fill_in(args):
    """Fill in what depends on other options."""
    if args.lr is None:
        args.lr = 1e-3 * images_per_step(args) / 1024
    if args.sched == "constant" and "cooldown_epochs" not in args.given:
        args.cooldown_epochs = 0  # a recipe's follow its cosine


def with_recipe(args, name):
    """What settle_recipe makes of the options given if those of --recipe `name` are the others."""
    args = copy.copy(args)
    values = {"recipe": name, **recipe(name, args.model)}
    for option in values.keys() - (args.given - {"recipe"}):
        setattr(args, option, values[option])
    fill_in(args)
    return args


def settle_recipe(args):
    """Fill in what depends on other options. Raises InputError if some do not go together."""
    fill_in(args)
    if args.scale is not None and args.img_size is None:
        raise InputError("--scale needs --img-size; give the size to train at")
    for name in ("aa", "reprob", *CROP_OPTIONS):
        changes = name in args.given and getattr(args, name) not in ("none", 0)
        if changes and args.scale is None:
            needs = f"--{name.replace('_', '-')} needs random resized crops"
            size = "" if args.img_size else "--img-size and "
            raise InputError(f"{needs}; give {size}--scale, such as 0.08 1, or leave it out")
    if args.warmup_epochs >= total_epochs(args):
        raise InputError(
            f"--warmup-epochs {args.warmup_epochs} leaves none of the {total_epochs(args)} epochs; "
            "give fewer, or more --epochs"
        )
    if args.sched == "constant" and args.cooldown_epochs:
        raise InputError("--cooldown-epochs is for --sched cosine; give that too, or leave it out")
    for name in ("scale", "ratio"):
        bounds = getattr(args, name)
        if bounds and bounds[0] > bounds[1]:
            raise InputError(f"--{name} {bounds[0]} {bounds[1]}: the smaller number comes first")
    try:
        train_transform(args)
    except ValueError as error:
        raise InputError(str(error).replace("auto_augment is", "--aa is")) from None


def learning_rate(args, epoch):
    """That of an epoch, counted from 1: timm's CosineLRScheduler, epoch by epoch, or constant."""
    t = epoch - 1
    if t < args.warmup_epochs:
        return args.warmup_lr + t * (args.lr - args.warmup_lr) / args.warmup_epochs
    if args.sched == "constant":
        return args.lr
    if t >= args.epochs:
        return args.min_lr
    cosine = math.cos(math.pi * t / args.epochs)
    return args.min_lr + 0.5 * (args.lr - args.min_lr) * (1 + cosine)


def parameter_groups(shapes, args):
    """Which parameters share learning rate and weight decay; `shapes` are {name: shape}.

    Returns dicts of names, lr_scale, by which the learning rate is multiplied (ConvNeXt's
    layer-wise decay), and weight_decay, 0 for vectors and biases (timm) without --bias-decay.
    """
    place = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    groups = {}
    for name, shape in shapes.items():
        decayed = args.bias_decay or len(shape) > 1 and not name.endswith(".bias")
        above = len(LAYERS) - 1 - place[name.partition(".")[0]]
        groups.setdefault((args.layer_decay**above, decayed), []).append(name)
    return [
        dict(names=names, lr_scale=scale, weight_decay=args.weight_decay if decayed else 0.0)
        for (scale, decayed), names in groups.items()
    ]


def train_transform(args):
    """The augment.TrainTransform of training images; None without --scale."""
    if args.scale is None:
        return None
    return TrainTransform(
        img_size=args.img_size,
        scale=args.scale,
        ratio=args.ratio,
        interpolation=args.train_interpolation,
        hflip=args.hflip,
        auto_augment=None if args.aa == "none" else args.aa,
        color_jitter=args.color_jitter,
        reprob=args.reprob,
    )


def mixup(args):
    """The augment.Mixup of training batches; None where images and labels stay as they are."""
    if not (args.mixup or args.cutmix or args.smoothing):
        return None
    return Mixup(
        mixup=args.mixup,
        cutmix=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        smoothing=args.smoothing,
        num_classes=args.num_classes,
    )
