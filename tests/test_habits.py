"""What a commit is checked with is what everything is checked with."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def test_commits_are_checked_by_the_versions_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"]["dev"]
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    versions = {each["repo"].rpartition("/")[2]: each["rev"].removeprefix("v") for each in repos}
    assert f"ruff=={versions['ruff-pre-commit']}" in wanted
    assert f"codespell=={versions['codespell']}" in wanted
