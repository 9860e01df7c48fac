"""Muon's orthogonal matrices are the same on any devices, and each is computed once."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls.core.newton_schulz import orthogonalize
from flaxcls.runtime import sharding

RNG = np.random.default_rng(0)
SHAPES = {
    **{f"wide{i}": (24, 72) for i in range(3)},
    **{f"tall{i}": (72, 24) for i in range(4)},
    **{f"square{i}": (32, 32) for i in range(3)},
    "alone": (16, 40),
}
MATRICES = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def mesh_of(*devices):
    return sharding.make_mesh(devices=devices or None)


def accelerator():
    """A mesh of one device that has bfloat16, as far as what is traced for it can tell."""
    device = SimpleNamespace(platform="gpu", compute_capability="9.0")
    return SimpleNamespace(size=1, devices=np.array([device], object))


def newton_schulz(matrix, steps):
    """In float64, one matrix at a time."""
    x = matrix.astype(np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("devices", [0, 1, 3, 4, 8])
def test_matrices_are_those_of_float64_one_by_one(devices):
    mesh = mesh_of(*jax.devices()[:devices]) if devices else None
    found = jax.jit(lambda matrices: orthogonalize(matrices, 5, mesh))(MATRICES)
    assert found.keys() == MATRICES.keys()
    for name, matrix in MATRICES.items():
        np.testing.assert_allclose(found[name], newton_schulz(matrix, 5), atol=2e-5, err_msg=name)


def test_a_matrix_of_zeros_stays_one():
    found = orthogonalize({"a": jnp.zeros((4, 8)), "b": jnp.ones((4, 8))}, 5, mesh_of())
    assert not found["a"].any() and found["b"].all()


@pytest.mark.parametrize("steps", [3, 5])
def test_bfloat16_keeps_the_singular_values_in_their_band(steps):
    matrices = {
        f"{i}": RNG.normal(size=shape).astype(np.float32)
        for i, shape in enumerate([(64, 256), (256, 64), (64, 256), (96, 864), (128, 1152)])
    }
    found = orthogonalize(matrices, steps, accelerator())
    for name, matrix in matrices.items():
        assert found[name].dtype == jnp.float32
        expected = newton_schulz(matrix, steps)
        error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
        assert 1e-3 < error < 0.1  # it is bfloat16, and no worse than that
        for values in (expected, found[name]):
            singular = np.linalg.svd(values, compute_uv=False)
            assert singular.min() > 0.65 and singular.max() < 1.25


def test_an_accelerator_has_as_many_products_for_many_matrices_as_for_one():
    def products(count):
        matrices = {f"{i}": jnp.ones((8, 16) if i % 2 else (16, 8)) for i in range(count)}
        lowered = jax.jit(lambda m: orthogonalize(m, 5, accelerator())).lower(matrices)
        return re.findall(r"dot_general.*-> tensor<\d+x\w+x(bf16|f32)>", lowered.as_text())

    assert products(1) == products(24) == ["bf16"] * 15


def test_devices_share_the_work_out_and_gather_only_what_comes_of_it():
    def compiled(count):
        mesh = mesh_of(*jax.devices()[:count])
        replicated = sharding.everywhere(mesh)
        function = jax.jit(
            lambda matrices: orthogonalize(matrices, 5, mesh),
            in_shardings=replicated,
            out_shardings=replicated,
        )
        return function.lower({f"{i}": jnp.ones((64, 256)) for i in range(8)}).compile()

    one, four = compiled(1), compiled(4)
    assert four.cost_analysis()["flops"] < 0.26 * one.cost_analysis()["flops"]
    between = re.findall(r"= (\S+)\{\S+ (all-\w+|collective-\w+|reduce-scatter)\(", four.as_text())
    assert between == [("f32[8,64,256]", "all-gather")]


@pytest.mark.parametrize(
    ("devices", "share", "gathered"),
    [(1, 3, None), (2, 2, 4), (3, 1, 3), (4, 1, 4), (6, 1, 3), (8, 1, 4)],
)
def test_rows_are_padded_for_no_more_devices_than_help(devices, share, gathered):
    mesh = mesh_of(*jax.devices()[:devices])
    shapes = []

    def function(rows):
        shapes.append(rows.shape)
        return jnp.cumsum(rows, axis=1)

    shared = jax.jit(lambda rows: sharding.share_out(mesh, function, rows))
    rows = np.arange(15.0, dtype=np.float32).reshape(3, 5)
    np.testing.assert_array_equal(shared(rows), np.cumsum(rows, axis=1))
    assert shapes == [(share, 5)]
    text = shared.lower(rows).compile().as_text()
    found = re.findall(r"= f32\[(\d+),5\]\S+ all-gather\(", text)
    assert found == ([str(gathered)] if gathered else [])
