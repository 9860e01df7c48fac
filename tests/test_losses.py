import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls.core import losses
from flaxcls.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(7, 5)) * 3
LABELS = np.array([0, 1, 2, 3, 4, 2, 2])
ONE_HOT = np.eye(5)[LABELS]
SOFT = RNG.dirichlet(np.ones(5), size=7)
CLASS_WEIGHTS = (0.5, 2.0, 1.0, 3.0, 0.25)


def mean_loss(name, targets, logits=LOGITS, **options):
    values, weights = losses.build(name, **options)(jnp.asarray(logits), jnp.asarray(targets))
    assert values.shape == weights.shape == (len(logits),)
    assert values.dtype == weights.dtype == jnp.float32
    return float(jnp.sum(values * weights) / jnp.sum(weights))


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("targets", [ONE_HOT, SOFT])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_softmax_cross_entropy_equals_torch(torch, targets, label_smoothing):
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(LOGITS), torch.tensor(targets), label_smoothing=label_smoothing
    )
    actual = mean_loss("softmax_cross_entropy", targets, label_smoothing=label_smoothing)
    assert actual == pytest.approx(expected.item(), rel=1e-6)


def test_class_weights_equal_torch_for_hard_labels(torch):
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(LOGITS),
        torch.tensor(LABELS),
        weight=torch.tensor(CLASS_WEIGHTS, dtype=torch.float64),
    )
    actual = mean_loss("softmax_cross_entropy", ONE_HOT, class_weights=CLASS_WEIGHTS)
    assert actual == pytest.approx(expected.item(), rel=1e-6)


def test_class_weights_are_those_of_the_targets_before_smoothing():
    loss = losses.build("softmax_cross_entropy", label_smoothing=0.3, class_weights=CLASS_WEIGHTS)
    np.testing.assert_allclose(loss(LOGITS, SOFT)[1], SOFT @ CLASS_WEIGHTS, rtol=1e-6)


@pytest.mark.parametrize("targets", [ONE_HOT, SOFT])
def test_sigmoid_cross_entropy_equals_torch(torch, targets):
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(LOGITS), torch.tensor(targets)
    )
    actual = mean_loss("sigmoid_cross_entropy", targets)
    assert actual == pytest.approx(expected.item(), rel=1e-6)


def test_sigmoid_cross_entropy_counts_targets_above_the_threshold_as_present():
    actual = mean_loss("sigmoid_cross_entropy", SOFT, target_threshold=0.2)
    expected = mean_loss("sigmoid_cross_entropy", (SOFT > 0.2).astype(float))
    assert actual == expected != mean_loss("sigmoid_cross_entropy", SOFT)


def test_squared_error_equals_torch(torch):
    expected = torch.nn.functional.mse_loss(torch.tensor(LOGITS), torch.tensor(ONE_HOT))
    assert mean_loss("squared_error", ONE_HOT) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_and_gradient_equal_torch_in_float64(torch, gamma):
    logits = torch.tensor(LOGITS, requires_grad=True)
    log_p = torch.log_softmax(logits, -1)
    expected = -(torch.tensor(SOFT) * (1 - log_p.exp()) ** gamma * log_p).sum(-1).mean()
    expected.backward()
    loss = losses.build("focal", gamma=gamma)
    value, gradient = jax.value_and_grad(lambda x: jnp.mean(loss(x, SOFT)[0]))(jnp.array(LOGITS))
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, logits.grad, rtol=1e-3, atol=1e-6)


def test_focal_with_gamma_0_is_the_cross_entropy():
    assert mean_loss("focal", SOFT, gamma=0.0) == pytest.approx(
        mean_loss("softmax_cross_entropy", SOFT), rel=1e-6
    )


@pytest.mark.parametrize("tau", [1.0, 0.4])
def test_logit_adjusted_loss_and_gradient_equal_torch_in_float64(torch, tau):
    counts = (1, 500, 20, 7, 1000)  # by the definition, log(1 + sum over others of ratios^tau e^d)
    x, labels = torch.tensor(LOGITS, requires_grad=True), torch.tensor(LABELS)
    ratios = torch.tensor(counts, dtype=torch.float64)
    ratios = (ratios[None, :] / ratios[labels][:, None]) ** tau
    margins = ratios * torch.exp(x - x.gather(1, labels[:, None]))
    expected = torch.log1p(margins.sum(1) - 1).mean()
    expected.backward()
    loss = losses.build("logit_adjusted", tau=tau, class_counts=counts)
    value, gradient = jax.value_and_grad(lambda z: jnp.mean(loss(z, ONE_HOT)[0]))(jnp.array(LOGITS))
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-3, atol=1e-6)


def test_logit_adjusted_is_the_cross_entropy_for_classes_alike_and_for_tau_0():
    plain = mean_loss("softmax_cross_entropy", SOFT)
    for options in ({"class_counts": (9,) * 5}, {"class_counts": (1, 2, 3, 4, 5), "tau": 0.0}):
        assert mean_loss("logit_adjusted", SOFT, **options) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in losses.LOSSES if name != "logit_adjusted"]
    + [("focal", {"gamma": g}) for g in (0.0, 0.3, 1.0)]
    + [("logit_adjusted", {"class_counts": (1, 10**6, 3)})],
)
def test_value_and_gradient_are_finite_where_the_network_is_certain(name, options):
    loss = losses.build(name, **options)
    logits = jnp.array([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]])
    targets = jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(loss(x, targets)[0]))(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    actual = mean_loss("softmax_cross_entropy", SOFT, logits)
    expected = mean_loss("softmax_cross_entropy", SOFT, logits.astype(jnp.float32))
    assert actual == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("softmax_crossentropy", {}, "did you mean 'softmax_cross_entropy'"),
        ("softmax_cross_entropy", {"gamma": 2.0}, "gamma is not used by softmax_cross_entropy"),
        ("focal", {"gamma": -1.0}, "gamma must be float at least 0 for focal, got -1.0"),
        ("focal", {"label_smoothing": 1.0}, "label_smoothing must be float at least 0 and below 1"),
        ("focal", {"class_weights": (1.0, -1.0)}, "config.loss.class_weights"),
        (
            "sigmoid_cross_entropy",
            {"target_threshold": 1.0},
            "target_threshold must be float at least 0 and below 1",
        ),
    ],
)
def test_a_wrong_option_is_refused_when_the_loss_is_built(name, options, message):
    with pytest.raises(ConfigError, match=message):
        losses.build(name, **options)


def test_class_weights_of_another_number_of_classes_are_refused():
    loss = losses.build("focal", class_weights=(1.0, 2.0))
    with pytest.raises(ConfigError, match="each of the 5 classes, got 2"):
        loss(LOGITS, ONE_HOT)


def of_labels(class_weights, num_classes=5, labels=LABELS, name="focal", **arguments):
    return losses.LossSpec(name, class_weights, {}, **arguments).of_labels(
        lambda: labels, num_classes
    )


def test_balanced_class_weights_equal_scikit_learn():
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    expected = sklearn.compute_class_weight("balanced", classes=np.arange(5), y=LABELS)
    np.testing.assert_allclose(of_labels("balanced")[0], expected, rtol=1e-15)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_effective_number_weights_are_those_of_the_expected_volume(beta):
    # The effective number by its recursion, E_n = 1 + beta E_(n-1) (Cui et al. 2019, eq. 2).
    expected = []
    for count in np.bincount(LABELS):
        volume = 0.0
        for _ in range(count):
            volume = 1 + beta * volume
        expected.append(1 / volume)
    expected = np.array(expected) * 5 / np.sum(expected)
    actual, counts = of_labels("effective_number", beta=beta)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
    assert counts is None


def test_effective_number_weights_near_beta_1_are_the_balanced_ones():
    weights = np.array(of_labels("effective_number", beta=1 - 1e-9)[0])
    balanced = np.array(of_labels("balanced")[0])
    np.testing.assert_allclose(weights / weights[0], balanced / balanced[0], rtol=1e-6)


def test_labels_are_read_only_for_what_follows_from_them():
    def unread():
        raise AssertionError

    for weights in (None, (1.0, 2.0)):
        actual = losses.LossSpec("focal", weights, {}).of_labels(unread, 2)
        assert actual == (weights and list(weights), None)
    given = {"class_counts": (3.0, 4.0)}
    assert losses.LossSpec("logit_adjusted", None, given).of_labels(unread, 2) == (None, None)
    assert of_labels(None, name="logit_adjusted") == (None, [1, 1, 3, 1, 1])


@pytest.mark.parametrize(
    ("class_weights", "name"), [("balanced", "focal"), (None, "logit_adjusted")]
)
def test_class_that_has_no_example_is_named(class_weights, name):
    with pytest.raises(DataError, match="every class; 5 has none"):
        of_labels(class_weights, 6, name=name)
    with pytest.raises(DataError, match="from 0 to 3, got 0 to 4"):
        of_labels(class_weights, 4, name=name)


def test_objective_of_logit_adjusted_is_adjusted_and_its_likelihood_is_not():
    spec = losses.LossSpec("logit_adjusted", None, {"tau": 0.5})
    logits, targets = jnp.asarray(LOGITS), jnp.asarray(ONE_HOT)
    plain = losses.build("softmax_cross_entropy")(logits, targets)[0]
    np.testing.assert_array_equal(spec.likelihood(logits, targets)[0], plain)
    adjusted = spec.objective(None, [1, 2, 3, 4, 5])(logits, targets)[0]
    expected = losses.build("logit_adjusted", tau=0.5, class_counts=(1, 2, 3, 4, 5))
    np.testing.assert_array_equal(adjusted, expected(logits, targets)[0])
    assert np.abs(adjusted - plain).max() > 0.1


@pytest.mark.parametrize(
    ("name", "options", "same"),
    [
        ("softmax_cross_entropy", {}, True),
        ("softmax_cross_entropy", {"label_smoothing": 0.1}, False),
        ("softmax_cross_entropy", {"class_weights": (1.0, 2.0, 3.0)}, False),
        ("focal", {"gamma": 2.0}, False),
        ("sigmoid_cross_entropy", {"target_threshold": 0.2}, True),
        ("sigmoid_cross_entropy", {"label_smoothing": 0.1}, False),
        ("squared_error", {}, True),
    ],
)
def test_likelihood_is_the_loss_without_smoothing_and_weights(name, options, same):
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 3)).astype(np.float32)
    labels = random.integers(0, 3, 6)
    targets = np.eye(3, dtype=np.float32)[labels]
    values, weights = losses.LossSpec(name, None, {}).likelihood(logits, targets)
    assert (weights == 1).all()
    x = logits.astype(np.float64)
    expected = {
        "squared_error": ((x - targets) ** 2).mean(axis=1),
        "sigmoid_cross_entropy": (np.log1p(np.exp(x)) - targets * x).mean(axis=1),
    }.get(name, np.log(np.exp(x).sum(axis=1)) - x[np.arange(6), labels])
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    class_weights = options.pop("class_weights", None)
    spec = losses.LossSpec(name, class_weights, options)
    assert (spec.objective(class_weights) is None) == same
    other, other_weights = spec.with_weights(class_weights)(logits, targets)
    assert (np.allclose(other, values) and np.allclose(other_weights, 1)) == same
