"""Every option is reachable from the config, every field is of use, and every recipe fits."""

import math
from pathlib import Path

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import augment, build, cli, models
from flaxcls import config as configs
from flaxcls.config import durations, fields
from flaxcls.core.step import make_init, make_train_step
from flaxcls.data.pipeline import Sizes
from flaxcls.errors import ConfigError
from flaxcls.files import write_json
from flaxcls.runs import run_folder
from flaxcls.runtime import sharding

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("data.helt_out", "config.data.helt_out is not used by folder, did you mean 'held_out'?"),
        ("crop.ratoi", "config.crop.ratoi is not used by center_crop, did you mean 'ratio'?"),
        ("model.widht", "config.model.widht is not used by wrn, did you mean 'width'?"),
        ("model.dtpye", "config.model.dtpye is not used by wrn, did you mean 'dtype'?"),
        ("loss.gamma", "config.loss.gamma is not used by softmax_cross_entropy; known: "),
        ("optimizer.momentun", "config.optimizer.momentun is not used by sgd, did you mean "),
        ("optimizer.lerning_rate", "is not used by sgd, did you mean 'learning_rate'?"),
        (
            "schedule.worm_up",
            "schedule.worm_up is not used by cosine, did you mean 'warmup'?",
        ),
        ("eval.crop.area", "config.eval.crop.area is not used by pad; known: antialias, fill"),
    ],
)
def test_option_that_nothing_takes_is_refused_with_the_closest_one(field, sentence):
    config = configs.default()
    config.data.name, config.crop.name, config.model.name = "folder", "center_crop", "wrn"
    config.eval.crop.name = "pad"
    fields.update(config, {field: 3})
    with pytest.raises(ConfigError) as error:
        build.check(config)
    assert sentence in str(error.value)
    fields.update(config, {field: None})  # as the configs of old runs have it
    build.check(config)


def test_default_is_locked_and_typed():
    config = configs.default()
    with pytest.raises(AttributeError):
        config.bath_size = 3
    with pytest.raises(AttributeError):
        config.eval.evry = "1 epochs"
    with pytest.raises(TypeError):
        config.batch_size = "3"


def test_config_survives_json(tiny_config):
    config = tiny_config(augment=({"name": "pad_crop", "padding": 1},))
    plain = fields.plain(config)
    assert plain["model"]["widths"] == [16] and plain["augment"][0]["name"] == "pad_crop"


# The data of the recipes, as they are known: no recipe's test reads them.
SHAPES = {
    "digits": ((8, 8, 1), 10, 1437),
    "cifar10": ((32, 32, 3), 10, 50_000),
    "imagenet2012": ((224, 224, 3), 1000, 100_000),
    "idx": ((28, 28, 1), 10, 60_000),
}


@pytest.fixture
def pictures(tmp_path):
    """A folder of three classes, ten pictures each."""
    for number in range(30):
        path = tmp_path / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full((70 + number, 90, 3), number, np.uint8))
    return tmp_path


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_recipe_builds_and_fits_together(path, pictures):
    adapts = path.stem == "folder"  # to the pictures, which must be there
    config = cli.load_config(str(path), [f"data.path={pictures}"] if adapts else [])
    if not adapts:
        shape, num_classes, num_examples = SHAPES[config.data.name]
        config.data.image_shape, config.data.num_classes = shape, num_classes
        config.data.num_examples, config.data.path, config.data.name = num_examples, None, "fake"
        config.data.train_split, config.data.eval_split = "train", "test"
    build.check(config)
    experiment = build.make_experiment(config, sharding.make_mesh())
    assert experiment.length.total_steps > 0 and experiment.parameter_groups
    augment.check(config.augment or ())
    assert all(
        experiment.learning_rate(step) >= 0 for step in (0, experiment.length.total_steps - 1)
    )

    num_classes = len(experiment.train.source.class_names)
    shape = experiment.train.image_shape()
    init = make_init(experiment.network, experiment.optimizer, num_classes=num_classes, ema=True)
    step = make_train_step(
        experiment.network,
        build.loss(config, num_classes).with_weights(None),
        experiment.optimizer,
        augment.build(config.augment or (), mean=(0.5,) * shape[-1], std=(0.25,) * shape[-1]),
        num_classes=num_classes,
        ema_decay=0.9,
        gradient_accumulation=config.gradient_accumulation,
        max_grad_norm=1e4,
        platform="cpu",
    )
    key = jax.random.key_data(jax.random.key(0))
    size = config.batch_size
    images = jax.ShapeDtypeStruct((size, *shape), jnp.uint8)
    number = jax.ShapeDtypeStruct((size,), jnp.int32)
    batch = {"image": images, "label": number, "index": number, "epoch": number}
    sample = jax.ShapeDtypeStruct((min(size, 500), *shape), jnp.float32)
    state = jax.eval_shape(init, key, sample)
    assert jax.eval_shape(step, state, batch) == state  # nothing changes its shape or dtype


def test_run_made_before_a_field_existed_has_its_default(tmp_path, tiny_config):
    config = tiny_config()
    saved = fields.plain(config)
    del saved["image_size"], saved["crop"], saved["input"]["max_broken"]
    write_json(tmp_path / "config.json", {"config": saved})
    assert fields.plain(run_folder.load_config(tmp_path)) == fields.plain(config)
    before, finished = run_folder.claim(tmp_path, config)
    assert fields.changes(before, config) == {} and finished is None


def test_small_part_of_a_short_run_is_at_least_a_step(tiny_config):
    experiment = build.make_experiment(tiny_config(eval__every="1%"), sharding.make_mesh())
    assert experiment.eval_every == durations.Duration(1, "steps")
    with pytest.raises(ConfigError, match="config.eval.every must be at least a step"):
        build.make_experiment(tiny_config(eval__every="0.01 epochs"), sharding.make_mesh())


def notes_of(config):
    return build.make_experiment(config, sharding.make_mesh()).notes


def test_warmup_longer_than_the_run_is_shortened_and_said(tiny_config):
    (note,) = notes_of(tiny_config(schedule__warmup="5 epochs", duration="4 steps"))
    assert note == "config.schedule.warmup = '5 epochs' is shortened to 4 of the run's 4 steps"
    assert not notes_of(tiny_config(schedule__warmup="2 steps"))


@pytest.mark.parametrize(
    ("train", "evaluation", "both", "of"),
    [
        ("train", "train", 96, 96),
        ("train[:90%]", "train[80%:]", 9, 19),
        ("train+test", "test[:10]", 10, 10),
        ("train[:50%]", "train[50%:]", 0, 0),
        ("train, all but fold 2 of 3", "train, fold 2 of 3", 0, 0),
        ("train+test, all but fold 2 of 3", "train+test, fold 2 of 3", 0, 0),
        ("train", "train, fold 2 of 3", 32, 32),
        ("train, fold 0 of 3", "train[:50%], all but fold 0 of 4, fold 1 of 2", 9, 18),
    ],
)
def test_evaluating_on_what_is_trained_on_is_said(tiny_config, train, evaluation, both, of):
    notes = notes_of(tiny_config(data__train_split=train, data__eval_split=evaluation))
    assert len(notes) == (both > 0)
    if both:
        assert f"{both} of the {of} images to evaluate on are trained on as well" in notes[0]


def test_enlarging_pictures_many_times_is_said(tiny_config):
    (note,) = notes_of(tiny_config(image_size=100))
    assert "config.image_size = 100 enlarges pictures of 8 pixels 12 times" in note
    assert not notes_of(tiny_config(image_size=32))


@pytest.mark.parametrize(
    ("grey", "channels", "said"), [(True, 3, True), (True, 1, False), (False, 3, False)]
)
def test_grey_pictures_in_three_channels_are_said(tiny_config, tmp_path, grey, channels, said):
    for index in range(8):
        path = tmp_path / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8) if grey else (8, 8, 3), 100 + index, np.uint8)
        cv2.imwrite(str(path), pixels)
    config = tiny_config(
        data__name="folder",
        data__path=str(tmp_path),
        data__train_split="train",
        data__eval_split="train",
        data__channels=channels,
        data__image_shape=None,
        data__num_classes=None,
        data__num_examples=None,
        batch_size=8,
        image_size=8,
        crop__name="resize",
    )
    notes = [note for note in notes_of(config) if "grey" in note]
    assert len(notes) == said
    assert not said or "--config.data.channels=1 reads one" in notes[0]


def test_groups_of_batch_norm_that_change_nothing_or_make_devices_wait_are_reported(tiny_config):
    def notes(group, name="digits_cnn", **changes):
        changes = {"model__name": name, "model__batch_norm_group": group, **changes}
        return notes_of(tiny_config(batch_size=64, model__widths=None, **changes))  # 8 a device

    assert not notes(8) and not notes(4) and not notes(None) and not notes("global")
    (note,) = notes(16)
    assert note.startswith(
        "config.model.batch_norm_group = 16 does not divide the 8 examples that a device computes"
    )
    (note,) = notes(8, gradient_accumulation=2)
    assert "the 4 examples that a device computes at a time" in note
    (note,) = notes(8, "dense")
    assert note.endswith("= 8 changes nothing: dense has no BatchNorm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 1000, "duration": "1 epochs"},
            "config.batch_size = 1,000 is larger than the training split, which has 96 examples",
        ),
        ({"duration": "1e12 epochs"}, "config.duration must be at most 2,147,483,647 steps, got"),
        ({"duration": "1e300 epochs"}, "config.duration must be at most 2,147,483,647 steps, got"),
        ({"duration": "0 steps"}, "config.duration must be at least a step, got '0 steps'"),
        (
            {"divergence__within": "0 steps"},
            "config.divergence.within must be at least a step, got '0 steps'",
        ),
        ({"divergence__within": "1 hours"}, "config.divergence.within: '1 hours' is a time; here"),
    ],
)
def test_impossible_length_is_told_with_what_makes_it_so(tiny_config, changes, message):
    with pytest.raises(ConfigError) as raised:
        build.make_experiment(tiny_config(**changes), sharding.make_mesh())
    assert message in str(raised.value) and len(str(raised.value)) < 200


RECIPES = sorted(path for path in Path("configs").glob("*.py") if path.stem != "folder")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_smoke_test_of_one_step_is_a_plan_with_every_recipe(recipe):
    config = cli.load_config(str(recipe), ["duration=1 steps"])
    if config.data.name not in ("digits",):
        size = 224 if config.image_size else 32
        grey = config.data.name == "idx"
        for field in ("path", "dir"):
            config.data[field] = None
        config.data.name, config.data.eval_split = "fake", "test"
        config.data.image_shape, config.data.num_classes = (size, size, 1 if grey else 3), 10
        config.data.num_examples = 100_000
    build.check(config)
    assert build.make_experiment(config, sharding.make_mesh()).length.total_steps == 1


def test_way_to_the_peak_and_sizes_beyond_the_run_are_cut_off(tiny_config):
    config = tiny_config(
        model__name="cifar_resnet20", model__widths=None,
        schedule__name="one_cycle", schedule__peak="3 epochs", schedule__cooldown="4 steps",
        image_size=(("0 epochs", 8), ("10 steps", 12), ("12 steps", 16), ("9 epochs", 24)),
    )  # fmt: skip
    experiment = build.make_experiment(config, sharding.make_mesh())
    shortened = "config.schedule.peak = '3 epochs' is shortened to the run's 12 steps"
    assert experiment.notes[0] == shortened
    assert experiment.train.sizes == Sizes((0, 10), (8, 12))
    config.duration = "1 steps"
    assert build.make_experiment(config, sharding.make_mesh()).train.sizes == Sizes((0,), (8,))
    config.schedule.name, config.schedule.peak = "exponential", None
    config.schedule.every = "5%"
    assert build.make_experiment(config, sharding.make_mesh()).learning_rate(0) == pytest.approx(
        0.1
    )


class NoTrain(nn.Module):
    num_classes: int
    dtype: jnp.dtype

    def __call__(self, x):
        return x


def test_network_without_the_argument_train_is_told(monkeypatch, tiny_config):
    monkeypatch.setitem(models.MODELS, "own", NoTrain)
    with pytest.raises(ConfigError, match="the network own .* has no argument `train`"):
        build.make_experiment(
            tiny_config(model__name="own", model__widths=None), sharding.make_mesh()
        )


# What the sources of recipes say, in their words: the training commands of DeiT III and ConvNeXt
# with the defaults that they leave, table 2 of "ResNet strikes back", and big_vision's config.
SOURCES = {
    "imagenet_deit3_s16": """
        batch 256 x 8, lr 4e-3, epochs 800, weight-decay 0.05, input-size 224, eval-crop-ratio 1.0,
        reprob 0.0, smoothing 0.0, warmup-epochs 5, opt fusedlamb, opt-eps 1e-8, max-grad-norm 1.0,
        mixup .8, drop-path 0.05, cutmix 1.0, repeats 3, bce, color-jitter 0.3, min-lr 1e-5""",
    "imagenet_convnext_tiny": """
        batch 4096 x 1, lr 4e-3, epochs 300, weight-decay 0.05, input-size 224,
        eval-crop-ratio 0.875, reprob 0.25, smoothing 0.1, warmup-epochs 20, opt adamw,
        opt-eps 1e-8, mixup 0.8, drop-path 0.1, cutmix 1.0, repeats 1, aa-magnitude 9,
        model-ema-decay 0.9999, min-lr 1e-6""",
    "imagenet_resnet50_a1": """
        batch 2048 x 1, lr 5e-3, epochs 600, weight-decay 0.01, input-size 224,
        eval-crop-ratio 0.95, reprob 0.0, smoothing 0.1, warmup-epochs 5, opt lamb, opt-eps 1e-6,
        max-grad-norm 1.0, mixup 0.2, drop-path 0.05, cutmix 1.0, repeats 3, bce, aa-magnitude 7,
        min-lr 1e-6""",
    "imagenet_resnet50_a3": """
        batch 2048 x 1, lr 8e-3, epochs 100, weight-decay 0.02, input-size 160,
        eval-crop-ratio 0.95, reprob 0.0, smoothing 0.0, warmup-epochs 5, opt lamb, opt-eps 1e-6,
        max-grad-norm 1.0, mixup 0.1, drop-path 0.0, cutmix 1.0, repeats 1, bce, aa-magnitude 6,
        min-lr 1e-6""",
}


def fields_of(config):
    """What a recipe sets, in the words of SOURCES, with the defaults of what it names."""
    used = {spec["name"]: spec for spec in config.augment}
    optimizer, model = config.optimizer, config.model
    eps = {"lamb": 1e-6, "adamw": 1e-8}[optimizer.name]
    return {
        "batch": config.batch_size,
        "lr": optimizer.learning_rate,
        "epochs": float(config.duration.removesuffix(" epochs")),
        "weight-decay": optimizer.weight_decay,
        "input-size": config.image_size,
        "eval-crop-ratio": config.eval.crop.ratio,
        "reprob": used.get("random_erasing", {"probability": 0.0})["probability"],
        "smoothing": config.loss.label_smoothing,
        "warmup-epochs": float(config.schedule.warmup.removesuffix(" epochs")),
        "opt": optimizer.name,
        "opt-eps": optimizer.get("eps", eps),
        "max-grad-norm": optimizer.get("gradient_clip_norm"),
        "mixup": used["mix"]["mixup_alpha"],
        "drop-path": model.get("drop_path", 0.0),
        "cutmix": used["mix"]["cutmix_alpha"],
        "repeats": config.repeats,
        "bce": config.loss.name == "sigmoid_cross_entropy" or None,
        "aa-magnitude": used.get("rand_augment", {}).get("magnitude"),
        "color-jitter": used.get("color_jitter", {}).get("saturation"),
        "model-ema-decay": config.ema_decay,
        "min-lr": pytest.approx(config.schedule.final * optimizer.learning_rate),
    }


@pytest.mark.parametrize("recipe", SOURCES)
def test_recipe_has_the_fields_of_its_source(recipe):
    def read(text):
        name, _, value = text.strip().partition(" ")
        if not value:
            return name, True
        if name == "opt":
            return name, value.removeprefix("fused")
        return name, math.prod(map(float, value.split(" x ")))

    expected = dict(map(read, SOURCES[recipe].split(",")))
    fields = fields_of(cli.load_config(recipe, []))
    assert {name: value for name, value in fields.items() if value is not None} == expected


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/imagenet_resnet*.py")), ids=str)
def test_figures_of_pillow_come_with_an_evaluation_by_pillow(path):
    config = cli.load_config(str(path), [])
    antialias = config.eval.crop.get("antialias")
    assert config.crop.get("antialias", True) if antialias is None else antialias
