import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxcls.core import optim
from flaxcls.errors import ConfigError

RNG = np.random.default_rng(0)
SHAPES = {
    "conv1": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "norm1": {"scale": (4,), "bias": (4,)},
    "hidden": {"kernel": (4, 6), "bias": (6,)},
    "head": {"kernel": (6, 5), "bias": (5,)},
}
IS_SHAPE = {"is_leaf": lambda node: isinstance(node, tuple)}
PARAMS = jax.tree.map(lambda s: RNG.normal(size=s).astype(np.float32), SHAPES, **IS_SHAPE)
GRADS = [jax.tree.map(lambda s: RNG.normal(size=s), SHAPES, **IS_SHAPE) for _ in range(6)]
KERNELS = ("conv1/kernel", "hidden/kernel", "head/kernel")
RATE = 0.03


def schedule(count):
    """Not constant, so that an optimizer that forgets or misplaces it is found out."""
    return RATE / (1 + count)


def gradient(params, step):
    """Depends on the parameters, so that errors add up; NumPy or PyTorch."""
    return {path: 0.3 * params[path] + flat(GRADS[step])[path] for path in params}


def flat(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def unflat(values):
    return jax.tree.unflatten(jax.tree.structure(PARAMS), [values[path] for path in flat(PARAMS)])


@functools.cache
def train(name, **options):
    """The parameters after some steps, by path."""
    optimizer, _ = optim.build(name, schedule=schedule, params=PARAMS, **options)
    update = jax.jit(optimizer.update)
    params, state = PARAMS, optimizer.init(PARAMS)
    for step in range(len(GRADS)):
        grads = unflat(gradient(flat(params), step))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return flat(params)


def train_torch(make, weight_decay):
    """The same with a PyTorch optimizer in float64; kernels have weight decay, others have none."""
    torch = pytest.importorskip("torch")
    params = {
        path: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for path, value in flat(PARAMS).items()
    }
    groups = [
        {"params": [p for n, p in params.items() if n in KERNELS], "weight_decay": weight_decay},
        {"params": [p for n, p in params.items() if n not in KERNELS], "weight_decay": 0.0},
    ]
    optimizer = make(torch.optim, groups)
    for step in range(len(GRADS)):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        values = {path: param.detach().numpy().copy() for path, param in params.items()}
        for path, value in gradient(values, step).items():
            params[path].grad = torch.tensor(value)
        optimizer.step()
    return {path: param.detach().numpy() for path, param in params.items()}


def timm_optim():
    """timm.optim; skips the test where it can't be imported."""
    pytest.importorskip("torch")
    path = Path(__file__).parent / "models" / "references.py"
    spec = importlib.util.spec_from_file_location("references", path)
    references = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(references)
    references.timm()
    return pytest.importorskip("timm.optim")


def train_numpy(rule):
    """The same with `rule(path, param, grad, state, step) -> param` in float64."""
    params = {path: np.asarray(value, np.float64) for path, value in flat(PARAMS).items()}
    states = {path: {"m": np.zeros_like(p), "v": np.zeros_like(p)} for path, p in params.items()}
    for step in range(len(GRADS)):
        grads = gradient(params, step)
        params = {p: rule(p, params[p], grads[p], states[p], step) for p in params}
    return params


def assert_same(actual, expected, rtol=2e-5, atol=2e-6):
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=rtol, atol=atol, err_msg=path)
        assert np.abs(actual[path] - flat(PARAMS)[path]).max() > 1e-4, path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
    ],
)
def test_sgd_equals_torch(options):
    expected = train_torch(lambda o, groups: o.SGD(groups, lr=1.0, **options), 0.1)
    assert_same(train("sgd", weight_decay=0.1, **options), expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_equals_torch(momentum):
    expected = train_torch(
        lambda o, groups: o.RMSprop(groups, alpha=0.8, eps=1e-3, momentum=momentum), 0.1
    )
    actual = train("rmsprop", decay=0.8, eps=1e-3, momentum=momentum, weight_decay=0.1)
    assert_same(actual, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_tf_equals_tensorflows_formulas(momentum):
    def rule(path, param, grad, state, step):
        if path in KERNELS:
            grad = grad + 0.1 * param
        if step == 0:
            state["v"] += 1
        state["v"] = 0.8 * state["v"] + 0.2 * grad**2
        state["m"] = momentum * state["m"] + schedule(step) * grad / np.sqrt(state["v"] + 1e-3)
        return param - state["m"]

    actual = train("rmsprop_tf", decay=0.8, momentum=momentum, weight_decay=0.1)
    assert_same(actual, train_numpy(rule))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_tf_equals_timm(momentum):
    rule = timm_optim().RMSpropTF
    options = {"eps": 1e-3, "momentum": momentum}
    expected = train_torch(lambda _, groups: rule(groups, alpha=0.8, **options), 0.1)
    assert_same(train("rmsprop_tf", decay=0.8, weight_decay=0.1, **options), expected)


def test_rmsprop_tf_keeps_no_momentum_of_frozen_parameters():
    frozen = [path for path in flat(PARAMS) if not path.startswith("head/")]
    optimizer, _ = optim.build("rmsprop_tf", schedule=schedule, params=PARAMS, frozen=frozen)
    states = jax.tree.leaves(optimizer.init(PARAMS))
    head = 2 * sum(leaf.size for leaf in jax.tree.leaves(PARAMS["head"]))
    assert sum(leaf.size for leaf in states) == head + 1  # and the schedule's count


def test_lamb_with_a_clipped_norm_equals_timm():
    rule = timm_optim().Lamb
    expected = train_torch(lambda _, groups: rule(groups, betas=(0.8, 0.9)), 0.1)
    actual = train("lamb", b1=0.8, b2=0.9, weight_decay=0.1, gradient_clip_norm=1.0)
    assert_same(actual, expected)


def test_adam_equals_torch():
    expected = train_torch(lambda o, groups: o.Adam(groups, betas=(0.8, 0.9), eps=1e-3), 0.1)
    assert_same(train("adam", b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1), expected)


def test_adamw_equals_torch():
    expected = train_torch(lambda o, groups: o.AdamW(groups, betas=(0.8, 0.9), eps=1e-3), 0.1)
    assert_same(train("adamw", b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1), expected)


def adam_step(grad, state, step, b1, b2, eps):
    state["m"] = b1 * state["m"] + (1 - b1) * grad
    state["v"] = b2 * state["v"] + (1 - b2) * grad**2
    m, v = state["m"] / (1 - b1 ** (step + 1)), state["v"] / (1 - b2 ** (step + 1))
    return m / (np.sqrt(v) + eps)


def test_lamb_equals_the_paper():
    def rule(path, param, grad, state, step):
        move = adam_step(grad, state, step, 0.8, 0.9, 1e-6)
        if path in KERNELS:
            move = move + 0.1 * param
            move = move * np.linalg.norm(param) / np.linalg.norm(move)
        return param - schedule(step) * move

    assert_same(train("lamb", b1=0.8, b2=0.9, weight_decay=0.1), train_numpy(rule))


def test_lars_equals_the_paper_up_to_where_the_learning_rate_comes():
    def rule(path, param, grad, state, step):
        if path in KERNELS:
            grad = grad + 0.1 * param
            grad = 0.01 * np.linalg.norm(param) / np.linalg.norm(grad) * grad
        state["m"] = 0.9 * state["m"] + grad
        return param - schedule(step) * state["m"]

    assert_same(train("lars", trust_coefficient=0.01, weight_decay=0.1), train_numpy(rule))


def test_lion_equals_the_paper():
    def rule(path, param, grad, state, step):
        move = np.sign(0.8 * state["m"] + 0.2 * grad)
        state["m"] = 0.95 * state["m"] + 0.05 * grad
        decay = 0.1 if path in KERNELS else 0.0
        return param - schedule(step) * (move + decay * param)

    assert_same(train("lion", b1=0.8, b2=0.95, weight_decay=0.1), train_numpy(rule))


def newton_schulz(x, steps):
    """Jordan's, on [outputs, inputs]."""
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x


def airbench_rule(path, param, grad, state, step):
    """The two optimizers of airbench94_muon; it has convolutions as [O, I, H, W]."""
    if path in ("conv1/kernel", "hidden/kernel"):
        state["m"] = 0.6 * state["m"] + grad
        move = np.moveaxis(grad + 0.6 * state["m"], -1, 0)
        param = param * len(move) ** 0.5 / np.linalg.norm(param)
        matrix = newton_schulz(move.reshape(len(move), -1), steps=3)
        matrix = matrix * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5  # Muon's; 1 in airbench
        return param - schedule(step) * np.moveaxis(matrix.reshape(move.shape), 0, -1)
    if path == "head/kernel":
        grad = grad + 0.1 * param
    state["m"] = 0.85 * state["m"] + grad
    factor = 4.0 if path == "head/kernel" else 0.5
    return param - schedule(step) * factor * (grad + 0.85 * state["m"])


def test_muon_with_sgd_for_the_rest_is_airbench():
    actual = train(
        "muon",
        momentum=0.6,
        newton_schulz_steps=3,
        renormalize=True,
        rest="sgd",
        rest_learning_rate=0.5,
        rest_momentum=0.85,
        weight_decay=0.1,
        weight_decay_mode="l2",
        learning_rate_factors=(("^head/kernel$", 8.0),),
    )
    assert_same(actual, train_numpy(airbench_rule), rtol=1e-4, atol=1e-5)


def test_muon_equals_torch_within_its_bfloat16():
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    params, grads = PARAMS["hidden"]["kernel"], [g["hidden"]["kernel"] for g in GRADS]
    theirs = torch.tensor(params.T.copy(), requires_grad=True)
    muon = torch.optim.Muon([theirs], lr=1.0, momentum=0.9, weight_decay=0.1)
    optimizer, _ = optim.build(
        "muon", schedule=schedule, params={"kernel": params}, momentum=0.9, weight_decay=0.1
    )
    ours = {"kernel": params}
    state = optimizer.init(ours)
    for step, grad in enumerate(grads):
        muon.param_groups[0]["lr"] = schedule(step)
        theirs.grad = torch.tensor(grad.T.astype(np.float32))
        muon.step()
        updates, state = optimizer.update({"kernel": grad}, state, ours)
        ours = optax.apply_updates(ours, updates)
    change = theirs.detach().numpy().T - params
    np.testing.assert_allclose(ours["kernel"] - params, change, atol=0.02 * np.abs(change).max())


def test_muon_leaves_the_rest_to_adam_as_if_it_were_alone():
    muon, adam = (
        train("muon", rest_learning_rate=0.5),
        train("adam", learning_rate_factors=((".", 0.5),)),
    )
    for path in set(adam) - {"conv1/kernel", "hidden/kernel"}:
        np.testing.assert_allclose(muon[path], adam[path], rtol=1e-6)
    assert not np.allclose(muon["hidden/kernel"], adam["hidden/kernel"])


def test_muon_takes_matrices_and_only_those():
    shapes = {
        "conv/kernel": (3, 3, 2, 8),
        "depthwise/kernel": (3, 3, 1, 8),
        "attention/query/kernel": (12, 2, 6),
        "attention/out/kernel": (2, 6, 12),
        "position": (1, 9, 12),
        "head/kernel": (12, 10),
    }
    params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    _, text = optim.build("muon", schedule=schedule, params=params)
    muon, adam = sorted(text.split("\n"), key=lambda line: line.startswith("adam"))
    for path in ("conv/kernel", "attention/query/kernel", "attention/out/kernel"):
        assert path in muon
    for path in ("depthwise/kernel", "position", "head/kernel"):
        assert path in adam


def test_muon_makes_the_update_of_attention_orthogonal_over_the_right_axes():
    params = {
        "query": {"kernel": jnp.zeros((12, 2, 6))},
        "out": {"kernel": jnp.zeros((2, 6, 12))},
    }
    optimizer, _ = optim.build(
        "muon", schedule=lambda _: 1.0, params=params, newton_schulz_steps=12
    )
    grads = jax.tree.map(lambda p: RNG.normal(size=p.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for layer, matrix in (("query", (12, 12)), ("out", (12, 12))):
        singular = np.linalg.svd(updates[layer]["kernel"].reshape(matrix))[1]
        assert singular.min() > 0.6 and singular.max() < 1.3


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_l2_is_the_gradient_of_half_the_squared_norm(name):
    optimizer, _ = optim.build(name, schedule=schedule, params=PARAMS)

    def penalty(params):
        kernels = [value for path, value in flat(params).items() if path in KERNELS]
        return 0.5 * 0.1 * sum(jnp.sum(kernel**2) for kernel in kernels)

    @jax.jit
    def update(grads, state, params):
        grads = jax.tree.map(jnp.add, grads, jax.grad(penalty)(params))
        return optimizer.update(grads, state, params)

    params, state = PARAMS, optimizer.init(PARAMS)
    for step in range(len(GRADS)):
        updates, state = update(unflat(gradient(flat(params), step)), state, params)
        params = optax.apply_updates(params, updates)
    actual = train(name, weight_decay=0.1)
    assert_same(actual, flat(params))
    decoupled = train(name, weight_decay=0.1, weight_decay_mode="decoupled")
    assert not np.allclose(actual["hidden/kernel"], decoupled["hidden/kernel"], rtol=1e-4)


@pytest.mark.parametrize("name", optim.RULES)
@pytest.mark.parametrize("mode", ["l2", "decoupled"])
def test_weight_decay_touches_what_it_should_and_nothing_else(name, mode):
    plain = train(name)
    decayed = train(
        name,
        weight_decay=0.5,
        weight_decay_mode=mode,
        no_weight_decay="bias|scale|hidden",
        weight_decay_factors=((r"^head/kernel", 0.0), ("", 1.0)),
    )
    changed = {path for path in plain if not np.allclose(plain[path], decayed[path], rtol=1e-4)}
    # The layerwise length of LAMB and LARS also depends on what is exempt.
    assert changed - {"hidden/kernel"} == {"conv1/kernel"}
    assert ("hidden/kernel" in changed) == (name in ("lamb", "lars"))


def test_decoupled_weight_decay_is_multiplied_by_the_learning_rate():
    optimizer, _ = optim.build(
        "adamw", schedule=lambda _: 0.2, params=PARAMS, weight_decay=0.1, no_weight_decay="bias"
    )
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(
        updates["norm1"]["scale"], -0.2 * 0.1 * PARAMS["norm1"]["scale"], rtol=1e-6
    )
    assert not np.any(updates["norm1"]["bias"])


@pytest.mark.parametrize("name", optim.RULES)
def test_frozen_parameters_never_move_and_have_no_state(name):
    frozen = frozenset(("conv1/kernel", "conv1/bias", "norm1/scale"))
    optimizer, text = optim.build(
        name, schedule=schedule, params=PARAMS, frozen=frozen, weight_decay=0.1
    )
    trained = train(name, frozen=frozen, weight_decay=0.1)
    for path, value in flat(PARAMS).items():
        assert np.array_equal(trained[path], value) == (path in frozen), path
    assert not [path for path in flat(optimizer.init(PARAMS)) if "conv1" in path or "scale" in path]
    assert "frozen: 3 arrays, 80 parameters: conv1/bias, conv1/kernel, norm1/scale" in text


def test_frozen_parameters_take_no_part_in_the_clipping():
    options = {"gradient_clip_norm": 0.01, "frozen": ("head/kernel", "head/bias")}
    optimizer, _ = optim.build("sgd", schedule=lambda _: 1.0, params=PARAMS, **options)
    grads = jax.tree.map(jnp.asarray, GRADS[0])
    grads["head"]["kernel"] = jnp.full((6, 5), jnp.nan)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.01, rel=1e-5)


def test_gradients_are_clipped_before_weight_decay():
    options = {"gradient_clip_norm": 1e-9, "weight_decay": 0.1, "weight_decay_mode": "l2"}
    optimizer, _ = optim.build("sgd", schedule=lambda _: 1.0, params=PARAMS, **options)
    updates, _ = optimizer.update(GRADS[0], optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(
        updates["head"]["kernel"], -0.1 * PARAMS["head"]["kernel"], atol=1e-7
    )


def test_gradients_are_clipped_by_value():
    options = {"gradient_clip_value": 0.3}
    optimizer, _ = optim.build("sgd", schedule=lambda _: 1.0, params=PARAMS, **options)
    updates, _ = optimizer.update(GRADS[0], optimizer.init(PARAMS), PARAMS)
    for path, update in flat(updates).items():
        np.testing.assert_allclose(update, -np.clip(flat(GRADS[0])[path], -0.3, 0.3), rtol=1e-6)


def test_learning_rate_factors_scale_step_and_decay_of_the_first_match():
    factors = (("^head/kernel", 2.0), ("^head/", 3.0))
    options = {"weight_decay": 0.1, "weight_decay_mode": "decoupled"}
    results = []
    for more in ({}, {"learning_rate_factors": factors}):
        optimizer, _ = optim.build("sgd", schedule=schedule, params=PARAMS, **options, **more)
        results.append(flat(optimizer.update(GRADS[0], optimizer.init(PARAMS), PARAMS)[0]))
    for path, plain in results[0].items():
        factor = {"head/kernel": 2.0, "head/bias": 3.0}.get(path, 1.0)
        np.testing.assert_allclose(results[1][path], factor * plain, rtol=1e-6)


def test_learning_rate_durations_end_the_training_of_some_parameters():
    def shortened(duration):
        return lambda step: jnp.where(step < {"1 steps": 1, "2 steps": 2}[duration], 0.5, 0.0)

    durations = (("^head/kernel", "2 steps"), ("^head/", "1 steps"))
    options = {"learning_rate_durations": durations, "momentum": 0.9}
    optimizer, text = optim.build(
        "sgd", schedule=lambda _: 1.0, params=PARAMS, shortened=shortened, **options
    )
    assert "for 2 steps: 1 array, 30 parameters: head/kernel" in text
    assert "for 1 steps: 1 array, 5 parameters: head/bias" in text
    plain, _ = optim.build("sgd", schedule=lambda _: 1.0, params=PARAMS, momentum=0.9)
    state, other = optimizer.init(PARAMS), plain.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for step, grads in enumerate(GRADS[:3]):
        updates, state = optimizer.update(grads, state, PARAMS)
        expected, other = plain.update(grads, other, PARAMS)
        for path, update in flat(updates).items():
            steps = {"head/kernel": 2, "head/bias": 1}.get(path)
            factor = 1.0 if steps is None else 0.5 if step < steps else 0.0
            np.testing.assert_allclose(update, factor * flat(expected)[path], rtol=1e-6)
    assert optim.updates_made(state) == 3


def test_the_learning_rate_follows_the_count_in_the_state():
    optimizer, _ = optim.build(
        "sgd", schedule=lambda step: jnp.where(step == 2, 0.0, 1.0), params=PARAMS
    )
    state, moved = optimizer.init(PARAMS), []
    for grads in GRADS[:4]:
        updates, state = optimizer.update(grads, state, PARAMS)
        moved.append(bool(np.any(updates["head"]["kernel"])))
    assert moved == [True, True, False, True]


@pytest.mark.parametrize("name", optim.RULES)
@pytest.mark.parametrize("frozen", [(), ("norm1/scale", "norm1/bias")])
def test_state_is_float32_and_its_paths_end_in_those_of_the_parameters(name, frozen):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    optimizer, _ = optim.build(name, schedule=schedule, params=params, frozen=frozen)
    state = jax.eval_shape(optimizer.init, params)
    shapes = {path: leaf.shape for path, leaf in flat(params).items()}
    for path, leaf in flat(state).items():
        if leaf.ndim:
            owner = next(owner for owner in shapes if path.endswith("/" + owner))
            assert leaf.dtype == jnp.float32 and leaf.shape == shapes[owner], path
        else:
            assert leaf.dtype == jnp.int32 and path.endswith("count")
    marked = optax.tree_map_params(
        optimizer,
        lambda leaf: leaf if isinstance(leaf, optax.MaskedNode) else "param",
        state,
        transform_non_params=lambda _: "other",
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    for path, mark in flat(marked).items():
        assert mark == ("other" if path.endswith("count") else "param")


def test_bfloat16_parameters_are_updated_from_float32():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    optimizer, _ = optim.build("sgd", schedule=schedule, params=params, momentum=0.9)
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), GRADS[0])
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {np.dtype(np.float32)}
    assert optax.apply_updates(params, updates)["head"]["bias"].dtype == jnp.bfloat16


def test_the_description_has_a_line_a_group():
    _, text = optim.build(
        "sgd",
        schedule=schedule,
        params=jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS)),
        weight_decay=5e-4,
        learning_rate_factors=(("^head/", 10),),
        frozen=("norm1/scale",),
    )
    assert text.split("\n") == [
        "sgd, weight decay 0.0005 (l2): 2 arrays, 96 parameters: conv1/kernel, hidden/kernel",
        "sgd, weight decay 0.0005 (l2), learning rate x 10: 1 array, 30 parameters: head/kernel",
        "sgd, no weight decay: 3 arrays, 14 parameters: conv1/bias, hidden/bias, norm1/bias",
        "sgd, no weight decay, learning rate x 10: 1 array, 5 parameters: head/bias",
        "frozen: 1 array, 4 parameters: norm1/scale",
    ]
    _, text = optim.build("adam", schedule=schedule, params=PARAMS)
    assert text == "adam, no weight decay: 8 arrays, 149 parameters: */bias, */kernel, */scale"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamv", {}, "did you mean 'adam'"),
        ("sgd", {"b1": 0.9}, "b1 is not used by sgd"),
        ("sgd", {"nesterov": True}, "`nesterov` of sgd needs a `momentum`"),
        (
            "sgd",
            {"momentum": 1.0},
            "momentum must be float at least 0 and below 1 for sgd, got 1.0",
        ),
        ("adam", {"b2": 1.5}, "config.optimizer.b2 must be .* below 1 for adam"),
        ("adam", {"eps": 0.0}, "eps must be float above 0 for adam"),
        ("lamb", {"b1": -0.1}, "config.optimizer.b1 must be .* for lamb"),
        ("muon", {"rest": "lion"}, "'adam' or 'sgd'"),
        ("muon", {"exclude": "."}, "no kernel to train"),
        ("muon", {"newton_schulz_steps": 0}, "newton_schulz_steps must be int at least 1"),
        ("sgd", {"weight_decay": -1.0}, "weight_decay must be float at least 0 for sgd, got -1.0"),
        (
            "sgd",
            {"weight_decay_mode": "L2"},
            "must be 'l2' or 'decoupled' or None for sgd, got 'L2'",
        ),
        ("sgd", {"no_weight_decay": "("}, "`no_weight_decay` is not a regular expression"),
        ("sgd", {"learning_rate_factors": (("stem", 2.0),)}, "`learning_rate_factors` 'stem'"),
        (
            "sgd",
            {"learning_rate_factors": (("head", -2.0),)},
            "learning_rate_factors must be .* at least 0.* got .*-2.0",
        ),
        ("sgd", {"learning_rate_durations": (("stem", "1%"),)}, "`learning_rate_durations` 'stem'"),
        ("sgd", {"learning_rate_durations": (("head", 3),)}, "learning_rate_durations must be "),
        ("sgd", {"gradient_clip_norm": 0.0}, "gradient_clip_norm must be float above 0 or None"),
        ("sgd", {"gradient_clip_value": -1.0}, "gradient_clip_value must be float above 0 or None"),
    ],
)
def test_a_wrong_option_is_refused_when_the_optimizer_is_built(name, options, message):
    with pytest.raises(ConfigError, match=message):
        optim.build(name, schedule=schedule, params=PARAMS, **options)


def test_ema_equals_the_recursion_in_float64_and_warms_up():
    tree = {"params": np.float32(1.0), "batch_stats": jnp.asarray(1.0, jnp.bfloat16)}
    ema = jax.tree.map(jnp.asarray, tree)
    expected = 1.0
    for step in range(20):
        value = float(step)
        new = {"params": jnp.float32(value), "batch_stats": jnp.asarray(value, jnp.bfloat16)}
        ema = optim.ema_update(ema, new, jnp.int32(step), 0.6)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert ema["params"].dtype == ema["batch_stats"].dtype == jnp.float32
    assert float(ema["params"]) == pytest.approx(expected, rel=1e-5)
    assert float(ema["batch_stats"]) == pytest.approx(expected, rel=1e-5)


def test_a_long_ema_is_exact_in_float32():
    ema = optim.ema_update(jnp.float32(0), jnp.float32(1), jnp.int32(10**8), 0.99998)
    assert float(ema) == pytest.approx(2e-5, rel=1e-5)
