import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxcls.config import durations
from flaxcls.core import schedules
from flaxcls.errors import ConfigError

TOTAL = 100


def to_steps(duration):
    return durations.to_steps(duration, batch_size=10, num_examples=100, total_steps=TOTAL)


def rates(name, learning_rate=0.5, steps=TOTAL + 1, **options):
    rate = schedules.build(
        name, learning_rate=learning_rate, total_steps=TOTAL, to_steps=to_steps, **options
    )
    values = jax.vmap(rate)(jnp.arange(steps))
    assert values.dtype == jnp.float32
    return np.asarray(values)


def torch_rates(make, steps=TOTAL):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("90 epochs", 450_410),
        ("1 epoch", 5005),
        ("5000 steps", 5000),
        ("1_000 steps", 1000),
        ("1.28e6 examples", 5000),
        ("1281167 examples", 5005),
        ("5%", 50),
        ("12.5 %", 125),
        ("0.5epochs", 2502),
        ("0 steps", 0),
    ],
)
def test_durations_round_to_the_nearest_step(text, steps):
    actual = durations.to_steps(text, batch_size=256, num_examples=1_281_167, total_steps=1000)
    assert actual == steps and type(actual) is int


@pytest.mark.parametrize(
    "text",
    ["90", "epochs", "", "ten epochs", "5 epcohs", "1e999 steps", "nan steps", "5 % steps", 90]
    + ["5 epochss", "1e308 hours"],
)
def test_what_is_no_duration_is_refused_with_the_units(text):
    with pytest.raises(ConfigError, match=r"epochs.*steps.*examples.*5%"):
        to_steps(text)


def test_durations_that_make_no_sense_are_refused():
    for text, message in [
        ("-1 epochs", "negative"),
        ("10 minutes", "is a time"),
        ("101%", "at most 100%"),
        ("1e308 epochs", "more steps than can be counted"),
    ]:
        with pytest.raises(ConfigError, match=message):
            to_steps(text)
    with pytest.raises(ConfigError, match="part of itself"):
        durations.to_steps("5%", batch_size=10, num_examples=100)


def test_times_are_read_as_seconds():
    for text, seconds in [
        ("30 seconds", 30),
        ("10 minutes", 600),
        ("1.5 hours", 5400),
        ("1 hour", 3600),
    ]:
        assert durations.parse_duration(text) == (seconds, "seconds")
    assert durations.parse_duration("2 Epochs") == (2, "epochs")


def test_cosine_equals_torch_and_reaches_its_end():
    expected = torch_rates(lambda s, o: s.CosineAnnealingLR(o, T_max=TOTAL, eta_min=0.05))
    actual = rates("cosine", final=0.1)
    np.testing.assert_allclose(actual[:TOTAL], expected, rtol=1e-5)
    assert actual[TOTAL] == pytest.approx(0.05)


def test_cosine_linear_and_polynomial_equal_optax():
    steps = np.arange(TOTAL + 1)
    expected = {
        "cosine": optax.cosine_decay_schedule(0.5, TOTAL, alpha=0.2),
        "linear": optax.linear_schedule(0.5, 0.1, TOTAL),
        "polynomial": optax.polynomial_schedule(0.5, 0.1, 2.0, TOTAL),
    }
    for name, schedule in expected.items():
        np.testing.assert_allclose(rates(name, final=0.2), schedule(steps), rtol=1e-5, err_msg=name)


def test_warm_up_equals_torch_and_wastes_no_step():
    def sequential(s, optimizer):
        warmup = s.LinearLR(optimizer, start_factor=0.1, total_iters=9)
        cosine = s.CosineAnnealingLR(optimizer, T_max=TOTAL - 10)
        return s.SequentialLR(optimizer, [warmup, cosine], milestones=[10])

    np.testing.assert_allclose(
        rates("cosine", warmup="1 epochs")[:TOTAL], torch_rates(sequential), rtol=1e-5, atol=1e-7
    )


def test_warm_up_rises_from_its_start_to_the_whole():
    actual = rates("constant", warmup="10 steps", warmup_start=0.5)
    np.testing.assert_allclose(actual[:10], 0.5 * (0.5 + 0.05 * np.arange(1, 11)), rtol=1e-6)
    np.testing.assert_allclose(actual[10:], 0.5)


def test_step_equals_torch_and_counts_from_the_beginning_of_the_run():
    expected = torch_rates(lambda s, o: s.MultiStepLR(o, milestones=[30, 60, 80], gamma=0.2))
    boundaries = ("3 epochs", "60 steps", "80%")
    actual = rates("step", boundaries=boundaries, factor=0.2)
    np.testing.assert_allclose(actual[:TOTAL], expected, rtol=1e-5)
    warmed = rates("step", boundaries=boundaries, factor=0.2, warmup="5 steps")
    np.testing.assert_allclose(warmed[5:], actual[5:])


def test_exponential_equals_torch_at_whole_epochs():
    expected = torch_rates(lambda s, o: s.ExponentialLR(o, gamma=0.9), steps=10)
    actual = rates("exponential", decay=0.9, every="1 epochs")
    np.testing.assert_allclose(actual[:TOTAL:10], expected, rtol=1e-5)
    assert (np.diff(actual) < 0).all()


def test_one_cycle_is_a_triangle():
    actual = rates("one_cycle", peak="23%", start=0.2, final=0.07)
    expected = 0.5 * np.interp(np.arange(TOTAL + 1), [0, 23, TOTAL], [0.2, 1, 0.07])
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_one_cycle_equals_torch_but_for_its_ends():
    expected = torch_rates(
        lambda s, o: s.OneCycleLR(
            o, 0.5, TOTAL + 1, pct_start=31 / 101, anneal_strategy="linear", final_div_factor=1e9
        ),
        steps=TOTAL + 1,
    )
    actual = rates("one_cycle", peak="30%", start=0.04)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("peak", ["0%", "100%"])
def test_one_cycle_with_its_peak_at_an_end_is_one_leg(peak):
    actual = rates("one_cycle", peak=peak, start=0.0, final=0.0)
    expected = np.linspace(0, 0.5, TOTAL + 1)
    np.testing.assert_allclose(actual, expected if peak == "100%" else expected[::-1], atol=1e-6)


def test_cooldown_goes_straight_to_zero_from_where_the_schedule_ends():
    actual = rates("constant", cooldown="20%")
    np.testing.assert_allclose(actual[:81], 0.5)
    np.testing.assert_allclose(actual[80:], np.linspace(0.5, 0, 21), atol=1e-7)
    actual = rates("cosine", final=0.4, cooldown="20 steps", warmup="10 steps")
    np.testing.assert_allclose(
        actual[10:81], rates("cosine", final=0.4)[0] * cosine(71, 0.4), rtol=1e-5
    )
    np.testing.assert_allclose(actual[80:], np.linspace(0.2, 0, 21), atol=1e-7)


def cosine(points, final):
    return final + (1 - final) * (1 + np.cos(np.linspace(0, np.pi, points))) / 2


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_the_rate_is_finite_and_never_negative_also_beyond_the_run(name):
    options = {} if name == "one_cycle" else {"warmup": "10 steps"}
    values = rates(name, steps=2 * TOTAL, cooldown="10 steps", **options)
    assert np.isfinite(values).all() and (values >= 0).all() and values.max() <= 0.5
    assert (values[TOTAL:] == 0).all()


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_a_run_that_is_all_warm_up_is_fine(name):
    if name != "one_cycle":
        np.testing.assert_allclose(
            rates(name, warmup="100%")[:TOTAL], 0.005 * np.arange(1, 101), rtol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "did you mean 'cosine'"),
        ("cosine", {"power": 2.0}, "power is not used by cosine"),
        (
            "cosine",
            {"final": 2.0},
            "final must be float at least 0 and at most 1 for cosine, got 2.0",
        ),
        ("cosine", {"warmup_start": -1.0}, "warmup_start must be float at least 0 and at most 1"),
        ("cosine", {"warmup": "10 minutes"}, "is a time"),
        ("cosine", {"learning_rate": float("nan")}, "config.optimizer.learning_rate must"),
        ("one_cycle", {"warmup": "5%"}, "`warmup` must be None"),
        ("exponential", {"every": "0 steps"}, "at least one step"),
        ("step", {"factor": -1.0}, "factor must be float at least 0 for step"),
        ("step", {"boundaries": ("50%", "20%")}, "config.schedule.boundaries must go forward"),
    ],
)
def test_a_wrong_option_is_refused_when_the_schedule_is_built(name, options, message):
    with pytest.raises(ConfigError, match=message):
        rates(name, **options)


def test_warmup_and_cooldown_that_are_longer_than_the_run_share_it():
    assert schedules.fitted(5, 0, 100) == (5, 0)
    assert schedules.fitted(60, 40, 100) == (60, 40)
    assert schedules.fitted(500, 0, 100) == (100, 0)
    assert schedules.fitted(300, 100, 100) == (75, 25)
    assert schedules.fitted(5, 0, 1) == (1, 0)
    np.testing.assert_allclose(
        rates("one_cycle", peak="500 steps")[:TOTAL], rates("one_cycle", peak="100%")[:TOTAL]
    )
    np.testing.assert_allclose(
        rates("cosine", warmup="500 steps")[:TOTAL], rates("cosine", warmup="100%")[:TOTAL]
    )
