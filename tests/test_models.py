"""The network against what the official one computes in float64 (tests/reference/README.md)."""

import json
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
from reference_weights import formula, projection
from under_test import DEVICE, module, place

train, checkpoint, models = module("train"), module("checkpoint"), module("models")
load_model, model_arrays = checkpoint.load_model, checkpoint.model_arrays
trainable = checkpoint.trainable
DEFAULTS = train.make_parser().parse_args(["--device", DEVICE])
REFERENCE = Path(__file__).parent / "reference"
CASES = [("overlock_xxt", "64x64"), ("overlock_xxt", "96x160"), ("overlock_xt", "224x224")]


def distance(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def build(variant, **kwargs):
    return place(models.OverLoCK(**models.VARIANTS[variant], **kwargs))


def with_formula_weights(variant, **kwargs):
    model = build(variant, **kwargs)
    weights = {key: formula(key, value.shape) for key, value in model_arrays(model).items()}
    load_model(model, weights, "formula")
    return model


@pytest.mark.parametrize("variant", ["xxt", "xt", "t", "s", "b"])
def test_state_dict_is_the_official_one(variant):
    factory = getattr(models, f"overlock_{variant}")
    model = factory(num_classes=20 if variant == "xxt" else 1000)
    expected = json.loads((REFERENCE / f"overlock_{variant}_state_dict.json").read_text())
    assert {key: list(value.shape) for key, value in model_arrays(model).items()} == expected
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    names = {key for key in expected if not key.endswith(statistics)}
    assert set(trainable(model)) == names


@pytest.mark.parametrize("variant, size", CASES)
def test_reference_values(impl, variant, size):
    """Outputs, loss, every gradient and BatchNorm's statistics are the official model's.

    They lie within 20 times the float32 error that the official model itself has on the same case.
    """
    z = np.load(REFERENCE / f"{variant}_{size}.npz")

    def within(name, actual, floor=5e-6):
        assert distance(actual, z[name]) <= max(20 * float(z[f"fp32_error_{name}"]), floor), name

    model = with_formula_weights(variant, num_classes=int(z["num_classes"]))
    images, target = impl.array(z["input"]), z["target"].astype(np.int64)

    # Evaluation: the logits.
    model.eval()
    with impl.no_grad():
        within("eval_logits", impl.numpy(model(images)))

    # Training: both outputs and the loss.
    model.train()
    output = model(images)
    loss, _, _ = train.losses(output, target, DEFAULTS)
    within("train_main", impl.numpy(output["main"]))
    within("train_aux", impl.numpy(output["aux"]))
    within("loss", impl.numpy(loss).reshape(()))

    # The gradient of every parameter: its norm, and its projection on a fixed random direction.
    names = [str(name) for name in z["param_names"]]
    parameters = trainable(model)
    assert set(names) == set(parameters)
    ones = np.ones(impl.numpy(loss).shape, np.float32)
    grads = impl.gradients(loss, ones, [parameters[name] for name in names])
    grads = {name: grad.astype(np.float64) for name, grad in zip(names, grads)}
    norms = np.array([np.linalg.norm(grads[name]) for name in names])
    projections = [(grads[name] * projection(name, grads[name].shape)).sum() for name in names]
    within("grad_norm", norms, floor=2e-5)
    within("grad_projection", projections, floor=2e-5)

    # One distance over all parameters would hide a wrong gradient of a small one, so each norm by
    # itself too. Left out are the biases, one parameter in seven, whose influence a normalisation
    # takes away: their gradient is 0 but for rounding.
    counts = z["grad_norm"] > 1e-6 * z["grad_norm"].max()
    assert counts.mean() > 0.8
    departures = np.abs(norms / z["grad_norm"] - 1)
    wrong = [name for name, departure in zip(names, departures) if departure >= 1e-3]
    assert departures[counts].max() < 1e-3, wrong

    # BatchNorm's statistics after the training step.
    state = model_arrays(model)
    means = [state[str(name)].astype(np.float64).mean() for name in z["buffer_names"]]
    within("buffer_mean", means)


def test_ten_adamw_steps():
    """Before each of ten steps of train.py's optimizer the losses are those of the official run.

    That run is in float32 too. Each step carries its rounding error into the next, so 20 times the
    float32 error of one step's loss, with the usual floor, is allowed once per step taken.
    """
    z = np.load(REFERENCE / "overlock_xxt_adamw_10_steps.npz")
    batch = np.load(REFERENCE / "overlock_xxt_64x64.npz")
    model = with_formula_weights("overlock_xxt", num_classes=int(batch["num_classes"]))
    assert DEFAULTS.lr == 1e-3 and DEFAULTS.weight_decay == 0.01
    optimizer = train.make_optimizer(model, DEFAULTS)
    target = batch["target"].astype(np.int64)
    model.train()
    limit = max(20 * float(batch["fp32_error_loss"]), 5e-6)
    for step, expected in enumerate(z["losses"], 1):
        main, aux = train.training_step(model, optimizer, batch["input"], target, DEFAULTS)
        actual = np.array([main + DEFAULTS.aux_loss_ratio * aux, main, aux])
        assert (np.abs(actual / expected - 1) <= step * limit).all(), (step, actual / expected - 1)


def test_weight_decay_is_applied():
    """A weight shrinks by lr * weight_decay, here a tenth, before its step.

    Jittor's own default is no decay.
    """
    model = build("overlock_xxt", num_classes=2)
    before = model_arrays(model)["high_level_proj.weight"]
    options = ["--lr", "1e-3", "--weight-decay", "100", "--device", DEVICE]
    args = train.make_parser().parse_args(options)
    optimizer = train.make_optimizer(model, args)
    model.train()
    train.training_step(model, optimizer, normal(2, 3, 64, 64), np.array([0, 1]), args)
    after = model_arrays(model)["high_level_proj.weight"]
    # AdamW's step itself is at most the learning rate.
    assert np.abs(after - 0.9 * before).max() <= 1.001e-3


def test_every_parameter_has_a_gradient(impl):
    """Jittor would give an unused one zeros and decay it, PyTorch would leave it alone."""
    model = with_formula_weights("overlock_xxt", num_classes=3)
    model.train()
    output = model(impl.array(normal(2, 3, 64, 64)))
    loss, _, _ = train.losses(output, np.array([0, 2]), DEFAULTS)
    parameters = trainable(model)
    ones = np.ones(impl.numpy(loss).shape, np.float32)
    grads = impl.gradients(loss, ones, list(parameters.values()))
    assert all(np.isfinite(grad).all() for grad in grads)
    assert [name for name, grad in zip(parameters, grads) if not grad.any()] == []


def test_reparam_keeps_the_outputs(impl):
    model = with_formula_weights("overlock_xxt", num_classes=7)
    images = impl.array(normal(2, 3, 64, 64))
    model.eval()
    with impl.no_grad():
        before = impl.numpy(model(images))
        model.reparam()
        after = impl.numpy(model(images))
        model.reparam()
        again = impl.numpy(model(images))
    merged = set(model_arrays(model))
    deployed = set(model_arrays(build("overlock_xxt", num_classes=7, deploy=True)))
    assert merged == deployed
    if impl.name == "jittor":  # a Var that was made from a stopped one is frozen without a word
        model.train()
        assert not any(parameter.is_stop_grad() for parameter in trainable(model).values())
        model.eval()
    assert distance(after, before) < 5e-6 and np.array_equal(after, again)


@pytest.mark.parametrize("height, width", [(64, 64), (32, 160), (224, 96), (160, 160)])
def test_features_and_logits_at_any_aspect_ratio(impl, height, width):
    model = build("overlock_xxt", num_classes=5)
    model.eval()
    images = impl.array(normal(2, 3, height, width))
    with impl.no_grad():
        features = model.features(images)
        logits = impl.numpy(model(images))
    for i, (feature, dim) in enumerate(zip(features, model.feature_dims)):
        assert tuple(feature.shape) == (2, dim, height // 2 ** (i + 2), width // 2 ** (i + 2))
    assert logits.shape == (2, 5) and np.isfinite(logits).all()


def test_contmix_refuses_shapes_that_do_not_fit(impl):
    """B 1, 16 channels, 2 heads, kernels 3 and 5 on a 7x9 map, an overview of 2x2."""
    fitting = dict(
        query=(1, 8, 7, 9),
        key=(1, 8, 2, 2),
        proj=(34, 4, 1, 1),
        rpb1=(2, 5, 5),
        rpb2=(2, 9, 9),
        x=(1, 16, 7, 9),
    )

    def zeros(shape):
        return impl.array(np.zeros(shape, np.float32))

    def run(bias_size=34, **shapes):
        inputs = {name: zeros(shape) for name, shape in {**fitting, **shapes}.items()}
        inputs["proj"] = SimpleNamespace(weight=inputs["proj"], bias=zeros(bias_size))
        return module("contmix").contmix(**inputs)

    assert tuple(run().shape) == fitting["x"]
    for wrong in (
        dict(query=(1, 8, 9, 7)),
        dict(query=(2, 8, 7, 9)),
        dict(query=(1, 6, 7, 9)),
        dict(query=(1, 7, 7, 9), key=(1, 7, 2, 2)),
        dict(key=(1, 6, 2, 2)),
        dict(key=(1, 8, 2, 3)),
        dict(proj=(33, 4, 1, 1)),
        dict(bias_size=33),
        dict(rpb1=(2, 5, 4)),
        dict(rpb2=(1, 9, 9)),
        dict(rpb1=(3, 5, 5), rpb2=(3, 9, 9)),
        dict(x=(1, 16, 4, 9), query=(1, 8, 4, 9)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            run(**wrong)


def test_dynamic_conv_size(impl):
    """At least the kernel: the official rounding, but the kernel where that rounds to less."""
    block = build("overlock_xxt", num_classes=2).sub_blocks3[0]  # kernel 9
    maps = ((9, 9), (4, 4), (6, 10), (10, 6), (2, 10), (12, 9))
    sizes = [block.dynamic_conv_size(*size) for size in maps]
    assert sizes == [(9, 9), (9, 9), (9, 15), (15, 9), (9, 45), (12, 9)]
    block.kernel_size = 15
    assert block.dynamic_conv_size(11, 11) == (15, 15)


def test_classifier_of_any_size(impl):
    images = impl.array(np.zeros((2, 3, 64, 64), np.float32))
    for classes, width in ((1, 1), (37, 37), (0, 256)):  # without classes: the 256 pooled features
        model = build("overlock_xxt", num_classes=classes)
        model.eval()
        with impl.no_grad():
            assert impl.numpy(model(images)).shape == (2, width)


def test_initial_weights_follow_the_seed(impl):
    model = build("overlock_xxt", num_classes=20)
    model.init_weights(3)
    first = model_arrays(model)
    model.init_weights(4)
    second = model_arrays(model)
    model.init_weights(3)
    third = model_arrays(model)
    assert all(np.array_equal(first[key], third[key]) for key in first)
    key = "blocks1.0.proj.4.weight"
    generator = np.random.default_rng([3, crc32(key.encode())])
    expected = 0.02 * generator.standard_normal(first[key].shape)
    assert np.array_equal(first[key], expected.astype(np.float32))
    assert not np.array_equal(first[key], second[key])
    assert (first["blocks1.0.dwconv.bias"] == 0).all()
    assert (first["sub_blocks3.0.ls1.weight"] == 1).all()


def test_drop_path_drops_whole_samples_in_training_only(impl):
    layer, ones = module("layers").DropPath(0.5), impl.array(np.ones((64, 2, 3, 3), np.float32))
    layer.train()
    dropped = impl.numpy(layer(ones)).reshape(64, -1)
    assert set(np.unique(dropped)) == {0.0, 2.0} and (dropped == dropped[:, :1]).all()
    layer.eval()
    assert (impl.numpy(layer(ones)) == 1).all()


def test_grn_in_half_precision(impl):
    """A dead channel and values above 256 stay finite, forward and backward."""
    if impl.name != "torch":
        pytest.skip("jittor_impl computes in float32")
    grn = module("layers").GRN(2).half()
    grn.gamma.data.fill_(1)
    x = impl.torch.full((1, 2, 8, 8), 300.0, dtype=impl.torch.float16)
    x[:, 1] = 0
    x.requires_grad_()
    out = grn(x)
    (gradient,) = impl.torch.autograd.grad(out.float().sum(), x)
    assert impl.torch.isfinite(out).all() and impl.torch.isfinite(gradient).all()


def test_indices_are_uploaded_once(impl, monkeypatch):
    """Not from inference_mode, nor from the tensors without numbers that torch.export has."""
    if impl.name != "torch":
        pytest.skip("test_functions.py has Jittor's")
    torch, contmix = impl.torch, module("contmix")
    device = torch.device("cuda")
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    arguments = device, contmix.relative_position_index, 7, 6, 5
    with torch.inference_mode():
        with torch._subclasses.FakeTensorMode():
            contmix.uploaded(*arguments)
        first = contmix.uploaded(*arguments)
    assert first is contmix.uploaded(*arguments) and not first.is_inference()
    assert np.array_equal(first.numpy(), contmix.relative_position_index(7, 6, 5))


def test_training_after_inference_mode(impl):
    """In one process: what inference computed once and kept must serve a backward pass."""
    if impl.name != "torch":
        pytest.skip("Jittor has no inference_mode")
    model = build("overlock_xxt", num_classes=2)
    # Maps that no test before had.
    images = impl.torch.zeros(1, 3, 96, 64, device=impl.device)
    with impl.torch.inference_mode():
        model.eval()(images)
    model.eval()(images).sum().backward()
