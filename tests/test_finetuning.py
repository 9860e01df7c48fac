"""What `config.finetune` does: frozen parameters, layer-wise learning rates, frozen statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from flaxcls import build, models
from flaxcls import config as configs
from flaxcls.build.length import Length
from flaxcls.core.losses import LossSpec
from flaxcls.core.step import make_init, make_train_step, seed_key
from flaxcls.errors import ConfigError
from flaxcls.models.layers import batch_stats_frozen
from flaxcls.runtime import sharding
from flaxcls.training.program import Program

HEAD_ONLY = "^(?!head/)"


@pytest.fixture
def cnn_config(tiny_config):
    """A run of a small network with BatchNorm."""

    def make(**changes):
        return tiny_config(model__name="digits_cnn", model__widths=None, **changes)

    return make


def open_program(config):
    build.check(config)
    return Program.open(build.make_experiment(config, sharding.make_mesh()))


def trained(config, steps=3):
    """The states before and after some steps, by path."""
    program = open_program(config)
    state = program.init()
    before = flat(jax.device_get(state))
    for step in range(steps):
        state = program.update(state, program.batch(step))
    return before, flat(jax.device_get(state))


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def changed(before, after, part):
    return {
        path
        for path in before
        if path.startswith(part) and before[path].tobytes() != after[path].tobytes()
    }


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_frozen_keeps_every_bit(cnn_config, parts):
    """With weight decay, an average of the parameters and a batch in parts."""
    before, after = trained(
        cnn_config(
            finetune__freeze=HEAD_ONLY,
            finetune__freeze_batch_stats=True,
            optimizer__weight_decay=0.1,
            ema_decay=0.9,
            gradient_accumulation=parts,
        )
    )
    assert changed(before, after, "params/") == {"params/head/kernel", "params/head/bias"}
    assert changed(before, after, "ema/") == {"ema/params/head/kernel", "ema/params/head/bias"}
    assert not changed(before, after, "batch_stats/")
    # Momentum is kept for what is trained only.
    assert {p.split("/")[-2] for p in after if p.startswith("opt_state/") and after[p].ndim} == {
        "head"
    }


def test_the_statistics_of_what_is_frozen_move_unless_they_are_frozen_too(cnn_config):
    before, after = trained(cnn_config(finetune__freeze=HEAD_ONLY))
    moved = changed(before, after, "batch_stats/")
    assert len(moved) == 6


def test_no_gradient_is_computed_below_the_lowest_trained_layer(cnn_config):
    def flops(freeze):
        config = cnn_config(finetune__freeze=freeze, finetune__freeze_batch_stats=True)
        config.model.dropout = 0.1  # else what is below the head would be computed once
        experiment = build.make_experiment(config, one_device)
        return Program.open(experiment).lower().compile().cost_analysis()["flops"]

    types = (AxisType.Auto, AxisType.Auto)
    one_device = jax.make_mesh(
        (1, 1), ("data", "fsdp"), axis_types=types, devices=jax.devices()[:1]
    )

    network = models.build("digits_cnn", num_classes=5)
    variables = models.shapes(network, (8, 8, 1))
    forward = (
        jax.jit(lambda v, x: network.apply(v, x, train=False))
        .lower(variables, jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.float32))
        .compile()
        .cost_analysis()["flops"]
    )
    whole, upper, head = flops(None), flops("^(conv1|norm1|conv2|norm2)/"), flops(HEAD_ONLY)
    assert head < 1.2 * forward  # no backward pass but the head's
    assert whole > 2.3 * forward  # of the images themselves none is needed
    assert forward < head < upper < whole


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("^stem/", "config.finetune.freeze '\\^stem/' is found in no parameter's path, such as"),
        (".", "config.finetune.freeze leaves no parameter to train, got '.'"),
        ("(", "config.finetune.freeze is not a regular expression"),
    ],
)
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(cnn_config, freeze, message):
    with pytest.raises(ConfigError, match=message):
        open_program(cnn_config(finetune__freeze=freeze))


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5])
def test_a_decay_out_of_range_is_refused(cnn_config, decay):
    with pytest.raises(ConfigError, match="finetune.layer_decay must be above 0 and at most 1"):
        open_program(cnn_config(finetune__layer_decay=decay))


def test_the_network_may_freeze_more_than_the_config(tiny_config):
    config = tiny_config(
        model__name="quick", model__widths=None, data__image_shape=(32, 32, 3), batch_size=8
    )
    config.finetune.freeze = "^block1_"
    experiment = build.make_experiment(config, sharding.make_mesh())
    assert {path.split("_")[0] for path in experiment.frozen} == {"whiten/kernel", "block1"}


def test_layer_decay_scales_the_first_update_of_each_layer(cnn_config):
    """Beside the factors by pattern, and told at the start."""
    options = {"finetune__freeze": "^norm", "optimizer__momentum": None}
    options["optimizer__learning_rate_factors"] = (("^head/", 10.0),)
    plain = trained(cnn_config(**options), steps=1)
    config = cnn_config(finetune__layer_decay=0.5, **options)
    decayed = trained(config, steps=1)
    for path in plain[0]:
        if path.startswith("params/"):
            one, other = ((after[path] - before[path]) for before, after in (plain, decayed))
            layer = path.split("/")[1]
            factor = {"conv1": 1 / 8, "conv2": 1 / 4, "conv3": 1 / 2, "head": 1}.get(layer, 0)
            np.testing.assert_allclose(other, factor * one, rtol=1e-4, atol=1e-7, err_msg=path)
            assert np.any(one) == ("norm" not in path)
    text = build.make_experiment(config, sharding.make_mesh()).parameter_groups
    assert "learning rate x 10: 2 arrays" in text and "\nfrozen: 6 arrays" in text
    assert text.endswith(
        "\nlearning rate by layer, decay 0.5: x 0.125 conv1, norm1; x 0.25 conv2, norm2; "
        "x 0.5 conv3, norm3; x 1 head"
    )


TORTURE = pytest.mark.torture
FAMILIES = {
    "digits_cnn": (8, {}),
    "cifar_resnet20": (8, {}),
    "resnet18": (32, {"width": 8}),
    "vgg11_bn": (32, {}),
    "densenet_bc": (16, {"depth": 10, "growth": 4}),
    "efficientnet_lite0": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "mobilenetv4_conv_medium": (32, {}),
    "quick": (32, {}),
}


LONG = ("mobilenet_v3_small", "mobilenetv4_conv_medium", "efficientnet_lite0", "vgg11_bn")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=TORTURE if name in LONG else ()) for name in FAMILIES]
)
def test_batch_norm_of_all_networks_can_be_as_in_evaluation(name):
    size, options = FAMILIES[name]
    no_noise = {"dropout", "drop_path"} & models.options(name).keys()
    options = options | dict.fromkeys(no_noise, 0.0)
    network = models.build(name, num_classes=3, **options)
    images = jax.random.normal(jax.random.key(0), (2, size, size, 3))

    def run(key, images):
        rngs = {"params": key, "dropout": key}
        variables = network.init(rngs, images, train=False)
        variables["batch_stats"] = jax.tree.map(lambda x: x + 0.5, variables["batch_stats"])
        expected = network.apply(variables, images, train=False)

        def apply():
            return network.apply(
                variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key}
            )

        with batch_stats_frozen():
            logits, updates = apply()
        return expected, logits, variables, updates, apply()[0]

    quickly = {"xla_backend_optimization_level": 0}  # compiled: it runs only once
    run = jax.jit(run, compiler_options=quickly)
    expected, logits, variables, updates, other = run(jax.random.key(1), images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(other - expected).max() > 1e-2  # what it is without
    before, after = (flat(tree["batch_stats"]) for tree in (variables, updates))
    assert before and all(np.array_equal(before[path], after[path]) for path in before)


def test_dropout_is_on_where_the_statistics_are_frozen():
    network = models.build("wrn", num_classes=3, depth=10, width=1, dropout=0.5)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = network.init(jax.random.key(0), images, train=False)
    with batch_stats_frozen():
        one, other = (
            network.apply(
                variables,
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(seed)},
            )[0]
            for seed in (1, 2)
        )
    assert np.abs(one - other).max() > 1e-3


def test_a_step_equals_pytorchs():
    """A small ResNet with a frozen stem, BatchNorm in evaluation mode, two learning rates."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Reference(nn.Module):
        """cifar_resnet of depth 8, one block a stage, by our names."""

        def __init__(self):
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            before = 16
            for stage, width in enumerate((16, 32, 64), start=1):
                name = f"stage{stage}_block1"
                strides = 2 if stage > 1 else 1
                self.add_module(f"{name}_conv1", conv(nn, before, width, strides))
                self.add_module(f"{name}_norm1", nn.BatchNorm2d(width))
                self.add_module(f"{name}_conv2", conv(nn, width, width, 1))
                self.add_module(f"{name}_norm2", nn.BatchNorm2d(width))
                before = width
            self.head = nn.Linear(64, 3)

        def forward(self, x):
            relu = nn.functional.relu
            layer = dict(self.named_children())
            x = relu(layer["norm1"](layer["conv1"](x)))
            for stage in (1, 2, 3):
                name = f"stage{stage}_block1"
                y = relu(layer[f"{name}_norm1"](layer[f"{name}_conv1"](x)))
                y = layer[f"{name}_norm2"](layer[f"{name}_conv2"](y))
                if stage > 1:
                    half = x.shape[1] // 2
                    x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
                x = relu(y + x)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    reference = Reference().double().eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    variables = to_flax(reference)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3))
    labels = np.array([0, 1, 2, 1])

    for module in (reference.conv1, reference.norm1):
        module.requires_grad_(False)
    head = list(reference.head.parameters())
    rest = [
        p
        for name, p in reference.named_parameters()
        if p.requires_grad and not name.startswith("head")
    ]
    groups = [{"params": rest, "lr": 0.01}, {"params": head, "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        logits = reference(torch.tensor(images.transpose(0, 3, 1, 2)))
        nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        optimizer.step()

    with jax.enable_x64(True):
        ours = two_steps(variables, images, labels)
    for path, expected in flat(to_flax(reference)).items():
        np.testing.assert_allclose(ours[path], expected, rtol=1e-5, atol=1e-7, err_msg=path)
    assert any(np.any(ours[path] != before) for path, before in flat(variables).items())


def conv(nn, inputs, outputs, strides):
    return nn.Conv2d(inputs, outputs, 3, strides, 1, bias=False)


def to_flax(reference):
    variables = {"params": {}, "batch_stats": {}}
    for path, tensor in reference.state_dict().items():
        layer, leaf = path.rsplit(".", 1)
        array = tensor.numpy().copy()
        if leaf == "num_batches_tracked":
            continue
        if leaf.startswith("running_"):
            variables["batch_stats"].setdefault(layer, {})[leaf.removeprefix("running_")] = array
            continue
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])
        variables["params"].setdefault(layer, {})[leaf] = array
    return variables


def two_steps(variables, images, labels):
    """Two of the trainer's steps from these variables, by path; the optimizer's are float32."""
    config = build_config()
    network = models.build("cifar_resnet20", num_classes=3).clone(depth=8, dtype=jnp.float64)
    shape = (8, 8, 3)
    params = models.shapes(network, shape)["params"]
    frozen = build.frozen(config, network, params)
    config.optimizer.learning_rate, config.schedule.name = 0.01, "constant"
    optimizer, _ = build.optimizer(config, network, shape, params, frozen, Length(9, 8, 96))
    step = make_train_step(
        network,
        LossSpec("softmax_cross_entropy", None, {}).with_weights(None),
        optimizer,
        lambda key, batch: batch,
        num_classes=3,
        frozen=frozen,
        freeze_batch_stats=True,
        ema_decay=None,
        gradient_accumulation=1,
        max_grad_norm=1e4,
        platform="cpu",
    )
    init = make_init(network, optimizer, num_classes=3, ema=False)
    state = init(jax.random.key_data(seed_key(0)), jnp.asarray(images))
    state = state.replace(**jax.tree.map(jnp.asarray, variables))
    number = jnp.zeros(4, jnp.int32)
    batch = {"image": jnp.asarray(images), "label": labels, "index": number, "epoch": number}
    for _ in range(2):
        state = jax.jit(step)(state, batch)
    return flat(jax.device_get(state.variables))


def build_config():
    config = configs.default()
    config.finetune.freeze = "^(conv1|norm1)/"
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 0.01
    config.optimizer.no_weight_decay = "^$"
    config.optimizer.learning_rate_factors = (("^head/", 10.0),)
    return config
