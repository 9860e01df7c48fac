"""The user's own code in a run's folder: what is kept of it, and when it is used."""

import importlib
import json
import shutil
import sys

import pytest
from ml_collections import ConfigDict

from flaxcls.config import fields
from flaxcls.errors import ConfigError
from flaxcls.inference.evaluator import evaluate_run
from flaxcls.runs import run_code, run_folder
from flaxcls.training.train import train_config as train

NET = """
import flax.linen as nn
from .parts import Head
from . import __name__ as _
import other.deep.sizes, flaxcls.models, os.path


class Net(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train):
        from lazy import flat
        return Head(self.num_classes, name="head")(flat(images))
"""
PARTS = "import flax.linen as nn\n\n\nclass Head(nn.Dense):\n    pass\n"
FILES = {
    "pack/__init__.py": "",
    "pack/net.py": NET,
    "pack/parts.py": PARTS,
    "pack/unused.py": "",
    "other/deep/sizes.py": "",
    "lazy.py": "def flat(x):\n    return x.reshape(len(x), -1)\n",
    "unrelated.py": "",
    "flaxcls/models/__init__.py": "",  # beside the recipe lies another checkout, which is not used
}
KEPT = ["lazy.py", "other/deep/sizes.py", "pack/__init__.py", "pack/net.py", "pack/parts.py"]


@pytest.fixture
def forget(monkeypatch):
    """Makes the process as new: what it has imported of FILES is forgotten."""
    monkeypatch.setattr(sys, "path", (clean := sys.path[:])[:])

    def forget():
        sys.path[:] = clean
        own = {name.partition("/")[0].removesuffix(".py") for name in FILES} - {"flaxcls"}
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
        importlib.invalidate_caches()

    yield forget
    forget()


@pytest.fixture
def beside(tmp_path, forget):
    """The folder of a recipe, with modules beside it, that is searched."""
    folder = tmp_path / "recipe"
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sys.path.insert(0, str(folder))
    return folder


@pytest.fixture
def config(tiny_config, beside):
    config = tiny_config(model__name="pack.net:Net", model__widths=None)
    config.duration = "4 steps"
    config.checkpoint.every = "2 steps"
    return config


def kept(workdir):
    """The files that each of the folders in RUN/code has."""
    return {
        folder.name: {
            path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")
        }
        for folder in (workdir / "code").iterdir()
    }


def test_run_keeps_what_its_names_need_and_nothing_else(tmp_path, config, beside):
    workdir = tmp_path / "run"
    train(config, workdir)
    record = json.loads((workdir / "config.json").read_text())["code"]
    (folder, files) = next(iter(kept(workdir).items()))
    assert sorted(files) == sorted(record["files"]) == KEPT
    assert record["digest"] == folder and record["packages"] == {}
    assert all(files[name] == FILES[name] for name in KEPT)
    assert record["files"]["lazy.py"]["origin"] == str(beside / "lazy.py")
    assert len(record["files"]["lazy.py"]["sha256"]) == 64


def test_run_without_own_code_has_no_folder_for_it(tmp_path, tiny_config):
    train(tiny_config(duration="2 steps"), tmp_path / "run")
    assert not (tmp_path / "run" / "code").exists()
    assert "code" not in json.loads((tmp_path / "run" / "config.json").read_text())


def test_run_is_evaluated_by_its_copy_when_the_recipe_is_gone(tmp_path, config, beside, forget):
    workdir = tmp_path / "run"
    summary = train(config, workdir)
    beside.rename(tmp_path / "moved")
    forget()
    _, _, results = evaluate_run(workdir)
    assert results["eval"] == summary["eval"]
    used = sys.modules["pack.net"].__file__
    assert used.startswith(str(workdir / "code"))
    forget()
    (workdir / "config.json").unlink()  # restored from the checkpoint, and the code found again
    assert evaluate_run(workdir)[2]["eval"] == summary["eval"]


def test_run_is_refused_where_another_module_of_the_name_is_imported(tmp_path, config, beside):
    workdir = tmp_path / "run"
    train(config, workdir)
    evaluate_run(workdir)  # the same source, wherever it was imported from
    (beside / "pack" / "parts.py").write_text(PARTS + "# changed\n")
    with pytest.raises(ConfigError) as error:
        evaluate_run(workdir)
    assert str(error.value).startswith(
        f"the module pack.parts is imported already, from {beside / 'pack' / 'parts.py'}, and is "
        f"another than the run's in {workdir}"
    )


def test_code_that_has_changed_is_noted_and_both_are_kept(tmp_path, config, beside, forget, capsys):
    workdir = tmp_path / "run"
    train(config, workdir)
    first = json.loads((workdir / "config.json").read_text())["code"]
    (beside / "lazy.py").write_text("def flat(x):\n    return -x.reshape(len(x), -1)\n")
    forget()
    sys.path.insert(0, str(beside))
    config.duration = "6 steps"
    train(config, workdir)
    assert (
        "note: lazy.py is not as when the run began: the run resumes with"
        in capsys.readouterr().out
    )
    content = json.loads((workdir / "config.json").read_text())
    now, (change,) = content["code"], content["changes"]
    assert change["code"] == first and now["digest"] != first["digest"]
    assert {name: files["lazy.py"] for name, files in kept(workdir).items()} == {
        first["digest"]: FILES["lazy.py"],
        now["digest"]: (beside / "lazy.py").read_text(),
    }
    train(config, workdir)
    assert "is not as when" not in capsys.readouterr().out


def test_resumed_run_falls_back_to_its_copy(tmp_path, config, beside, forget):
    workdir = tmp_path / "run"
    train(config, workdir)
    record = (workdir / "config.json").read_bytes()
    beside.rename(tmp_path / "moved")
    forget()
    run_code.fall_back(workdir)
    assert sys.path[-1].startswith(str(workdir / "code"))
    config.duration = "6 steps"
    assert train(config, workdir)["step"] == 6
    assert len(kept(workdir)) == 1
    assert json.loads((workdir / "config.json").read_text())["code"]["digest"] in str(record)


def test_copy_that_was_deleted_is_made_again_by_a_resume(tmp_path, config, beside):
    workdir = tmp_path / "run"
    train(config, workdir)
    before = kept(workdir)
    shutil.rmtree(workdir / "code")
    (workdir / "summary.json").unlink()
    train(config, workdir)
    assert kept(workdir) == before


def test_code_of_a_run_that_does_not_name_it_is_not_found(tmp_path, tiny_config, forget):
    workdir = tmp_path / "run"
    train(tiny_config(duration="2 steps"), workdir)
    (workdir / "code" / "0123").mkdir(parents=True)
    (workdir / "code" / "0123" / "evil.py").write_text("raise SystemExit\n")
    run_code.fall_back(workdir)
    evaluate_run(workdir)
    assert not [entry for entry in sys.path if "0123" in entry]


def test_what_is_missing_is_told(tmp_path, config, beside, forget):
    workdir = tmp_path / "run"
    train(config, workdir)
    (workdir / "code").rename(tmp_path / "gone")
    beside.rename(tmp_path / "moved")
    forget()
    with pytest.raises(ConfigError) as error:
        evaluate_run(workdir)
    assert str(error.value) == (
        f"config.model.name of the run in {workdir} is 'pack.net:Net', but {workdir / 'code'} "
        f"holds no module pack; it was {beside / 'pack' / '__init__.py'}"
    )


def test_installed_package_is_known_by_name_and_version(tmp_path, forget):
    workdir = tmp_path / "run"
    config = ConfigDict({"loss": {"name": "rich.text:Text"}, "model": {"name": "dense"}})
    code = run_code.named_by(config)
    version = code.packages["rich"]
    assert code.files == {} and version.startswith("rich ")
    workdir.mkdir()
    record = {**code.record(), "packages": {"nowhere_rich": version}}
    run_folder.write_json(workdir / "config.json", {"code": record})
    config.loss.name = "nowhere_rich.text:Text"
    with pytest.raises(ConfigError, match=f"'nowhere_rich.text:Text', but {version} is not insta"):
        run_code.use(workdir, config)
    assert run_code.keep(workdir, code) is None and not (workdir / "code").exists()


def test_too_much_code_is_not_kept(tmp_path, config, beside, monkeypatch):
    monkeypatch.setattr(run_code, "MAX_BYTES", 100)
    code = run_code.named_by(config)
    note = run_code.keep(tmp_path, code)
    assert "of your own code are not kept in the run's folder" in note
    assert not (tmp_path / "code").exists()


def test_copy_that_was_interrupted_is_made_anew(tmp_path, config):
    code = run_code.named_by(config)
    half = tmp_path / "code" / f".{code.digest}.tmp"
    half.mkdir(parents=True)
    (half / "half.py").write_text("")
    run_code.keep(tmp_path, code)
    assert list(kept(tmp_path)) == [code.digest] and "half.py" not in kept(tmp_path)[code.digest]


def test_processes_must_have_the_same_code(tmp_path, config, beside):
    facts = {"fingerprint": "x"}
    first = run_folder.identity({"config": fields.plain(config), **facts}, "y")
    (beside / "lazy.py").write_text("def flat(x):\n    return x\n")
    second = run_folder.identity({"config": fields.plain(config), **facts}, "y")
    differing = [name for name in first if first[name] != second[name]]
    assert differing == ["the code that the config names"]
