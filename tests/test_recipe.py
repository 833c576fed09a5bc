"""Recipes: their values, and what the options of training do at a step."""

import csv
import json
import re
import shlex
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
        (["--color-jitter", "0.4"], "--color-jitter needs .*; give --img-size and --scale"),
        (["--ratio", "1", "2", "--img-size", "64"], "--ratio needs .* --scale, such as 0.08 1, or"),
        (["--train-interpolation", "bicubic"], "--train-interpolation needs .* leave it out"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(words, message):
    with pytest.raises(InputError, match=message):
        parse(*words)


def test_what_only_the_recipe_gives_need_not_be_left_out():
    assert parse("--recipe", "paper", "--sched", "constant").cooldown_epochs == 0
    with pytest.raises(
        InputError, match="--cooldown-epochs is for --sched cosine; .* leave it out"
    ):
        parse("--recipe", "paper", "--sched", "constant", "--cooldown-epochs", "10")


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--cache-gib", "1e300", "must be at most 1048576"),
        ("--cache-gib", "nan", "must be a finite number"),
        ("--img-size", "10000000000", "must be at most 8192"),
    ],
)
def test_numbers_that_no_machine_has(capsys, option, value, message):
    with pytest.raises(SystemExit, match="2"):
        parse(option, value)
    assert message in capsys.readouterr().err


# (options of the run, those of resuming it, what is said), {} stands for the folder.
RESUMED = [
    ("", "--train-per-class 5", "started without --train-per-class; leave it out, or start"),
    ("", "--img-size 64 --scale 0.5 1", "started without --img-size --scale; leave it out, or"),
    ("--seed 3", "--img-size 64", "with --seed 3 and without --img-size; give that too, leave"),
    ("--recipe paper", "", "with --recipe paper; give that too"),
    ("--recipe paper --mixup 0", "--epochs 9", "--recipe paper --epochs 300 --mixup 0.0; give"),
    (
        "--recipe paper --sched constant",
        "",
        "--recipe paper --sched constant --cooldown-epochs 0; give",
    ),
    ("", "--recipe paper", "with --recipe tiny; give that too"),
    ("--seed 3 --lr 0.1 --epochs 9", "", "with --seed 3 --lr 0.1; give that too"),
]


def history_of(epochs):
    return dict(epoch=epochs, history=[dict(acc_top1=0.5)] * epochs)


@pytest.mark.parametrize("started, resumed, message", RESUMED)
def test_all_that_a_resumed_run_lacks_is_named_at_once(tmp_path, started, resumed, message):
    """And what is said, done, is enough."""
    started = ["--data-dir", str(tmp_path), *started.split()]
    resumed = ["--data-dir", str(tmp_path), *resumed.split()]
    run = dict(args=json.loads(json.dumps(vars(parse(*started)), default=str)), **history_of(1))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        train.check_resumable(run, parse(*resumed), "FILE")
    said = str(caught.value).partition(" was started ")[2].partition(";")[0]
    absent = shlex.split(said.partition("without ")[2])
    while absent and absent[0] in resumed:
        i = resumed.index(absent.pop(0))
        resumed[i : i + 2 + (resumed[i] == "--scale")] = []
    resumed += shlex.split(said.partition("with ")[2].partition(" and ")[0])
    train.check_resumable(run, parse(*resumed), "FILE")


def test_resuming_without_the_folder_of_a_run_on_all_images(tmp_path):
    run = dict(args=vars(parse("--data-dir", str(tmp_path))), **history_of(1))
    args = parse()
    args.train_per_class = 500  # as of TinyImageNet
    with pytest.raises(InputError, match=f"with --data-dir {tmp_path}; give that too"):
        train.check_resumable(run, args, "FILE")


def test_a_run_from_before_there_were_recipes_is_resumed():
    run = dict(args=vars(parse()), **history_of(1))
    for name in ("recipe", "grad_accumulation", *recipe.TINY):
        if name not in ("epochs", "lr", "weight_decay"):
            del run["args"][name]
    train.check_resumable(run, parse(), "FILE")


def test_a_finished_run_says_how_it_goes_on():
    for words, epochs, remedy in (
        ([], 20, "give a larger --epochs to go on$"),
        (["--recipe", "paper"], 310, "310 epochs; to train further, .*--init FILE, without --res"),
    ):
        run = dict(args=json.loads(json.dumps(vars(parse(*words)), default=str)))
        with pytest.raises(InputError, match=remedy):
            train.check_resumable(run | history_of(epochs), parse(*words), "FILE")


def test_another_number_of_training_images_is_not_resumed():
    data = dict(classes=["ant"], image_shape=[64, 64, 3], train_images=12)
    train.check_same_data(data, data, "DIR", "FILE")
    train.check_same_data({k: data[k] for k in ("classes", "image_shape")}, data, "DIR", "FILE")
    with pytest.raises(InputError, match="trained on 11 images, and DIR now has 12; restore"):
        train.check_same_data({**data, "train_images": 11}, data, "DIR", "FILE")
    with pytest.raises(InputError, match="other classes or image sizes than DIR"):
        train.check_same_data({**data, "classes": ["bee"]}, data, "DIR", "FILE")


@pytest.mark.parametrize("words, crop_pct", [([], 0.8), (["--crop-pct", "0.925"], 0.925)])
def test_evaluation_cuts_as_asked_or_as_trained(monkeypatch, words, crop_pct):
    args = parse("--evaluate", "FILE", *words)
    run = dict(args=dict(img_size=48, crop_pct=0.8))
    checkpoint = module("checkpoint").Checkpoint({}, {}, run, [])
    monkeypatch.setattr(train, "read_checkpoint", lambda *_: checkpoint)

    def load_data(args, train_per_class):
        assert (args.img_size, args.crop_pct) == (48, crop_pct)
        raise InterruptedError

    monkeypatch.setattr(train, "load_data", load_data)
    with pytest.raises(InterruptedError):
        train.evaluate_checkpoint(args)


class Classes(list):
    """A validation split without images."""

    classes = ()


def test_evaluation_says_that_averaged_weights_were_better(monkeypatch, capsys):
    run = dict(args={}, data=dict(classes=[]), history=[dict(acc_top1=0.5, acc_top1_ema=0.75)])
    checkpoint = module("checkpoint").Checkpoint({}, {}, run, [])
    result = dict(val_loss=1.0, acc_top1=0.5, acc_top5=1.0)
    for name, value in (
        ("read_checkpoint", checkpoint),
        ("load_data", (None, Classes())),
        ("make_model", None),
        ("load_model", []),
        ("evaluate", result),
    ):
        monkeypatch.setattr(train, name, lambda *_, value=value, **__: value)
    says = "top-1 0.7500 of the averaged weights, which --use-ema takes"
    for words in ([], ["--use-ema"]):
        train.evaluate_checkpoint(parse("--evaluate", "FILE", *words))
        assert (says in capsys.readouterr().out) == (not words)


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
def test_another_recipe_is_not_resumed(impl, trained, words, message):
    last = trained[0] / f"last{impl.suffix}.safetensors"
    before = module("checkpoint").read_checkpoint(last).run
    train.check_resumable({**before, **history_of(1)}, parse(*PAPER, *SIZES), last)
    with pytest.raises(InputError, match=f"{message};"):
        train.check_resumable(before, parse(*PAPER, *SIZES, *words), last)


def test_gradient_checkpointing_in_jittor(monkeypatch, capsys):
    """Refused before data are read."""
    if NAME == "torch":
        pytest.skip("PyTorch has it: test_oracles.py")
    monkeypatch.setattr(sys, "argv", ["train.py", "--grad-checkpointing"])
    with pytest.raises(SystemExit, match="2"):
        train.parse_args()
    assert "cannot compute blocks again" in capsys.readouterr().err
