from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flaxcls.augment import ops, policy_data
from flaxcls.augment import policy as policy_module
from flaxcls.augment.policy import AugMix, AutoAugment, RandAugment, ThreeAugment, TrivialAugment
from flaxcls.errors import ConfigError

KEY = jax.random.key(0)


@pytest.fixture
def record(monkeypatch):
    """Runs a policy and gives, for each layer: images before, after, the ops' names, arguments.

    With `skip` the ops are drawn, but not applied.
    """
    apply = ops.apply

    def recorder(policy, images, skip=False):
        def run(key, images):
            layers = []

            def recorded(images, arguments, drawn, *options):
                result = images if skip else apply(images, arguments, drawn, *options)
                layers.append((images, result, arguments, drawn))
                return result

            with monkeypatch.context() as patch:
                patch.setattr(ops, "apply", recorded)
                policy(key, {"image": images})
            return layers

        layers = []
        for before, after, arguments, drawn in jax.device_get(jax.jit(run)(KEY, images)):
            names = [[*sorted(arguments), None][position] for position in drawn]
            values = [arguments[name][i] if name else None for i, name in enumerate(names)]
            layers.append((before, after, names, values))
        return layers

    return recorder


def noise(count, height=2, width=2, channels=3):
    shape = (count, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def uniform(counts, kinds):
    """Whether `kinds` values may well be equally likely, and no others occurred."""
    assert len(counts) == kinds
    return stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize(
    "policy",
    [
        RandAugment(probability=1.0, fill=90),
        RandAugment(probability=1.0, increasing=False, magnitude=6, interpolation="nearest"),
        TrivialAugment(),
        AutoAugment(fill=90),
        AutoAugment(policy="cifar10", interpolation="nearest"),
        AugMix(),
    ],
    ids=lambda policy: policy.name,
)
def test_each_layer_does_to_each_example_what_pillow_does(record, assert_like_pillow, policy):
    layers = record(policy, noise(24, 33, 30))
    for before, after, names, values in layers:
        assert len(set(names)) > 3
        for image, result, name, value in zip(before, after, names, values, strict=True):
            value = 0 if name is None else float(value)
            nearest = policy.interpolation == "nearest"
            assert_like_pillow(result, name or "identity", image, value, nearest, int(policy.fill))
    assert layers[-1][1].std(axis=0).min() > 0  # not all the same


def test_rand_augment_draws_every_op_alike_and_each_layer_by_itself(record):
    first, second = record(RandAugment(num_ops=2, probability=1.0), noise(3000), skip=True)
    for _, _, names, _ in (first, second):
        assert uniform(Counter(names), 15)
    pairs = Counter(zip(first[2], second[2], strict=True))
    assert len(pairs) == 15**2
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-3


def test_rand_augment_applies_an_op_with_its_probability(record):
    layers = record(RandAugment(num_ops=3, probability=0.3), noise(1000), skip=True)
    applied = sum(name is not None for _, _, names, _ in layers for name in names)
    assert stats.binomtest(applied, 3000, 0.3).pvalue > 1e-3


def test_rand_augment_draws_magnitudes_around_its_own_and_clips_them(record):
    policy = RandAugment(magnitude=9, magnitude_std=0.5, probability=1.0)
    (_, _, names, values), *_ = record(policy, noise(9000), skip=True)
    degrees = np.array([v for n, v in zip(names, values, strict=True) if n == "rotate"])
    magnitudes = np.abs(degrees) / 3
    assert magnitudes.max() == 10  # two standard deviations above: 2.3 % are clipped
    expected = stats.norm(9, 0.5)
    assert stats.kstest(magnitudes[magnitudes < 10], expected.cdf).pvalue > 1e-3
    assert stats.binomtest(int((degrees > 0).sum()), len(degrees), 0.5).pvalue > 1e-3


def test_rand_augment_as_big_vision_has_it(record):
    policy = RandAugment(
        magnitude=10, magnitude_std=0, probability=1.0, increasing=False, cutout=True
    )
    (_, _, names, values), *_ = record(policy, noise(2000, 56, 2), skip=True)
    assert uniform(Counter(names), 16)
    expected = {"rotate": 30, "posterize": 4, "solarize": 256, "solarize_add": 110, "color": 1.9}
    for name, value in zip(names, values, strict=True):
        if name in expected:
            assert abs(value) == pytest.approx(expected[name])


def test_the_square_of_rand_augment_scales_with_the_image(record):
    policy = RandAugment(
        num_ops=1, magnitude=10, magnitude_std=0, probability=1.0, cutout=True, fill=7
    )
    images = np.full((200, 56, 60, 1), 200, np.uint8)
    ((_, after, names, values),) = record(policy, images)
    squares = [i for i, name in enumerate(names) if name == "cutout"]
    assert len(squares) > 4
    for i in squares:
        row, column, half = values[i]
        assert half == 10  # of 40 at 224 pixels
        assert 0 <= row < 56 and 0 <= column < 60
        expected = np.full((56, 60, 1), 200)
        top, left = max(int(row) - 10, 0), max(int(column) - 10, 0)
        expected[top : int(row) + 10, left : int(column) + 10] = 7
        np.testing.assert_array_equal(after[i], expected)


# What timm's `auto_augment.py` and torchvision's `autoaugment.py` compute, worked out by hand for
# an image of 100 x 200 pixels.
@pytest.mark.parametrize(
    "arguments, level, sign, expected",
    [
        (
            lambda *a: policy_data.rand_arguments(*a, increasing=True),
            0.9,
            1,
            {
                "shear_x": 0.27,
                "shear_y": 0.27,
                "translate_x": 81,
                "translate_y": 40.5,
                "rotate": 27,
                **dict.fromkeys(("brightness", "contrast", "color", "sharpness"), 1.81),
                "posterize": 1,
                "solarize": 26,
                "solarize_add": 99,
            },
        ),
        (
            lambda *a: policy_data.rand_arguments(*a, increasing=True),
            1,
            -1,
            {"rotate": -30, "contrast": 0.1, "posterize": 0, "solarize": 0, "solarize_add": 110},
        ),
        (
            lambda *a: policy_data.rand_arguments(*a, increasing=True),
            0,
            1,
            {"rotate": 0, "contrast": 1, "posterize": 4, "solarize": 256, "solarize_add": 0},
        ),
        (
            lambda *a: policy_data.rand_arguments(*a, increasing=False),
            0.6,
            -1,
            {"rotate": -18, "contrast": 1.18, "posterize": 2, "solarize": 153, "solarize_add": 66},
        ),
        (
            lambda *a: policy_data.rand_arguments(*a, increasing=False),
            0,
            1,
            {"translate_x": 0, "contrast": 0.1, "posterize": 0, "solarize": 0, "solarize_add": 0},
        ),
        (
            policy_data.wide_arguments,
            1,
            -1,
            {
                "shear_x": -0.99,
                "translate_x": -32,
                "translate_y": -32,
                "rotate": -135,
                "color": 0.01,
                "posterize": 2,
                "solarize": 0,
            },
        ),
        (
            policy_data.wide_arguments,
            7 / 30,
            1,
            {"translate_y": 7, "color": 1.231, "posterize": 7, "solarize": 195.5},
        ),
        (policy_data.wide_arguments, 0, 1, {"color": 1, "posterize": 8, "solarize": 255}),
        (
            policy_data.auto_arguments,
            1,
            1,
            {
                "shear_y": 0.3,
                "translate_x": 90,
                "translate_y": 45,
                "rotate": 30,
                "sharpness": 1.9,
                "posterize": 4,
                "solarize": 0,
            },
        ),
        (policy_data.auto_arguments, 5 / 9, -1, {"color": 0.5, "posterize": 6, "rotate": -50 / 3}),
        (
            policy_data.augmix_arguments,
            0.25,
            -1,
            {
                "shear_x": -0.075,
                "translate_x": -16,
                "translate_y": -8,
                "rotate": -7,
                "posterize": 3,
                "solarize": 192,
            },
        ),
    ],
)
def test_arguments_are_those_of_the_sources(arguments, level, sign, expected):
    table = arguments(jnp.array([level], jnp.float32), jnp.array([sign], jnp.float32), (100, 200))
    for name, value in expected.items():
        np.testing.assert_allclose(table[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_trivial_augment_draws_ops_magnitudes_and_signs_alike(record):
    ((_, _, names, values),) = record(TrivialAugment(), noise(4000), skip=True)
    assert uniform(Counter(names), 14)
    factors = [v for n, v in zip(names, values, strict=True) if n in ("color", "contrast")]
    bins = (np.array(factors) - 1) / 0.033
    np.testing.assert_allclose(bins, np.round(bins), atol=1e-4)
    bins = np.round(bins).astype(int)
    assert uniform(Counter(np.abs(bins).tolist()), 31)
    assert stats.binomtest(int((bins > 0).sum()), int((bins != 0).sum()), 0.5).pvalue > 1e-3


@pytest.mark.parametrize("name", policy_data.AUTO_AUGMENT)
def test_auto_augment_draws_its_pairs_and_their_probabilities(record, name):
    pairs = policy_data.AUTO_AUGMENT[name]
    count = 5000
    first, second = record(AutoAugment(policy=name), noise(count), skip=True)
    expected = Counter()
    for (one, first_chance, _), (two, second_chance, _) in pairs:
        for a, chance_a in ((one, first_chance), (None, 1 - first_chance)):
            for b, chance_b in ((two, second_chance), (None, 1 - second_chance)):
                expected[a, b] += count / len(pairs) * chance_a * chance_b
    seen = Counter(zip(first[2], second[2], strict=True))
    assert set(seen) <= {pair for pair, number in expected.items() if number > 0}
    often = [pair for pair, number in expected.items() if number > 10]
    frequencies = np.array([(seen[pair], expected[pair]) for pair in often]).T
    chi_square = ((frequencies[0] - frequencies[1]) ** 2 / frequencies[1]).sum()
    assert stats.chi2(len(often)).sf(chi_square) > 1e-3


def test_auto_augment_takes_the_magnitude_of_each_pair(record):
    layers = record(AutoAugment(), noise(3000), skip=True)
    for position, (_, _, names, values) in enumerate(layers):
        layer = [pair[position] for pair in policy_data.AUTO_AUGMENT["imagenet"]]
        expected = {magnitude for name, _, magnitude in layer if name == "rotate"}
        degrees = [v for n, v in zip(names, values, strict=True) if n == "rotate"]
        magnitudes = np.abs(degrees) / 30 * 9
        np.testing.assert_allclose(magnitudes, np.round(magnitudes), atol=1e-4)
        assert set(np.round(magnitudes)) == expected
        right = int((np.array(degrees) < 0).sum())
        assert stats.binomtest(right, len(degrees), 0.5).pvalue > 1e-3


def test_augmix_chains_are_one_to_three_ops_of_its_nine(record):
    layers = record(AugMix(severity=3), noise(600), skip=True)
    applied = np.array([[name is not None for name in names] for _, _, names, _ in layers])
    depths = applied.sum(axis=0)
    assert len(depths) == 3 * 600
    assert uniform(Counter(depths.tolist()), 3)
    assert (applied[:-1] >= applied[1:]).all()
    names = Counter(name for layer in layers for name in layer[2] if name)
    assert uniform(names, 9)
    shears = [
        abs(value)
        for _, _, names, values in layers
        for name, value in zip(names, values, strict=True)
        if name in ("shear_x", "shear_y")
    ]
    level = stats.uniform(0.1, 2.9)  # from 0.1 to 3
    assert stats.kstest(np.array(shears) / 0.03, level.cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_augmix_weighs_its_chains_as_the_paper_says(monkeypatch, alpha):
    """The chains are replaced by images that show the weights; the original is black."""
    count, width = 2000, 3
    chains = np.tile(np.eye(width), (count, 1)).reshape(-1, 1, 1, 3) * 200
    monkeypatch.setattr(ops, "apply", lambda images, *_: jnp.asarray(chains, jnp.uint8))
    batch = {"image": jnp.zeros((count, 1, 1, 3), jnp.float32)}
    mixed = (
        np.asarray(jax.jit(AugMix(alpha=alpha, width=width))(KEY, batch)["image"])[:, 0, 0] / 200
    )
    share = mixed.sum(axis=1)
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    weights = mixed[share > 0.05] / share[share > 0.05, None]
    for weight in weights.T:  # each of a Dirichlet is beta-distributed
        assert stats.kstest(weight, stats.beta(alpha, (width - 1) * alpha).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(share[share > 0.05], weights[:, 0])[0, 1]) < 0.1


def test_augmix_of_a_chain_without_effect_is_the_image(monkeypatch):
    monkeypatch.setattr(ops, "apply", lambda images, *_: images)
    images = noise(20, 5, 6)
    batch = {"image": jnp.asarray(images)}
    np.testing.assert_array_equal(jax.jit(AugMix())(KEY, batch)["image"], images)


def test_three_augment_does_one_of_three_to_each_example(pillow):
    images = noise(300, 8, 9)
    batch = {"image": jnp.asarray(images)}
    results = np.asarray(jax.jit(ThreeAugment())(KEY, batch)["image"])
    kinds, contrasts = Counter(), []
    for image, result in zip(images, results, strict=True):
        if (result == pillow("color", image, 0)).all():
            kinds["grey"] += 1
        elif (result == pillow("solarize", image, 128)).all():
            kinds["solarize"] += 1
        else:
            kinds["blur"] += 1
            np.testing.assert_allclose(result.mean(), image.mean(), atol=12)
            contrasts.append(result.std() / image.std())
    # From a sigma of 0.1, which shows no effect, to 2, which leaves little of noise.
    assert 0.99 < max(contrasts) < 1.001 and min(contrasts) < 0.3
    assert uniform(kinds, 3)


@pytest.mark.parametrize("policy", [RandAugment(), ThreeAugment()], ids=lambda op: op.name)
def test_policies_refuse_images_of_other_channel_counts(make_batch, policy):
    with pytest.raises(
        ConfigError, match=f"`{policy.name}` needs images of 1 or 3 channels, got 4"
    ):
        policy(KEY, make_batch(channels=4))


def test_float_images_are_rounded_first(make_batch):
    batch = make_batch()
    shifted = {**batch, "image": batch["image"].astype(jnp.float32) + 0.3}
    policy = jax.jit(RandAugment(probability=0.0))
    np.testing.assert_array_equal(policy(KEY, shifted)["image"], batch["image"])


@pytest.mark.parametrize(
    "policy",
    [
        RandAugment(probability=1.0, fill=90, cutout=True),
        RandAugment(probability=0.5, increasing=False, num_ops=3),
        TrivialAugment(),
        AutoAugment(fill=90),
        AutoAugment(policy="cifar10"),
    ],
    ids=lambda policy: policy.name,
)
def test_a_host_does_the_same_to_an_image_as_the_devices_by_the_same_draws(policy):
    images = noise(64, 33, 30)
    draws = np.random.default_rng(4).random((policy.draws, len(images)), np.float32)
    expected = jnp.asarray(images)
    for arguments, drawn in policy.layers(jnp.asarray(draws), (33, 30)):
        expected = ops.apply(expected, arguments, drawn, policy.interpolation, policy.fill)
    results = [policy.on_host(*pair) for pair in zip(images, draws.T.tolist(), strict=True)]
    same = [(a == b).all() for a, b in zip(results, np.asarray(expected), strict=True)]
    assert 0.5 < np.mean(same) < 1  # not those that are warped
    differences = np.abs(np.stack(results).astype(int) - np.asarray(expected))
    assert np.median(differences) == 0 and differences.mean() < 3


def test_a_normal_magnitude_of_the_host_is_that_of_the_devices():
    draws = np.random.default_rng(5).random((2, 5000), np.float32)
    normal = policy_module._normal(*draws)
    assert normal.dtype == np.float32
    assert stats.kstest(normal, stats.norm.cdf).pvalue > 1e-3
    np.testing.assert_allclose(policy_module._normal(*jnp.asarray(draws)), normal, atol=1e-5)
