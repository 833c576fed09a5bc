"""ContMixBlock against what upstream's computes in float64 (tests/reference/README.md)."""

from ast import literal_eval
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from reference_weights import formula, projection
from under_test import module, place

checkpoint, contmix_block = module("checkpoint"), module("contmix_block")
ContMixBlock = contmix_block.ContMixBlock
REFERENCE = Path(__file__).parent / "reference"
CASES = ["contmix_block_7", "contmix_block_13"]


def distance(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def shapes(block):
    return {key: value.shape for key, value in checkpoint.model_arrays(block).items()}


def with_formula_weights(**kwargs):
    block = place(ContMixBlock(**kwargs))
    weights = {key: formula(key, shape) for key, shape in shapes(block).items()}
    checkpoint.load_model(block, weights, "formula")
    return block


@pytest.mark.parametrize("case", CASES)
def test_state_dict_is_upstreams(case):
    z = np.load(REFERENCE / f"{case}.npz")
    block = ContMixBlock(**literal_eval(str(z["kwargs"])))
    assert {f"{key} {shape}" for key, shape in shapes(block).items()} == set(z["state_dict"])
    assert set(checkpoint.trainable(block)) == set(z["param_names"])


@pytest.mark.parametrize("case", CASES)
def test_reference_values(impl, case):
    """Outputs and gradients lie within 20 times the float32 error of upstream's block itself."""
    z = np.load(REFERENCE / f"{case}.npz")

    def within(name, actual, floor=5e-6):
        assert distance(actual, z[name]) <= max(20 * float(z[f"fp32_error_{name}"]), floor), name

    block = with_formula_weights(**literal_eval(str(z["kwargs"])))
    x = impl.array(z["input"])
    block.eval()
    within("eval", impl.numpy(block(x)))
    with impl.no_grad():  # where Jittor fuses layers
        within("eval", impl.numpy(block(x)))

    block.train()
    output = block(x)
    within("train", impl.numpy(output))
    generator = np.random.default_rng(crc32(str(z["grad_output_seed"]).encode()))
    grad_output = generator.standard_normal(z["train"].shape).astype(np.float32)
    names, parameters = [str(name) for name in z["param_names"]], checkpoint.trainable(block)
    inputs = [x, *(parameters[name] for name in names)]
    grad_input, *grads = impl.gradients(output, grad_output, inputs)
    within("grad_input", grad_input, floor=2e-5)
    projections = [
        (grad.astype(np.float64) * projection(name, grad.shape)).sum()
        for name, grad in zip(names, grads)
    ]
    within("grad_projection", projections, floor=2e-5)


def test_reparam_keeps_the_outputs(impl):
    kwargs = dict(dim=16, kernel_size=9, num_heads=2)
    block = with_formula_weights(**kwargs)
    block.eval()
    x = impl.array(normal(2, 16, 12, 10))
    with impl.no_grad():
        before = impl.numpy(block(x))
        block.reparam()
        after = impl.numpy(block(x))
    assert distance(after, before) < 5e-6
    assert shapes(block) == shapes(ContMixBlock(**kwargs, deploy=True))


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (5, 3), (2, 20), (7, 7), (15, 40)])
def test_a_map_of_any_size(impl, height, width):
    block = place(ContMixBlock(dim=16))
    block.eval()
    with impl.no_grad():
        output = impl.numpy(block(impl.array(normal(2, 16, height, width))))
    assert output.shape == (2, 16, height, width) and np.isfinite(output).all()


def test_initial_weights_follow_the_seed():
    arrays = [checkpoint.model_arrays(ContMixBlock(dim=16, seed=seed)) for seed in (3, 3, 4)]
    assert all(np.array_equal(arrays[0][key], arrays[1][key]) for key in arrays[0])
    key = "lepe.0.lk_origin.weight"
    generator = np.random.default_rng([3, crc32(key.encode())])
    expected = 0.02 * generator.standard_normal(arrays[0][key].shape)
    assert np.array_equal(arrays[0][key], expected.astype(np.float32))
    assert not np.array_equal(arrays[0][key], arrays[2][key])
    assert (arrays[0]["proj.1.bias"] == 0).all() and (arrays[0]["rpb2"] == 0).all()


def test_norm_layer_is_the_callers(impl):
    """Here BatchNorm, whose statistics are new keys."""
    norm_layer = module("layers").BatchNorm2d
    block = place(ContMixBlock(dim=16, norm_layer=norm_layer, use_gemm=True))
    assert {"norm1.running_mean", "norm2.running_var"} <= set(shapes(block))
    block.train()
    output = impl.numpy(block(impl.array(normal(2, 16, 8, 8))))
    assert output.shape == (2, 16, 8, 8) and np.isfinite(output).all()


def test_layer_scale_acts_on_the_branches_or_on_the_shortcuts(impl):
    """At 0 it takes the branches away, or with res_scale the shortcuts."""
    x = impl.array(normal(2, 16, 8, 8))
    for res_scale in (False, True):
        block = place(ContMixBlock(dim=16, ls_init_value=0, res_scale=res_scale))
        block.eval()
        output = impl.numpy(block(x))
        shortcuts = impl.numpy(block.dwconv2(block.dwconv1(x)))
        assert np.array_equal(output, shortcuts) != res_scale


def test_dropped_branches_leave_the_shortcuts(impl):
    """With drop_path almost 1 only the two depthwise convolutions remain."""
    block = with_formula_weights(dim=16, drop_path=1 - 1e-9)
    block.train()
    x = impl.array(normal(2, 16, 8, 8))
    expected = impl.numpy(block.dwconv2(block.dwconv1(x)))
    assert np.array_equal(impl.numpy(block(x)), expected)


def test_arguments_that_cannot_be_are_refused():
    for wrong, message in (
        (dict(dim=20), "dim 20, num_heads 2"),
        (dict(kernel_size=8), "kernel_size 8"),
        (dict(kernel_size=21), "kernel_size 21"),
        (dict(smk_size=4), "smk_size 4"),
        (dict(smk_size=9), "smk_size 9"),
        (dict(use_checkpoint=True), "use_checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            ContMixBlock(**wrong)
    with pytest.raises(TypeError, match="kernel"):
        ContMixBlock(kernel=7)
