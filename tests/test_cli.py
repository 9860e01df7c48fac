import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flaxcls import cli
from flaxcls.build.adapt import adapt
from flaxcls.config import recipes
from flaxcls.errors import ConfigError


def load(recipe, *overrides):
    return cli.load_config(str(recipe), overrides)


def test_help_answers_at_once_and_imports_no_jax(run_main):
    for module in ("flaxcls.main", "flaxcls.evaluate"):
        result = run_main("--help", module=module)
        assert result.returncode == 0 and not result.stderr
        assert f"python -m {module}" in result.stdout
        assert result.seconds < 3
    code = "import sys, flaxcls, flaxcls.main; sys.exit('jax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(cli.__file__).parents[1]).returncode
        == 0
    )


def test_import_of_the_package_is_fast():
    code = """if True:
        import sys
        before = {*sys.modules}
        import flaxcls
        new = {name.partition(".")[0] for name in {*sys.modules} - before}
        print(*new - {*sys.stdlib_module_names})
    """
    began = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(cli.__file__).parents[1], stdout=subprocess.PIPE
    )
    assert time.perf_counter() - began < 1.5
    assert (result.returncode, result.stdout) == (0, b"flaxcls\n")


def test_overrides_are_read_as_the_type_of_their_field(recipe):
    config = load(
        recipe,
        "batch_size=64",
        "optimizer.learning_rate=1",
        "optimizer.weight_decay=5e-4",
        "optimizer.nesterov=true",
        "ema_decay=0.9",
        "duration=3 epochs",
        "data.train_split=train[:50%]",
        "data.dir=None",
        "model.widths=(8, 9)",
        "model.activation=tanh",
        'augment=({"name": "flip"},)',
    )
    assert config.batch_size == 64
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.optimizer.weight_decay == 5e-4
    assert config.optimizer.nesterov is True
    assert config.ema_decay == 0.9
    assert config.duration == "3 epochs"
    assert config.data.train_split == "train[:50%]"
    assert config.data.dir is None
    assert config.model.widths == (8, 9)
    assert config.model.activation == "tanh"
    assert config.augment == ({"name": "flip"},)


def test_last_override_of_a_field_counts(recipe):
    assert load(recipe, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bath_size=3", "config.bath_size is not a config field, did you mean 'batch_size'?"),
        ("modell.width=3", "config.modell.width is not a config field, did you mean 'model'?"),
        ("seed.x=3", "config.seed.x is not a config field: config.seed has none"),
        (
            "model=dense",
            "config.model is a section; its fields are batch_norm_group, dtype, name, widths",
        ),
        ("batch_size=12.5", "config.batch_size must be int, got '12.5'"),
        ("batch_size=True", "config.batch_size must be int, got 'True'"),
        ("batch_size=many", "config.batch_size must be int, got 'many'"),
        ("seed", "--config.seed needs a value, as in --config.seed=VALUE"),
    ],
)
def test_wrong_override_is_reported_in_one_sentence(recipe, override, message):
    with pytest.raises(ConfigError) as error:
        load(recipe, override)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "line 1: invalid syntax"),
        (
            "\n\ndef get_config():\n    return 1 / 0\n",
            "line 4: ZeroDivisionError: division by zero",
        ),
        ("import nothing_of_that_name\n", "line 1: ModuleNotFoundError: No module named"),
        ("import sys\nsys.exit(0)\n", "wrong.py ends the program, by SystemExit(0)"),
        ("x = 1\n", "must define get_config()"),
        ("def get_config():\n    return 3\n", "must define get_config()"),
        (
            "from flaxcls.config import default\n\n\ndef get_config():\n    config = default()\n"
            "    config.bath_size = 3\n    return config\n",
            "line 6: 'bath_size' is not a config field, did you mean 'batch_size'?",
        ),
        (
            "from flaxcls.config import default\n\n\ndef get_config():\n    config = default()\n"
            "    config.batch_size = '3'\n    return config\n",
            "line 6: TypeError: Could not override field 'batch_size'",
        ),
    ],
)
def test_wrong_recipe_is_reported_in_one_sentence_with_its_line(tmp_path, text, message):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300


def test_missing_recipe_is_reported_with_the_closest_one(recipe):
    with pytest.raises(
        ConfigError, match=r"no config file .*/tinny\.py, did you mean '.*/tiny\.py'"
    ):
        load(recipe.with_name("tinny.py"))


def test_error_becomes_one_line_and_its_exit_code(monkeypatch, capsys):
    def fails(argv):
        raise ConfigError("the sentence")

    with pytest.raises(SystemExit) as stop:
        cli.run(fails)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "flaxcls: the sentence\n"


def test_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    for name in ("digits_cnn", "digits_cnn.py", "configs/digits_cnn"):
        assert load(name).model.name == "digits_cnn"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/own.py").write_text(RECIPE_OF_THE_USER)
    monkeypatch.chdir(tmp_path)
    assert load("own").batch_size == 77
    assert load("digits_cnn").model.name == "digits_cnn"  # also from elsewhere
    with pytest.raises(ConfigError, match="no config file digits_cn, did you mean 'digits_cnn'?"):
        load("digits_cn")
    with pytest.raises(ConfigError, match="configs is a folder; it must be a recipe"):
        load("configs")


RECIPE_OF_THE_USER = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 77
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.schedule.name = "step"
    config.schedule.boundaries = ("50%",)
    config.model.name = "dense"
    config.model.widths = (3,)
    return config
"""


def test_options_of_what_the_user_replaces_are_dropped_and_said(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE_OF_THE_USER)
    recipe = recipes.load_recipe(
        str(path), ["optimizer.name=adamw", "schedule.name=cosine", "model.name=resnet18"]
    )
    said = adapt(recipe)
    assert "config.optimizer.name = 'adamw' takes no momentum: what the recipe" in said
    assert "config.schedule.name = 'cosine' takes no boundaries" in said
    assert "config.model.name = 'resnet18' takes no widths" in said
    assert "momentum" not in recipe.config.optimizer
    assert "boundaries" not in recipe.config.schedule

    with pytest.raises(ConfigError, match="config.optimizer.momentum is not used by adamw"):
        load(path, "optimizer.name=adamw", "optimizer.momentum=0.5")
    recipe = recipes.load_recipe(str(path), ["optimizer.name=lars"])
    assert "momentum" not in adapt(recipe) and recipe.config.optimizer.momentum == 0.9
    recipe = recipes.load_recipe(str(path), ["batch_size=3"])
    assert adapt(recipe) == ""
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        load(path, "optimizer.name=admw")


def test_option_that_a_recipe_misspells_is_found_in_it(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE_OF_THE_USER.replace("config.model.widths", "config.model.widhts"))
    line = path.read_text().splitlines().index("    config.model.widhts = (3,)") + 1
    sentence = f"{path}, line {line}: config.model.widhts is not used by "
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load(path)
    with pytest.raises(ConfigError, match="^config.model.widht is not used by "):
        load(path, "model.widhts=None", "model.widht=3")


@pytest.mark.parametrize("flag", ["workdir", "run"])
def test_folder_in_another_cloud_is_refused(flag):
    with pytest.raises(ConfigError, match=f"--{flag}=az://b/r must be a folder, gs://BUCKET"):
        cli.folder(flag, "az://b/r")
    assert cli.folder(flag, "a/b") == Path("a/b")
