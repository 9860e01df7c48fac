"""`package.module:Name` in a config: what is found, and what is said of what can't be."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import augment, build, data, models
from flaxcls.build import accepted
from flaxcls.config import options, recipes, user_code
from flaxcls.core import losses, optim, schedules
from flaxcls.errors import ConfigError
from flaxcls.inference.predictor import make_forward
from flaxcls.runtime import sharding

THINGS = """
from __future__ import annotations
import dataclasses
import typing
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flaxcls.augment import Augmentation
from flaxcls.config.options import Count, UpToOne
from flaxcls.data.source import Example, Source

if typing.TYPE_CHECKING:
    from nowhere import Unknown

class Net(nn.Module):
    num_classes: int
    width: Count = 4

    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Dense(self.width)(images.reshape(len(images), -1)))
        return nn.Dense(self.num_classes)(nn.Dropout(0.5, deterministic=not train)(x))

def net(num_classes: int, width: int = 4) -> Net:
    return Net(num_classes, width)

class Squares(Source):
    def __init__(self, split: str, count: int = 40, data_dir: str | None = None):
        self.count, self.folder = count, data_dir
        super().__init__(name="squares", split=split, class_names=("a", "b"),
                         image_shape=(8, 8, 1), fingerprint=f"{split}{count}")

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Example(np.full((8, 8, 1), 200 * (index % 2), np.uint8), index % 2)

def darker(key, batch, share: UpToOne = 0.5):
    return {**batch, "image": (batch["image"] * share).astype(batch["image"].dtype)}

@dataclasses.dataclass(frozen=True)
class Brighter(Augmentation):
    domain = "pixels"
    by: int = 3

    def __call__(self, key, batch):
        return {**batch, "image": batch["image"] + jnp.uint8(self.by)}

class Shape(typing.Protocol):
    pass

def power(logits, targets, *, power: float = 1.0, unread: Unknown = None, shape: Shape = None):
    return (-jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)) ** power

def each_class(logits, targets):
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)

each_class.evaluated_as = "sigmoid_cross_entropy"

def momentum(context, beta: UpToOne = 0.9):
    return [optax.trace(beta), context.decoupled]

def root(run, final: UpToOne = 0.0):
    return lambda step: jnp.maximum(final, jnp.sqrt(1 - run.progress(step)))
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module beside a recipe; it is gone again after the test."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = {*sys.modules}

    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        user_code.search(tmp_path)
        return path

    yield write
    for name in {*sys.modules} - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def things(write):
    return write("things", THINGS)


@pytest.fixture
def own_config(things, tiny_config):
    """A config in which everything that can be is the user's own."""
    config = tiny_config(
        model__name="things:Net", model__widths=None, model__width=8, optimizer__momentum=None
    )
    config.data.update(name="things:Squares", count=64)
    for option in ("image_shape", "num_classes", "num_examples"):
        del config.data[option]
    config.loss.update(name="things:power", power=1.5)
    config.optimizer.update(name="things:momentum", beta=0.5, weight_decay=0.1)
    config.schedule.update(name="things:root", final=0.25)
    config.augment = ({"name": "things:darker", "share": 0.25}, {"name": "things:Brighter"})
    return config


def test_names_of_ones_own_and_of_versions_are_told_apart():
    assert user_code.is_path("mine:Net") and user_code.is_path("a.b.c:Net")
    others = ("cifar10", "cifar10:3.0.2", "ds/config:1.0.0", "mine:", ":Net", "a..b:C", "a-b:C")
    assert not any(map(user_code.is_path, (*others, None, 3)))


def test_everything_may_be_the_users_own(own_config):
    build.check(own_config)
    experiment = build.make_experiment(own_config, sharding.make_mesh())
    assert type(experiment.network).__name__ == "Net" and experiment.network.width == 8
    assert (experiment.train.source.name, len(experiment.train.source)) == ("squares", 64)
    rates = [float(experiment.learning_rate(step)) for step in (0, 10**6)]
    assert rates == pytest.approx([0.1, 0.025])
    assert "things:momentum, weight decay 0.1 (decoupled)" in experiment.parameter_groups
    assert set(user_code.names(own_config).values()) == {
        *(f"things:{name}" for name in ("Net", "Squares", "power", "momentum", "root")),
        *(f"things:{name}" for name in ("darker", "Brighter")),
    }


def test_own_network_is_tried_before_training(write, own_config):
    write("wrong", WRONG)
    own_config.model = {"name": "wrong:Flat", "dtype": "auto"}
    with pytest.raises(ConfigError, match="the network Flat must give float logits"):
        build.make_experiment(own_config, sharding.make_mesh())


def test_network_may_be_made_by_a_function_without_dtype_and_name(things):
    module = models.build("things:net", num_classes=3, dtype=jnp.bfloat16, width=2)
    assert (module.num_classes, module.width) == (3, 2)


def test_source_is_given_the_folder_of_the_data_only_if_it_takes_it(things):
    assert data.open_source("things:Squares", "train", data_dir="/x").folder == "/x"


def test_augmentations_of_both_forms_change_the_images(things):
    specs = [{"name": "things:darker", "share": 0.25}, {"name": "things:Brighter", "by": 7}]
    pipeline = augment.build(specs, mean=(0.0,), std=(1.0,))
    batch = {"image": jnp.full((2, 4, 4, 1), 100, jnp.uint8), "label": jnp.zeros((2, 3))}
    result = pipeline(jax.random.key(0), batch)["image"]
    np.testing.assert_allclose(result, np.full((2, 4, 4, 1), 32 / 255), rtol=1e-6)
    with pytest.raises(ConfigError, match="`Brighter` needs images in .* before `normalize`"):
        augment.check([{"name": "normalize"}, {"name": "things:Brighter"}])


def test_loss_has_its_options_smoothing_and_weights(things):
    logits, targets = jnp.asarray([[1.0, -1.0]]), jnp.asarray([[0.0, 1.0]])
    own = losses.build("things:power", power=2.0, class_weights=(1.0, 3.0), label_smoothing=0.2)
    plain = losses.build("softmax_cross_entropy", label_smoothing=0.2)
    (loss,), (weight,) = own(logits, targets)
    assert loss == pytest.approx(plain(logits, targets)[0][0] ** 2) and weight == 3


@pytest.mark.parametrize(
    "name, meant", [("power", "softmax_cross_entropy"), ("each_class", "sigmoid_cross_entropy")]
)
def test_loss_says_how_its_networks_outputs_are_read(things, name, meant):
    logits, targets = jnp.asarray([[1.0, -1.0, 0.5]]), jnp.asarray([[0.0, 1.0, 0.0]])
    own, same = (
        losses.LossSpec(f"things:{name}", None, {}).likelihood,
        losses.LossSpec(meant, None, {}).likelihood,
    )
    np.testing.assert_array_equal(own(logits, targets)[0], same(logits, targets)[0])
    assert losses.LossSpec(f"things:{name}", None, {}).objective(None) is not None
    network = models.build("things:Net", num_classes=3)
    images = np.full((2, 8, 8, 1), 9, np.uint8)
    variables = network.init(jax.random.key(0), images, train=False)
    forwards = [make_forward(network, loss, (0.1,), (0.2,)) for loss in (f"things:{name}", meant)]
    predictions, expected = (forward(variables, images) for forward in forwards)
    np.testing.assert_array_equal(predictions.probabilities, expected.probabilities)
    kernel = variables["params"]["Dense_1"]["kernel"]  # of the last layer, here with no bias
    np.testing.assert_allclose(predictions.features @ kernel, predictions.logits, rtol=1e-4)


def test_features_are_the_logits_where_no_layer_is_a_dense_one(write):
    write(
        "convs",
        "import flax.linen as nn\n\nclass Net(nn.Module):\n    num_classes: int\n    @nn.compact\n"
        "    def __call__(self, x, train):\n"
        "        return nn.Conv(self.num_classes, (8, 8), padding='VALID')(x)[:, 0, 0]\n",
    )
    network = models.build("convs:Net", num_classes=3)
    images = np.full((2, 8, 8, 1), 9, np.uint8)
    variables = network.init(jax.random.key(0), images, train=False)
    predictions = make_forward(network, "focal", (0.1,), (0.2,))(variables, images)
    np.testing.assert_array_equal(predictions.features, predictions.logits)


@pytest.mark.parametrize(
    "section, option, sentence",
    [
        ("model", "widht", r"config.model.widht is not used by things:Net, did you mean 'width'"),
        ("data", "cuont", "config.data.cuont is not used by things:Squares, did you mean 'count'"),
        ("loss", "powr", "config.loss.powr is not used by things:power, did you mean 'power'"),
        ("loss", "logits", "config.loss.logits is not used by things:power"),
        ("optimizer", "bta", "config.optimizer.bta is not used by things:momentum, .* 'beta'"),
        ("schedule", "finl", "config.schedule.finl is not used by things:root, .* 'final'"),
    ],
)
def test_misspelt_option_of_ones_own_is_refused(own_config, section, option, sentence):
    own_config[section][option] = 1
    with pytest.raises(ConfigError, match=sentence):
        accepted.check(own_config)


def test_option_of_ones_own_augmentation_is_checked(things):
    with pytest.raises(ConfigError, match="shar is not used by things:darker, did you mean 'shar"):
        augment.check([{"name": "things:darker", "shar": 1}])
    with pytest.raises(ConfigError, match=r"config.augment\[0\].share must be float at least 0 an"):
        augment.check([{"name": "things:darker", "share": 2.0}])


def test_types_and_ranges_are_checked_by_the_annotations(things):
    with pytest.raises(ConfigError, match="config.model.width must be int at least 1 for things:N"):
        models.build("things:Net", num_classes=2, width=0)
    losses.build("things:power", unread="anything", shape=(1, 2))  # annotated with no plain type
    with pytest.raises(ConfigError, match="config.loss.power must be float for things:power, got"):
        losses.build("things:power", power="two")


WRONG = """
import flax.linen as nn
import jax.numpy as jnp
import optax
from flaxcls.data.source import Example, Source

def needs(logits, targets, /, *, gamma):
    return logits[:, 0]

def mean(logits, targets):
    return jnp.mean(logits)

def strange(logits, targets):
    return logits[:, 0]

strange.evaluated_as = "softmax"

def fails(logits, targets):
    return logits @ nonsense

def one(context):
    return optax.trace(0.9)

def numbers(context):
    return [0.9]

def without_decay(context):
    return [optax.trace(0.9)]

def fails_later(context):
    def update(updates, state, params=None):
        return updates + 1, state
    return [optax.GradientTransformation(lambda params: optax.EmptyState(), update)]

def number(run):
    return 0.5

def pair(run):
    return lambda step: jnp.stack([step, step])

def smaller(key, batch):
    return {**batch, "image": batch["image"][:, 1:]}

def nothing(key, batch):
    batch["image"] = batch["image"] + 1

class Other:
    pass

class NoNumber(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x

class NoTrain(nn.Module):
    num_classes: int
    def __call__(self, x):
        return x

def not_a_module(num_classes):
    return num_classes

class Flat(nn.Module):
    num_classes: int
    def __call__(self, x, train):
        return x.reshape(-1)

class Fails(nn.Module):
    num_classes: int
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(self.num_classes)(x.reshape(3, 5))

class Cached(nn.Module):
    num_classes: int
    @nn.compact
    def __call__(self, x, train):
        self.variable("cache", "seen", lambda: jnp.zeros(()))
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))

def no_source(split):
    return [1, 2]

class Empty(Source):
    def __init__(self, split):
        super().__init__(name="e", split=split, class_names="ab", image_shape=(2, 2, 1),
                         fingerprint="")
    def __len__(self):
        return 0

class Pairs(Empty):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return jnp.zeros((2, 2, 1)), 0

class Floats(Pairs):
    def __getitem__(self, index):
        return Example(jnp.zeros((2, 2, 1)), 0)

class Labels(Pairs):
    def __getitem__(self, index):
        return Example(b"", 2)

class Lost(Pairs):
    def __getitem__(self, index):
        raise OSError("no disk")
"""
LOGITS = jax.ShapeDtypeStruct((2, 3), jnp.float32)


def _loss(name):
    jax.eval_shape(losses.build(name), LOGITS, LOGITS)


def _rule(name):
    shapes = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    optim.build(name, schedule=lambda step: 0.1, params=shapes, weight_decay=0.1)


def _schedule(name):
    schedules.build(name, learning_rate=1, total_steps=9, to_steps=lambda duration: 1)


def _augment(name):
    batch = {"image": jnp.zeros((2, 4, 4, 1), jnp.uint8), "label": jnp.zeros((2, 3))}
    pipeline = augment.build([{"name": name}], mean=(0.0,), std=(1.0,))
    jax.eval_shape(pipeline, jax.random.key(0), batch)


def _model(name):
    models.check_own(models.build(name, num_classes=3), (8, 8, 1))


def _data(name):
    data.open_source(name, "train")


@pytest.mark.parametrize(
    "use, name, sentence",
    [
        (_loss, "absent", r"loss.name is 'wrong:absent', but .*wrong.py defines no absent"),
        (_loss, "maen", "defines no maen, did you mean 'mean'"),
        (_loss, "needs", "config.loss: wrong:needs is missing a required .*argument: 'gamma'"),
        (_loss, "mean", r"wrong:mean must give a loss for each example, of shape \(2,\), got \(\)"),
        (_loss, "strange", "strange.evaluated_as is 'softmax', which is not known; known: foc"),
        (_loss, "fails", r"wrong.py, line 19: NameError: name 'nonsense' is not defined"),
        (
            _loss,
            "number",
            r"can't be a loss: that is called as loss\(logits, targets, /, \*, ...\)",
        ),
        (_loss, "jnp", "can't be a loss"),
        (_rule, "one", "wrong:one must return a list of optax transformations, got Gradient"),
        (_rule, "numbers", "wrong:numbers must return optax transformations, got 0.9"),
        (_rule, "without_decay", "weight_decay is not used by wrong:without_decay: its list need"),
        (_rule, "fails_later", "weight_decay is not used"),
        (_schedule, "number", r"must return a function of the step .* got 0.5"),
        (
            _schedule,
            "pair",
            r"must return a function of the step .* got ShapeDtypeStruct\(shape=\(",
        ),
        (
            _schedule,
            "mean",
            "config.schedule: wrong:mean is missing a required argument: 'targets'",
        ),
        (_augment, "smaller", r"wrong:smaller must return the batch .* got .*uint8\[2, 3, 4, 1\]"),
        (_augment, "nothing", "wrong:nothing must return the batch .*, got NoneType"),
        (_augment, "number", r"can't be an augmentation: that is called as augmentation\(key, ba"),
        (
            _augment,
            "Other",
            "must be a function .* or a class of .*Augmentation, got a class of ob",
        ),
        (_model, "NoNumber", r"can't be a network: that is called as network\(\*, num_classes"),
        (_model, "NoTrain", "the network wrong:NoTrain must be called as .* no argument `train`"),
        (_model, "not_a_module", "must be a flax.linen Module with the field `num_classes`, got 3"),
        (_model, "Flat", r"the network Flat must give float logits of shape \(2, 3\) for images"),
        (_model, "Fails", r"wrong.py, line 72: TypeError: cannot reshape"),
        (_model, "Cached", "the network Cached has variables in cache, but only those in params"),
        (_data, "no_source", "must give a flaxcls.data.source.Source, got list"),
        (_data, "Empty", "split 'train' of wrong:Empty has no examples"),
        (_data, "Pairs", "examples of wrong:Pairs must be flaxcls.data.source.Example"),
        (_data, "Floats", r"an image uint8 \(2, 2, 1\) or encoded bytes .*got an image float32"),
        (_data, "Labels", "a label below 2, got b'' and label 2 for number 0"),
        (_data, "Lost", r"wrong.py, line 107: OSError: no disk"),
        (_data, "number", "must give a flaxcls.data.source.Source, got float"),
    ],
)
def test_what_can_not_be_is_told_in_a_sentence(write, use, name, sentence):
    write("wrong", WRONG)
    with pytest.raises(ConfigError, match=sentence):
        use(f"wrong:{name}")


def test_error_in_the_update_of_ones_own_rule_is_told_by_its_line(write):
    write("wrong", WRONG.replace("return [optax.Grad", "return [context.decoupled, optax.Grad"))
    with pytest.raises(ConfigError, match=r"wrong.py, line 32: TypeError: unsupported operand"):
        _rule("wrong:fails_later")


def test_missing_module_is_told_with_the_closest_one(things):
    with pytest.raises(ConfigError) as error:
        models.options("thing:Net")
    expected = "config.model.name is 'thing:Net', but there is no module thing beside the recipe"
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith("or installed, did you mean 'things'?")
    with pytest.raises(ConfigError, match="there is no module things.nets beside"):
        models.options("things.nets:Net")
    with pytest.raises(ConfigError, match="in a module, where others than this program find it"):
        models.options("__main__:Net")


def test_import_that_fails_is_told_by_file_and_line(write):
    write("broken", "x = 1\n\ny = x / 0\n")
    with pytest.raises(ConfigError, match=r"broken.py, line 3: ZeroDivisionError: division by ze"):
        models.options("broken:Net")
    write("typo", "def f(:\n")
    with pytest.raises(ConfigError, match=r"typo.py, line 1: invalid syntax"):
        models.options("typo:Net")
    write("needy", "import math\nimport nowhere_to_be_found\n")
    with pytest.raises(ConfigError, match=r"needy.py, line 2: ModuleNotFoundError: No module nam"):
        models.options("needy:Net")
    write("pack/__init__", "")
    write("pack/inner", "import os\nfrom pack.helper import f\nf()\n")
    write("pack/helper", "def f():\n    raise KeyError('k')\n")
    with pytest.raises(ConfigError, match=r"pack/helper.py, line 2: KeyError: k"):
        models.options("pack.inner:Net")
    write("ends", "import sys\nsys.exit(3)\n")
    with pytest.raises(ConfigError, match=r"ends.py ends the program, by SystemExit\(3\)"):
        models.options("ends:Net")


def test_crops_can_not_be_ones_own(things):
    with pytest.raises(ConfigError, match="config.crop.name is 'things:Net', which is not known"):
        options.look_up("config.crop.name", "things:Net", {"resize": None})


def test_recipes_folder_is_searched_first_and_flaxcls_own_is_not(write, tmp_path, monkeypatch):
    path = write("tiny", "from flaxcls.config import default as get_config\n")
    sys.path.remove(str(tmp_path))
    (tmp_path / "json_things.py").write_text("")
    recipes.load_recipe(str(path))
    recipes.load_recipe(str(path))
    assert sys.path[0] == str(tmp_path) and sys.path.count(str(tmp_path)) == 1
    before = sys.path[:]
    recipes.load_recipe("configs/digits_mlp.py")
    assert sys.path == before


def test_recipe_may_hold_what_it_names(write):
    path = write("one_file", THINGS + "\n\nfrom flaxcls.config import default as get_config\n")
    config = recipes.load_recipe(str(path), ["model.name=one_file:Net", "model.width=3"]).config
    accepted.check(recipes.load_recipe(str(path), ["loss.name=one_file:power"]).config)
    assert models.build(config.model.name, num_classes=2, width=3).width == 3


def test_recipe_may_import_what_is_beside_it_and_errors_there_are_told(write):
    write("helper", "def widths():\n    return 1 / 0\n")
    text = "from helper import widths\n\ndef get_config():\n    return widths()\n"
    path = write("importing", text)
    with pytest.raises(ConfigError, match=r"helper.py, line 2: ZeroDivisionError"):
        recipes.load_recipe(str(path))
