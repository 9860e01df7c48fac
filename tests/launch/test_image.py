"""What can be said of the images without building them."""

import json
import re
import tomllib
from pathlib import Path

LAUNCH = Path(__file__).parent.parent.parent / "launch"
LINES = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()


def test_every_target_is_pinned_and_not_root():
    stages = {}
    for line in LINES:
        if line.startswith("FROM"):
            stages[line.split()[-1]] = stage = []
        elif line and not line.startswith("#"):
            stage.append(line)
    assert list(stages) == ["base", "cpu", "cuda", "tpu"]
    for target in ("cpu", "cuda", "tpu"):
        install, user = stages[target]
        assert "--constraint=launch/constraints.txt" in install
        assert user == "USER flaxcls"


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
    required = sum((extras[name] for name in ("cloud", "cuda", "fast", "tpu")), [])
    for requirement in project["dependencies"] + required:
        name = re.match("[A-Za-z0-9_.-]+", requirement)[0]
        assert re.sub("[-_.]+", "-", name).lower() in names, requirement
    assert pinned["jax"] == pinned["jaxlib"] == pinned["jax-cuda12-plugin"]
    assert "libtpu" in pinned
