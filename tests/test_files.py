"""Files are written whole or not at all."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flaxcls.errors import ConfigError
from flaxcls.files import atomic_write, read_json, write_json

ROOT = Path(__file__).parent.parent


def test_content_takes_the_place_of_the_old_one_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path, fsync=True) as file:
        file.write(b"new content")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new content" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_error_leaves_the_old_content_and_no_temporary(tmp_path, shared, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(path, shared=shared) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_what_cannot_take_the_place_leaves_no_temporary(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "folder") as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == ["folder"]


def test_killed_in_the_middle_it_leaves_the_old_content_and_the_next_one_tidies_up(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = f"""
import os, signal
from pathlib import Path
from flaxcls.files import atomic_write
with atomic_write(Path({str(path)!r})) as file:
    file.write(bytes(10**6))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["file", "file.tmp"]
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_several_that_share_a_file_never_mix_their_contents(tmp_path):
    path, contents = tmp_path / "file", [bytes([i]) * 10**5 for i in range(4)]
    mixed = []

    def write(content):
        for _ in range(50):
            with atomic_write(path, shared=True) as file:
                file.write(content[:1000])
                file.flush()
                file.write(content[1000:])
            if path.read_bytes() not in contents:
                mixed.append(content)

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed and path.read_bytes() in contents and os.listdir(tmp_path) == ["file"]


def test_json_that_cannot_be_written_leaves_the_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": [1, 2]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": [1, 2]} and os.listdir(tmp_path) == ["file.json"]


def test_what_is_no_object_of_json_is_reported(tmp_path):
    path = tmp_path / "file.json"
    assert read_json(path) is None
    for text, sentence in (("[1]", "holds list instead"), ("{", "not readable as JSON")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"{path} .*{sentence}"):
            read_json(path)
