"""flaxcls as it is installed from a wheel, away from its checkout: it brings its recipes along."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "flaxcls").rglob("*.py")}
PAGE = {f"flaxcls/report/{name}" for name in ("blocks.html", "page.css", "page.html", "page.js")}
RECIPES = {f"flaxcls/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}


def build(what, source, out):
    """The wheel or the sdist that the build backend makes of a folder."""
    program = f"from setuptools import build_meta as b; b.build_{what}({str(out)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    return next(out.glob("*.whl" if what == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What a release is built from, copied: building leaves files there."""
    pytest.importorskip("setuptools", minversion="70.1")  # as pyproject.toml asks for
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("source")
    for name in ("flaxcls", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    """A fresh folder into which pip has installed the wheel, without what it depends on."""
    out, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", source, "--no-deps", "--no-build-isolation", "-w", out]
    subprocess.run(wheel, check=True, capture_output=True)
    install = [*pip, "install", *out.glob("*.whl"), "--no-deps", "--no-index", "--target", target]
    subprocess.run(install, check=True, capture_output=True)
    return target


def run(installed, cwd, *command):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_recipe_in_a_wheel_is_found_by_its_name(installed, tmp_path):
    train = (sys.executable, "-m", "flaxcls.main", "--workdir=run")
    result = run(installed, tmp_path, *train, "--config=digits_cnn", "--config.duration=2 steps")
    assert result.returncode == 0, result.stderr
    assert "Finished after 2 steps" in result.stdout
    where = run(
        installed, tmp_path, sys.executable, "-c", "import flaxcls; print(flaxcls.__file__)"
    )
    assert where.stdout.startswith(str(installed))
    for wrong in ("digits_cn", "configs/digits_cnn.py"):
        result = run(installed, tmp_path, *train, f"--config={wrong}")
        assert result.returncode == 2
        assert result.stderr == (
            f"flaxcls: there is no config file {wrong}, did you mean 'digits_cnn'?\n"
        )


@pytest.mark.slow
def test_console_script_is_the_package(installed, tmp_path):
    script = run(installed, tmp_path, installed / "bin" / "flaxcls")
    module = run(installed, tmp_path, sys.executable, "-m", "flaxcls")
    assert script.returncode == 0 and "\n  data preview " in script.stdout
    assert script.stdout == module.stdout
    for words in (("data", "chek"), ("train", "--config=digits_cn")):
        script = run(installed, tmp_path, installed / "bin" / "flaxcls", *words)
        assert script.returncode == 2 and "did you mean" in script.stderr


@pytest.mark.slow
def test_wheel_has_every_module_and_recipe_also_when_made_of_an_sdist(source, tmp_path):
    sdist = build("sdist", source, tmp_path)
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "direct").mkdir()
    for folder, out in ((source, tmp_path / "direct"), (unpacked, tmp_path)):
        with zipfile.ZipFile(build("wheel", folder, out)) as wheel:
            names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == MODULES | RECIPES | PAGE | {"flaxcls/models/zoo.json"}
