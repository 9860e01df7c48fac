import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls.augment import AUGMENTATIONS, build, check, normalize
from flaxcls.errors import ConfigError

KEY = jax.random.key(7)
NORMALIZE = {"name": "normalize"}
OPTIONS = {
    "pad_crop": {"padding": 2},
    "flip": {},
    "rotation": {"degrees": 30},
    "affine": {"degrees": 20, "translate": 0.1, "scale": (0.8, 1.2), "shear": 10},
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "grayscale": {"probability": 0.5},
    "solarize": {"probability": 0.5},
    "posterize": {"probability": 0.5},
    "equalize": {"probability": 0.5},
    "gaussian_blur": {"sigma": (0.3, 1.5)},
    "rand_augment": {"num_ops": 1, "probability": 1.0, "cutout": True},
    "trivial_augment": {},
    "auto_augment": {},
    "augmix": {"width": 2, "depth": 1},
    "three_augment": {},
    "salt_and_pepper": {"fraction": 0.1},
    "random_erasing": {"probability": 0.8, "fill": 17},
    "cutout": {"size": 4},
    "mixup": {"alpha": 1.0},
    "cutmix": {},
    "mix": {},
}
MIXING = ("mixup", "cutmix", "mix")
# One jitted function for each op, so that tests with equal shapes share a compilation.
JITTED = {name: jax.jit(cls(**OPTIONS[name])) for name, cls in AUGMENTATIONS.items()}

every_op = pytest.mark.parametrize("name", AUGMENTATIONS)


def constants(channels):
    return {"mean": (0.4,) * channels, "std": (0.25,) * channels}


@every_op
def test_uint8_and_float_images_give_the_same(make_batch, name):
    apply = JITTED[name]
    batch = make_batch(height=20, width=20)
    whole = apply(KEY, batch)
    exact = apply(KEY, {**batch, "image": batch["image"].astype(jnp.float32)})
    assert exact["image"].dtype == jnp.float32
    assert whole["image"].dtype == (jnp.float32 if name in MIXING else jnp.uint8)
    difference = np.asarray(whole["image"], float) - np.asarray(exact["image"], float)
    assert np.abs(difference).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(whole["label"], exact["label"])
    if name not in MIXING:
        np.testing.assert_array_equal(whole["label"], batch["label"])
    assert (np.asarray(exact["image"]) != np.asarray(batch["image"])).any()


@every_op
def test_every_op_takes_small_grey_images_that_are_not_square(make_batch, name):
    batch = make_batch(4, 9, 14, channels=1)
    result = JITTED[name](KEY, batch)
    assert jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, batch)
    image = np.asarray(result["image"])
    assert np.isfinite(image).all() and image.min() >= 0 and image.max() <= 255
    np.testing.assert_allclose(result["label"].sum(axis=-1), 1, atol=1e-6)


@every_op
def test_every_op_is_determined_by_its_key(make_batch, name):
    apply = JITTED[name]
    batch = make_batch(height=20, width=20)
    first, again = apply(KEY, batch)["image"], apply(jax.random.clone(KEY), batch)["image"]
    np.testing.assert_array_equal(first, again)
    others = [apply(jax.random.key(seed), batch)["image"] for seed in range(3)]
    assert any((np.asarray(first) != np.asarray(other)).any() for other in others)


@every_op
def test_a_sharded_batch_gives_the_same_as_one_device(make_batch, name):
    devices = jax.devices()
    if len(devices) == 1:
        pytest.skip("needs several devices")
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = make_batch(8 * len(devices))  # each with whole groups of mixing partners
    expected = JITTED[name](KEY, batch)
    sharded = jax.device_put(batch, sharding)
    compiled = JITTED[name].lower(KEY, sharded).compile()
    result = compiled(KEY, sharded)
    np.testing.assert_allclose(result["image"], expected["image"], rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(result["label"], expected["label"], atol=1e-6)
    sent = re.findall(r" (all-[a-z-]+|collective-[a-z-]+|reduce-scatter)\(", compiled.as_text())
    # AugMix draws gamma variates again until the last one is accepted.
    assert set(sent) == ({"all-reduce"} if name == "augmix" else set())


def test_steps_are_kept_apart_by_branches_on_cpu_only(make_batch, all_optimizations):
    """Where XLA would fuse them, and compute each pixel many times; no branch waits elsewhere."""
    specs = [{"name": name, **OPTIONS[name]} for name in ("trivial_augment", "gaussian_blur")]
    batch, apply = make_batch(4), jax.jit(build(specs, **constants(3)))
    program = apply.lower(KEY, batch).compile().as_text()
    assert program.count(" conditional(") == 6  # warp, table, look-up, blend; rows, columns
    for platform in ("cuda", "tpu"):
        module = jax.export.export(apply, platforms=[platform])(KEY, batch).mlir_module()
        assert "optimization_barrier" not in module and "stablehlo.gather" in module


def test_a_pipeline_without_normalize_ends_with_it(make_batch):
    batch = make_batch(channels=1)
    result = build([], **constants(1))(KEY, batch)
    np.testing.assert_allclose(result["image"], normalize(batch["image"], (0.4,), (0.25,)))
    assert set(result) == set(batch)


def test_ops_after_normalize_see_normalized_images(make_batch):
    batch = make_batch(channels=1)
    cutout = {"name": "cutout", "size": 20}
    before, after = (
        build(specs, **constants(1))(KEY, batch)["image"]
        for specs in ([cutout], [NORMALIZE, cutout])
    )
    np.testing.assert_allclose(before[0], -0.4 / 0.25, rtol=1e-6)
    np.testing.assert_array_equal(after[0], 0)


def test_each_op_has_a_key_of_its_own(make_batch):
    twice = [{"name": "flip"}, {"name": "flip"}]
    batch = make_batch(64)
    result = build(twice, **constants(3))(KEY, batch)["image"]
    unflipped = normalize(batch["image"], **constants(3))
    kept = np.isclose(result, unflipped).all(axis=(1, 2, 3)).mean()
    assert 0.25 < kept < 0.75


def test_a_long_pipeline_runs_in_one_jit(make_batch):
    names = ["pad_crop", "flip", "color_jitter"]
    specs = [{"name": name, **OPTIONS[name]} for name in names]
    specs += [NORMALIZE, {"name": "random_erasing", "fill": "noise"}]
    result = jax.jit(build(specs, **constants(3)))(KEY, make_batch(4))
    assert result["image"].dtype == jnp.float32 and np.isfinite(result["image"]).all()


@pytest.mark.parametrize(
    "specs, message",
    [
        (
            [{"name": "pad_crops"}],
            "config.augment[0].name is 'pad_crops', which is not known, did you mean",
        ),
        (
            [{"name": "pad_crop", "pading": 4}],
            "config.augment[0].pading is not used by pad_crop, did you mean",
        ),
        ([{"name": "normalize", "mean": 0}], "`normalize` takes no options, got {'mean': 0}"),
        ([NORMALIZE, NORMALIZE], "`normalize` is listed twice"),
        (["flip"], "config.augment[0] must be a mapping such as {'name': 'flip'}, got 'flip'"),
        ([{"size": 4}], "config.augment[0] must be a mapping"),
        (
            [{"name": "pad_crop", "padding": -1}],
            "augment[0].padding must be int at least 0 and at most 256 for pad_crop, got -1",
        ),
        (
            [{"name": "pad_crop", "padding": True}],
            "must be int at least 0 and at most 256 for pad_crop, got True",
        ),
        (
            [{"name": "pad_crop", "padding": 4.0}],
            "must be int at least 0 and at most 256 for pad_crop, got 4.0",
        ),
        ([{"name": "cutout", "size": "8"}], "at least 1 and at most 1024 for cutout, got '8'"),
        ([{"name": "flip", "mode": "up"}], "must be 'random' or 'alternating' for flip, got 'up'"),
        (
            [{"name": "rotation", "degrees": None}],
            "float at least 0 and at most 180 for rotation, got None",
        ),
        ([{"name": "rotation", "fill": float("nan")}], "fill must be float for rotation, got nan"),
        ([{"name": "rotation", "fill": 300}], "must be a number between 0 and 255, got 300"),
        ([{"name": "mixup", "alpha": 0}], "alpha must be float at least 0.01"),
        (
            [{"name": "random_erasing", "area": (0.3, 0.1)}],
            "`area` of `random_erasing` must be (low, high), got (0.3, 0.1)",
        ),
        (
            [{"name": "random_erasing", "area": 0.3}],
            "area must be tuple[float, float], each at least 0 and",
        ),
        (
            [{"name": "random_erasing", "area": (0.1, 1.3)}],
            "area must be tuple[float, float], each at least 0 and",
        ),
        (
            [{"name": "random_erasing", "area": (0.1, False)}],
            "area must be tuple[float, float], each at least 0 and",
        ),
        (
            [{"name": "random_erasing", "fill": "red"}],
            "must be float or 'noise' for random_erasing, got 'red'",
        ),
        ([{"name": "random_erasing", "fill": "noise"}], "list `normalize` before it"),
        (
            [NORMALIZE, {"name": "color_jitter", "hue": 0.1}],
            "`color_jitter` needs images in [0, 255]: list it before `normalize`",
        ),
        ([NORMALIZE, {"name": "salt_and_pepper"}], "list it before `normalize`"),
        ([NORMALIZE, {"name": "solarize"}], "`solarize` needs images in [0, 255]: list it before"),
        ([NORMALIZE, {"name": "augmix"}], "`augmix` needs images in [0, 255]: list it before"),
        (
            [{"name": "rand_augment", "magnitude": 11}],
            "magnitude must be float at least 0 and at most 10 for rand_augment, got 11",
        ),
        ([{"name": "rand_augment", "fill": 300}], "must be a number between 0 and 255, got 300"),
        (
            [{"name": "auto_augment", "policy": "svhn"}],
            "policy must be 'imagenet' or 'cifar10' for auto_augment, got 'svhn'",
        ),
        (
            [{"name": "trivial_augment", "interpolation": "bicubic"}],
            "interpolation must be 'nearest' or 'bilinear' for trivial_augment, got 'bicubic'",
        ),
        ([{"name": "posterize", "bits": 0}], "bits must be int at least 1 and at most 8"),
        ([{"name": "affine"}], "`affine` needs at least one of `degrees`, `translate`, `scale`"),
    ],
)
def test_mistakes_are_named_by_check_and_build_alike(specs, message):
    for attempt in (check, lambda specs: build(specs, **constants(3))):
        with pytest.raises(ConfigError) as error:
            attempt(specs)
        assert message in str(error.value)


def test_integers_and_lists_are_taken_for_numbers_and_pairs(make_batch):
    results = []
    for probability, area in ((1, [0, 1]), (1.0, (0.0, 1.0))):
        spec = {"name": "random_erasing", "probability": probability, "area": area}
        results.append(build([spec], **constants(3))(KEY, make_batch())["image"])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("mean, std", [((0.5,), (0.5, 0.5)), ((0.5,), (0.0,))])
def test_impossible_normalisation_constants_are_refused(mean, std):
    with pytest.raises(ConfigError, match="as many means as standard deviations, and these above"):
        build([], mean=mean, std=std)
