"""The launchers are modules of the checkout, not of the package that is installed.

So is slurm_cluster.py, which stands beside the tests.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path += [str(ROOT), str(Path(__file__).parent)]


@pytest.fixture
def launch():
    """Runs `python -m launch.NAME ...` in the checkout and returns what became of it."""

    def run(name, *arguments):
        words = [sys.executable, "-m", f"launch.{name}", *arguments]
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)

    return run


@pytest.fixture
def executable(tmp_path, monkeypatch):
    """Puts a script onto the PATH under the name of a program."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def put(name, text):
        path = folder / name
        path.write_text(text)
        path.chmod(0o755)

    return put
