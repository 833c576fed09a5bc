"""Recipes: their values, and what the options of training do at a step."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from under_test import NAME, module

ROOT = Path(__file__).resolve().parent.parent
EPS = float(np.finfo(np.float32).eps)
models, recipe, train = module("models"), module("recipe"), module("train")
InputError = module("errors").InputError
model_arrays = module("checkpoint").model_arrays
ANY = ["-b", "8", "--num-classes", "3", "--device", "cpu"]
# The paper's recipe in three epochs of 36 images of 64 pixels; at the paper's rate nothing moves.
PAPER = ["--recipe", "paper", "--img-size", "64", "--warmup-epochs", "1", "--cooldown-epochs", "1"]
PAPER += ["--epochs", "2", "--ema-decay", "0.5", "--lr", "1e-3", "-b", "16", "--workers", "2"]
SIZES = ["--num-classes", "3", "--train-per-class", "12", "--val-per-class", "6", "--no-progress"]


def parse(*words):
    words = [*ANY, *words]
    args = train.make_parser(recipe.choose_recipe(words)).parse_args(words)
    recipe.settle_recipe(args)
    return args


class Heads(models.nn.Module):
    """A model that has no BatchNorm: two classifiers of the mean colour."""

    def __init__(self):
        super().__init__()
        self.head, self.aux_head = models.nn.Linear(3, 3), models.nn.Linear(3, 3)
        for i, parameter in enumerate((*self.head.parameters(), *self.aux_head.parameters())):
            values = np.random.default_rng(i).standard_normal(parameter.shape).astype(np.float32)
            set_value(parameter, values)

    def forward(self, images):
        colour = images.mean(3).mean(2)  # (n, 3, H, W) -> (n, 3)
        return dict(main=self.head(colour), aux=self.aux_head(colour))

    execute = forward


def set_value(parameter, values):
    if NAME == "torch":
        parameter.data.copy_(models.torch.from_numpy(values))
    else:
        parameter.update(models.jt.array(values))


def images_and_labels(n, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.standard_normal((n, 3, 4, 4)).astype(np.float32)
    return images, generator.integers(0, 3, n)


def test_the_recipes_values():
    assert parse().lr == 1e-3 and parse().epochs == 20 and parse().img_size is None
    paper = parse("--recipe", "paper", "-b", "512", "--grad-accumulation", "4")
    assert paper.lr == 2e-3 and paper.drop_path == 0.1 and paper.scale == (0.08, 1.0)
    for model, rate in (("xt", 0.1), ("t", 0.15), ("s", 0.4), ("b", 0.5)):
        assert parse("--model", f"overlock_{model}", "--recipe", "paper").drop_path == rate
    changed = parse("--recipe", "paper", "--drop-path", "0.2", "--bias-decay", "--mixup", "0")
    assert changed.drop_path == 0.2 and changed.bias_decay and changed.mixup == 0
    assert recipe.total_epochs(paper) == 310 and recipe.total_epochs(parse()) == 20


@pytest.mark.parametrize(
    "words, message",
    [
        (["--scale", "0.1", "1"], "--scale needs --img-size"),
        (["--aa", "rand-m9", "--img-size", "64"], "--aa needs .* --scale"),
        (["--reprob", "0.1", "--img-size", "64"], "--reprob needs .* --scale"),
        (["--recipe", "paper", "--scale", "1", "0.1"], "scale"),
        (["--recipe", "paper", "--aa", "rand-x9"], "--aa is 'rand-x9'"),
        (["--recipe", "paper", "--warmup-epochs", "9", "--epochs", "5", "--cooldown-epochs", "0"],
         "--warmup-epochs 9 leaves none of the 5 epochs"),
        (["--cooldown-epochs", "3"], "--cooldown-epochs is for --sched cosine"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(words, message):
    with pytest.raises(InputError, match=message):
        parse(*words)


def test_layer_decay_and_weight_decay():
    args = parse("--recipe", "finetune", "--lr", "1e-3")
    optimizer = train.make_optimizer(train.make_model(args), args)
    rates = {}
    for group in optimizer.param_groups:
        for name in group["names"]:
            rates[name] = group["lr"], group["weight_decay"]
    for name, above in (("head.4.weight", 0), ("sub_blocks4.0.rpb1", 1), ("blocks1.0.ls.bias", 6)):
        if name in rates:
            assert rates[name][0] == pytest.approx(1e-3 * 0.8**above), name
    assert rates["patch_embed1.0.weight"] == (pytest.approx(1e-3 * 0.8**7), 1e-8)
    assert rates["patch_embed1.1.weight"][1] == rates["head.4.bias"][1] == 0


@pytest.mark.parametrize("n", [12, 10])
def test_accumulated_gradients_are_those_of_the_larger_batch(n):
    """10 images in three parts weigh 4, 3 and 3."""
    images, labels = images_and_labels(n)
    results = []
    for words in (["-b", "12"], ["-b", "4", "--grad-accumulation", "3"]):
        args, model = parse(*words), Heads()
        model.train()
        optimizer = train.make_optimizer(model, args)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        results.append((train.training_step(model, optimizer, images, labels, args), model))
    (whole, one), (parts, other) = results
    assert whole == pytest.approx(parts, rel=10 * EPS)
    arrays, others = model_arrays(one), model_arrays(other)
    # AdamW's first step is the gradient by its size: rounding of sums of 12 numbers.
    for name, value in arrays.items():
        assert np.abs(value - others[name]).max() <= 0.1 * 100 * EPS, name


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_scales_all_gradients_together(impl, max_norm):
    images, labels = images_and_labels(8)
    gradients = []
    for clip in (0, max_norm):
        args, model = parse("--clip-grad", str(clip)), Heads()
        model.train()
        optimizer = train.make_optimizer(model, args)
        train.training_step(model, optimizer, images, labels, args)
        parameters = list(train.trainable(model).values())
        # After AdamW's first step the first moment is a tenth of the gradient.
        moments = module("checkpoint").optimizer_arrays(optimizer)
        gradients.append([moments[f"exp_avg.{name}"] * 10 for name in train.trainable(model)])
        assert len(parameters) == 4
    plain, clipped = gradients
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in plain))
    factor = min(1, max_norm / (norm + 1e-6))
    assert (factor < 1) == (max_norm < 1)
    for before, after in zip(plain, clipped):
        assert np.abs(after - before * factor).max() <= 20 * EPS * np.abs(before * factor).max()


def test_loss_of_soft_targets(impl):
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((6, 3)).astype(np.float32)
    targets = generator.dirichlet(np.ones(3), 6).astype(np.float32)
    output = dict(main=impl.array(logits), aux=impl.array(2 * logits))
    loss, main, aux = (impl.numpy(x).item() for x in train.losses(output, targets, parse()))
    for actual, scale in ((main, 1), (aux, 2)):
        z = scale * logits.astype(np.float64)
        log_softmax = z - np.log(np.exp(z).sum(1, keepdims=True))
        assert actual == pytest.approx(-(targets * log_softmax).sum(1).mean(), rel=10 * EPS)
    assert loss == pytest.approx(main + 0.4 * aux, rel=2 * EPS)


def test_drop_path_is_drawn_by_seed_step_and_name(impl):
    """By NumPy, so that both frameworks drop the same; again the same for the same step."""
    model = models.overlock_xxt(num_classes=2, drop_path_rate=0.5)
    layers = [m for m in model.modules() if isinstance(m, models.DropPath) and m.drop_prob > 0.2]
    ones = np.ones((64, 1, 1, 1), np.float32)
    for layer in layers:
        layer.train()

    def kept(*seed):
        model.seed_drop_path(*seed)
        return np.stack([impl.numpy(layer(impl.array(ones))).ravel() > 0 for layer in layers])

    first = kept(3, 1)
    assert np.array_equal(first, kept(3, 1))
    for other in (kept(3, 2), kept(4, 1)):
        assert 0.3 < (first != other).mean() < 0.7
    assert len(np.unique(first, axis=0)) == len(layers) > 4
    expected = np.random.default_rng(layers[0].seed).random(64) >= layers[0].drop_prob
    kept(3, 1)
    expected = np.random.default_rng(layers[0].seed).random(64) >= layers[0].drop_prob
    assert np.array_equal(first[0], expected) and layers[0].seed[:2] == [3, 1]


def test_a_batch_in_parts_drops_the_paths_of_the_whole(impl):
    distributed = module("distributed")
    model = models.overlock_xxt(num_classes=2, drop_path_rate=0.5)
    model.train()
    layer = [m for m in model.modules() if isinstance(m, models.DropPath)][-1]
    ones = np.ones((22, 1, 1, 1), np.float32)
    model.seed_drop_path(0, 1)
    whole = impl.numpy(layer(impl.array(ones)))
    parts = distributed.parts_of(22, 4)
    for part in parts:
        distributed.take(model, part)
        kept = impl.numpy(layer(impl.array(ones[part.rows])))
        assert np.array_equal(kept, whole[part.places])
    assert len(parts) == 4 and len(np.unique(whole)) == 2
    model.seed_drop_path(0, 1)  # the next batch may be a whole one
    distributed.take(model, distributed.parts_of(1, 4)[0])
    assert np.array_equal(impl.numpy(layer(impl.array(ones))), whole)


def test_averaged_weights(impl):
    """One step of 1 - decay of the way, BatchNorm's statistics too."""
    model, average = (models.overlock_xxt(num_classes=2, seed=seed) for seed in (0, 1))
    before, goal = model_arrays(average), model_arrays(model)
    module("ema").ModelEma(average, 0.75).update(model)
    for key, value in model_arrays(average).items():
        if not key.endswith("num_batches_tracked"):
            expected = before[key] + 0.25 * (goal[key].astype(np.float64) - before[key])
            assert np.abs(value - expected).max() <= 4 * EPS * np.abs(expected).max(), key


def run(*options, **how):
    command = [sys.executable, ROOT / f"{NAME}_impl" / "train.py", *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **how)


def table(path):
    with open(path) as f:
        rows = list(csv.DictReader(f))
    return [{k: v for k, v in row.items() if k not in ("epoch_time", "images_per_second")}
            for row in rows]  # fmt: skip


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A run by the paper's recipe, its weights averaged."""
    output = tmp_path_factory.mktemp("paper")
    result = run(*PAPER, *SIZES, "--data-dir", dataset, "--output", output)
    assert result.returncode == 0, result.stderr
    return output, result


def test_a_run_by_the_papers_recipe(impl, dataset, trained, tmp_path):
    output, result = trained
    rows = table(output / f"log{impl.suffix}.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and "epoch 3/3" in result.stdout
    for name in ("val_loss_ema", "acc_top1_ema", "acc_top5_ema"):
        assert all(float(row[name]) > 0 for row in rows)
    for words in ([], ["--use-ema"]):
        last = output / f"last{impl.suffix}.safetensors"
        # Without --img-size: as it was trained.
        measured = run("--evaluate", last, *words, *SIZES, "--data-dir", dataset)
        column = "val_loss_ema" if words else "val_loss"
        assert f"val loss {float(rows[-1][column]):.4f}" in measured.stdout, measured.stderr


def test_fine_tuning_goes_on_from_a_checkpoint(impl, dataset, trained, tmp_path):
    """At its low rate the first epoch ends near where the checkpoint stood."""
    output, _ = trained
    last, data = output / f"last{impl.suffix}.safetensors", ["--data-dir", dataset]
    options = ["--recipe", "finetune", "--img-size", 64, "--crop-pct", 1, "--epochs", 1, *SIZES]
    result = run(*options, "--init", last, *data, "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    (row,) = table(tmp_path / f"log{impl.suffix}.csv")
    before = table(output / f"log{impl.suffix}.csv")[-1]
    assert float(row["val_loss"]) == pytest.approx(float(before["val_loss"]), rel=0.1)


def test_resuming_goes_on_bit_for_bit(impl, dataset, trained, tmp_path):
    """With averaged weights, a cosine and drop path; read here, not by other processes."""
    options = [*PAPER, *SIZES, "--data-dir", dataset, "--output", tmp_path]
    command = [sys.executable, ROOT / f"{NAME}_impl" / "train.py", *options, "--workers", 0]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2/3"):
            process.kill()
            break
    process.wait()
    assert -process.returncode == signal.SIGKILL
    result = run(*options, "--resume")
    assert result.returncode == 0, result.stderr
    expected = table(trained[0] / f"log{impl.suffix}.csv")
    assert table(tmp_path / f"log{impl.suffix}.csv") == expected


@pytest.mark.parametrize(
    "words, message",
    [
        (["--mixup", "0.5"], "was started with --mixup 0.8"),
        (["--epochs", "9"], "was started with --epochs 2"),
        (["--bias-decay"], "was started with --no-bias-decay"),
        (["--scale", "0.5", "1"], "was started with --scale 0.08 1.0"),
        (["--grad-accumulation", "2"], "was started with --grad-accumulation 1"),
    ],
)
def test_another_recipe_is_not_resumed(impl, dataset, trained, words, message):
    output, _ = trained
    result = run(*PAPER, *SIZES, "--data-dir", dataset, "--output", output, *words, "--resume")
    assert result.returncode == 2 and message in result.stderr, result.stderr


def test_gradient_checkpointing_in_jittor(dataset, tmp_path):
    if NAME == "torch":
        pytest.skip("PyTorch has it: test_oracles.py")
    result = run(*SIZES, "--data-dir", dataset, "--output", tmp_path, "--grad-checkpointing")
    assert result.returncode == 2 and "cannot compute blocks again" in result.stderr
