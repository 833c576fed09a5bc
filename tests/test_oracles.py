"""Our batches and layers beside torchvision's and timm's, which are the same ones."""

import numpy as np
import pytest
import torch
from PIL import Image
from under_test import module

transforms = pytest.importorskip("torchvision.transforms.functional")
timm = pytest.importorskip("timm.layers")
create_transform = pytest.importorskip("timm.data").create_transform
timm_grn = pytest.importorskip("timm.layers.grn")
timm_optim = pytest.importorskip("timm.optim")
timm_scheduler = pytest.importorskip("timm.scheduler")
timm_utils = pytest.importorskip("timm.utils")
dataset, layers, reader = module("dataset"), module("layers"), module("images")
ema, models, recipe, train = module("ema"), module("models"), module("recipe"), module("train")
EPS = float(np.finfo(np.float32).eps)


def normal(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


def assert_equal_but_for_rounding(actual, expected, operations):
    """Each of the operations rounds its result by half a unit in the last place, at most."""
    error = (actual - expected).abs().max().item()
    assert error <= operations * EPS / 2 * expected.abs().max().item(), error


def test_batches_are_flipped_tensors_normalised():
    """ToTensor, RandomHorizontalFlip, Normalize, image by image, in our order, with our flips."""
    data = object.__new__(dataset.TinyImageNet)
    generator = np.random.default_rng(0)
    data.images = generator.integers(0, 256, (40, 16, 20, 3)).astype(np.uint8)
    data.labels = np.arange(40)
    generator = np.random.default_rng([3, 2])
    order, flips = generator.permutation(40), generator.random(40) < 0.5
    batches = list(data.batches(16, seed=3, epoch=2))
    images = torch.from_numpy(np.concatenate([images for images, _ in batches]))
    assert 0 < flips.sum() < 40
    for image, index, flipped in zip(images, order, flips):
        expected = transforms.to_tensor(data.images[index])
        expected = transforms.hflip(expected) if flipped else expected
        expected = transforms.normalize(expected, reader.MEAN.tolist(), reader.STD.tolist())
        # Ours multiplies by 1 / (255 * std) and subtracts mean / std: five roundings, theirs three.
        assert_equal_but_for_rounding(image, expected, operations=8)


@pytest.mark.parametrize("shape", [(50, 120), (121, 50), (33, 33), (20, 17), (64, 64)])
@pytest.mark.parametrize("side, crop_pct", [(64, 1), (32, 0.925), (33, 0.875)])
def test_photographs_are_cut_as_timm_and_torchvision_do(tmp_path, shape, side, crop_pct):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    actual = reader.read_photo(tmp_path / "photo.png", side, side, crop_pct)
    options = dict(is_training=False, interpolation="bicubic", crop_pct=crop_pct)
    steps = create_transform(side, **options).transforms[:2]  # Resize, CenterCrop
    expected = Image.fromarray(pixels)
    for step in steps:
        expected = step(expected)
    assert np.array_equal(actual, np.asarray(expected))


def test_drop_path_is_timms(monkeypatch):
    """For the same draw. timm draws whether a sample is kept, ours drops it below drop_prob."""
    x, layer = normal(64, 3, 4, 5), layers.DropPath(0.3).train()
    layer.seed = [0, 7]
    draws = torch.from_numpy(np.random.default_rng([0, 7]).random((64, 1, 1, 1)))
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda t, keep: t.copy_(draws >= 1 - keep))
    expected = timm.DropPath(0.3).train()(x)
    assert (expected == 0).any() and (expected != 0).any()
    assert torch.equal(layer(x), layer(x))
    assert_equal_but_for_rounding(layer(x), expected, operations=3)
    assert torch.equal(layer.eval()(x), x)


def test_squeeze_and_excitation_is_timms():
    x, ours = normal(3, 40, 5, 6), layers.SEModule(40)
    theirs = timm.SEModule(40, rd_channels=16, act_layer=torch.nn.GELU)
    for name, index in (("fc1", 1), ("fc2", 3)):
        getattr(theirs, name).load_state_dict(ours.proj[index].state_dict())
    # Means of 30, products of 40 and of 16 numbers.
    assert_equal_but_for_rounding(ours(x), theirs(x), operations=30 + 40 + 16)


def test_layer_norm_2d_is_timms():
    x, ours, theirs = normal(2, 24, 5, 7) + 3, layers.LayerNorm2d(24), timm.LayerNorm2d(24)
    ours.weight.data, ours.bias.data = normal(24, seed=1), normal(24, seed=2)
    theirs.load_state_dict(ours.state_dict())
    assert ours.eps == theirs.eps == 1e-6
    assert_equal_but_for_rounding(ours(x), theirs(x), operations=2 * 24)


def test_grn_is_timms():
    x, ours = normal(2, 24, 5, 7), layers.GRN(24)
    theirs = timm_grn.GlobalResponseNorm(24, channels_last=False)
    ours.gamma.data, ours.beta.data = normal(1, 24, 1, 1, seed=1), normal(1, 24, 1, 1, seed=2)
    theirs.weight.data, theirs.bias.data = ours.gamma.data.flatten(), ours.beta.data.flatten()
    # Norms of 35 pixels, their mean over 24 channels.
    assert_equal_but_for_rounding(ours(x), theirs(x), operations=35 + 24)


def paper_args(*words):
    words = ["--recipe", "paper", "--device", "cpu", "--num-classes", "3", *words]
    args = train.make_parser(recipe.choose_recipe(words)).parse_args(words)
    recipe.settle_recipe(args)
    return args


@pytest.mark.parametrize("words", [(), ("--epochs", "7", "--warmup-epochs", "0", "--lr", "0.1")])
def test_the_learning_rate_is_timms_cosine(words):
    args = paper_args("-b", "1024", *words)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler = timm_scheduler.CosineLRScheduler(
        optimizer,
        t_initial=args.epochs,
        lr_min=args.min_lr,
        warmup_t=args.warmup_epochs,
        warmup_lr_init=args.warmup_lr,
    )
    total = recipe.total_epochs(args)
    assert total == scheduler.t_initial + 10 and args.lr == (0.1 if words else 1e-3)
    for epoch in range(1, total + 1):
        expected = optimizer.param_groups[0]["lr"]
        assert recipe.learning_rate(args, epoch) == pytest.approx(expected, rel=1e-12), epoch
        scheduler.step(epoch)


def test_what_decays_is_what_timm_decays():
    model, args = models.overlock_xxt(num_classes=3), paper_args()
    ours = train.make_optimizer(model, args).param_groups
    theirs = timm_optim.param_groups_weight_decay(model, weight_decay=args.weight_decay)

    def by_decay(groups):
        return {group["weight_decay"]: {id(p) for p in group["params"]} for group in groups}

    assert len(ours) == 2 and by_decay(ours) == by_decay(theirs)


def test_averaged_weights_are_timms():
    model, average = models.overlock_xxt(num_classes=2), models.overlock_xxt(num_classes=2)
    ours = ema.ModelEma(average, 0.9)
    theirs = timm_utils.ModelEmaV2(model, decay=0.9)
    for seed in range(3):
        for i, value in enumerate(model.state_dict().values()):
            value.copy_(normal(*value.shape, seed=[seed, i]) if value.dim() else value + 1)
        ours.update(model)
        theirs.update(model)
    state = model.state_dict()
    for key, value in ours.module.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert value == state[key] == 3  # timm's average of a number is cut off
        else:
            expected = theirs.module.state_dict()[key]
            # Each of three steps rounds a difference, a product and a sum of values up to 5.
            assert (value - expected).abs().max() <= 9 * EPS / 2 * 5


def test_gradient_checkpointing_changes_no_number():
    """Losses, gradients and BatchNorm's statistics, with drop path in every block."""
    options = ["-b", "4", "--img-size", "64"]
    states, steps = [], []
    for words in ([], ["--grad-checkpointing"]):
        args = paper_args(*options, *words)
        model = train.make_model(args)
        optimizer = train.make_optimizer(model, args)
        model.train()
        images = np.random.default_rng(0).standard_normal((4, 3, 64, 64)).astype(np.float32)
        steps.append(train.training_step(model, optimizer, images, np.array([0, 1, 2, 0]), args, 5))
        states.append(model.state_dict())
    assert steps[0] == steps[1]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
