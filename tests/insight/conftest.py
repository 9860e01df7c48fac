"""What the tests of robustness share."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def digits_run(digits_run, tmp_path_factory):
    """A copy of that of all tests: what attacks and corruptions find is kept in the folder."""
    return Path(shutil.copytree(digits_run, tmp_path_factory.mktemp("attacked") / "run"))
