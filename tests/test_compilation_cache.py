"""Real processes, each with a user's cache folder of its own."""

import json
import os
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest

from flaxcls.runtime import compilation_cache

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, sys, warnings
import jax, jax.numpy as jnp
from flaxcls.runtime import compilation_cache

compilation_cache.enable()
compilation_cache.enable()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = jax.jit(lambda x: jnp.sin(x) @ x)(jnp.eye(3))
print(json.dumps({
    "folder": jax.config.jax_compilation_cache_dir,
    "hits": len(compilation_cache._seconds_saved()),
    "saved": compilation_cache.saved_seconds(),
    "warnings": [str(warning.message) for warning in caught],
    "result": result.tolist(),
}))
"""


@pytest.fixture
def environment(tmp_path):
    """The environment of a user who has set nothing, with an empty cache folder."""
    names = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JAX_ENABLE_COMPILATION_CACHE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    return {**kept, "XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def compile_in_process(environment):
    """What the program prints, and its standard error, with changes of the environment."""

    def run(program=PROGRAM, **changes):
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT, env={**environment, **changes}, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout), result.stderr

    return run


def entries(folder):
    return sorted(Path(folder).glob("*-cache"))


def test_second_process_reads_what_the_first_compiled(compile_in_process, tmp_path):
    cold, error = compile_in_process()
    assert error == "" and cold["hits"] == 0 and cold["saved"] == 0
    folder = Path(cold["folder"])
    assert folder.parent == tmp_path / "cache" / "flaxcls" / "compiled"
    for part in (folder, *folder.parents[:3]):
        assert stat.S_IMODE(part.stat().st_mode) == 0o700
    assert entries(folder)

    warm, error = compile_in_process()
    assert error == "" and warm["warnings"] == []
    assert warm["hits"] == len(entries(folder)) and warm["folder"] == cold["folder"]
    assert warm["result"] == cold["result"]


def test_training_from_the_cache_is_bitwise_the_same(environment, recipe, tmp_path):
    program = (
        "from flaxcls import cli, main\nfrom flaxcls.runtime import compilation_cache\n"
        "def run(argv):\n"
        "    compilation_cache.enable()\n"
        "    code = main.main(argv)\n"
        "    print(len(compilation_cache._seconds_saved()), 'programs from the cache')\n"
        "    return code\n"
        "cli.run(run)"
    )
    outputs = []
    for name in ("cold", "warm"):
        process = subprocess.run(
            [sys.executable, "-c", program, f"--config={recipe}", f"--workdir={tmp_path / name}"],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 0 and process.stderr == ""
        outputs.append(process.stdout)
    assert "\n0 programs" in outputs[0] and "\n0 programs" not in outputs[1]
    cold, warm = (tmp_path / name / "metrics.jsonl" for name in ("cold", "warm"))
    assert cold.read_bytes() == warm.read_bytes()


def test_torn_entry_is_compiled_again_and_replaced(compile_in_process):
    cold, _ = compile_in_process()
    for path in entries(cold["folder"]):
        path.write_bytes(path.read_bytes()[:-10])
    again, error = compile_in_process()
    assert error == "" and again["warnings"] == []
    assert again["hits"] == 0 and again["result"] == cold["result"]
    healed, _ = compile_in_process()
    assert healed["hits"] == len(entries(cold["folder"])) > 0


def test_only_whole_entries_are_kept_and_looked_at_once(tmp_path):
    whole = zlib.compress(bytes(range(256)) * 100)
    flipped = whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]
    contents = {"whole": whole, "empty": b"", "garbage": b"garbage", "flipped": flipped}
    for name, content in contents.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    compilation_cache._tidy(tmp_path)
    (left,) = tmp_path.iterdir()
    assert left.name == "whole-cache" and stat.S_IMODE(left.stat().st_mode) == 0o400


def test_entry_that_breaks_after_the_start_is_compiled_with_a_warning(compile_in_process):
    cold, _ = compile_in_process()
    compile_in_process()  # finds them whole, and does not look again
    for path in entries(cold["folder"]):
        path.chmod(0o600)
        path.write_bytes(b"garbage")
        path.chmod(0o400)
    again, error = compile_in_process()
    assert again["result"] == cold["result"] and again["hits"] == 0
    assert "Error reading persistent compilation cache entry" in " ".join(
        [error, *again["warnings"]]
    )


def test_full_disk_is_survived_and_leaves_nothing_broken(compile_in_process):
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n" + PROGRAM
    before, error = compile_in_process(full)
    assert "Error writing persistent compilation cache entry" in " ".join(
        [error, *before["warnings"]]
    )
    torn = entries(before["folder"])
    assert torn and all(path.stat().st_size <= 1000 for path in torn)
    after, error = compile_in_process()
    assert error == "" and after["warnings"] == [] and after["result"] == before["result"]
    assert any(path.stat().st_size > 1000 for path in entries(before["folder"]))


SEVERAL = """
import json
import jax, jax.numpy as jnp
from flaxcls.runtime import compilation_cache

compilation_cache.enable()
for n in range(4):
    def f(x):
        return jnp.sin(x) @ x * n
    f.__name__ = f"program{n}"
    jax.jit(f)(jnp.eye(3))
folder = jax.config.jax_compilation_cache_dir
print(json.dumps({"hits": len(compilation_cache._seconds_saved()), "folder": folder}))
"""


def break_all(folder):
    for path in entries(folder):
        path.chmod(0o600)
        path.write_bytes(b"garbage")
        path.chmod(0o400)  # as those that have been found whole


def test_damaged_entries_are_reported_in_one_sentence_and_replaced(compile_in_process):
    cold, error = compile_in_process(SEVERAL)
    assert error == ""
    compile_in_process(SEVERAL)  # finds them whole, and does not look again
    break_all(cold["folder"])
    again, error = compile_in_process(SEVERAL)
    (sentence,) = error.splitlines()
    assert again["hits"] == 0 and f"in {cold['folder']} can't be read" in sentence
    assert "they are compiled again and replaced" in sentence
    healed, error = compile_in_process(SEVERAL)
    assert healed["hits"] == len(entries(cold["folder"])) >= 4 and error == ""


def test_damaged_entries_that_cannot_be_replaced_are_reported_in_one_sentence(
    compile_in_process, environment, tmp_path
):
    folder = tmp_path / "read only"
    folder.mkdir()
    changes = {"JAX_COMPILATION_CACHE_DIR": str(folder),
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
    compile_in_process(SEVERAL, **changes)
    break_all(folder)
    mount = f"mount --bind '{folder}' '{folder}' && mount -o remount,ro,bind '{folder}'"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && {sys.executable} -c "$PROGRAM"'], cwd=ROOT,
        env={**environment, **changes, "PROGRAM": SEVERAL}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and json.loads(result.stdout)["hits"] == 0
    assert "at every start, as they can't be replaced: Read-only" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_full_disk_is_reported_in_one_sentence(compile_in_process):
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n" + SEVERAL
    said, error = compile_in_process(full)
    (sentence,) = error.splitlines()
    assert f"compiled programs can't be kept in {said['folder']}" in sentence
    assert "File too large" in sentence


def test_folder_set_by_the_user_is_left_alone(compile_in_process, tmp_path):
    own = tmp_path / "own"
    said, _ = compile_in_process(JAX_COMPILATION_CACHE_DIR=str(own))
    assert said["folder"] == str(own)
    assert not (tmp_path / "cache").exists()
    # JAX's own threshold holds there: nothing took a second.
    assert not own.exists() or entries(own) == []


@pytest.mark.parametrize("value", ["0", "false"])
def test_cache_can_be_turned_off(compile_in_process, tmp_path, value):
    said, error = compile_in_process(JAX_ENABLE_COMPILATION_CACHE=value)
    assert said["folder"] is None and error == "" and not (tmp_path / "cache").exists()


def test_folder_that_cannot_be_made_leaves_a_sentence(compile_in_process, tmp_path):
    (tmp_path / "cache").write_text("a file")
    said, error = compile_in_process()
    assert said["folder"] is None
    assert error.startswith("flaxcls: compiled programs are not kept: ")
    assert str(tmp_path / "cache") in error and error.count("\n") == 2  # enabled twice


@pytest.mark.parametrize("which", [".", "flaxcls", "flaxcls/compiled"])
def test_folder_that_others_can_write_to_is_refused(compile_in_process, tmp_path, which):
    base = tmp_path / "cache"
    (base / "flaxcls" / "compiled").mkdir(parents=True)
    (base / which).chmod(0o777)
    said, error = compile_in_process()
    assert said["folder"] is None and said["hits"] == 0
    assert f"others can write to {base / which}, which `chmod go-w` would end" in error


def test_sticky_base_folder_will_do_but_not_a_sticky_cache(compile_in_process, tmp_path):
    base = tmp_path / "cache"
    base.mkdir()
    base.chmod(0o1777)
    said, error = compile_in_process()
    assert said["folder"] and error == ""
    Path(said["folder"]).chmod(0o1777)
    assert compile_in_process()[0]["folder"] is None


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to others")
def test_folder_or_link_of_another_user_is_refused(compile_in_process, tmp_path, link):
    base = tmp_path / "cache"
    base.mkdir()
    base.chmod(0o1777)
    folder = base / "flaxcls"
    if link:
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345, follow_symlinks=False)
    said, error = compile_in_process()
    assert said["folder"] is None and f"{folder} belongs to another user" in error


def test_entries_used_longest_ago_go_when_there_are_too_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 250)
    monkeypatch.setattr(compilation_cache, "_is_intact", lambda entry: True)
    for age, name in enumerate(("new", "middle", "old")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1.7e9 - age, 1.6e9))
    (tmp_path / "something else").write_bytes(bytes(1000))
    compilation_cache._tidy(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["middle-cache", "new-cache", "something else"]
    compilation_cache._tidy(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_saved_seconds_are_what_jax_reports():
    compilation_cache.enable()  # the tests have a folder of their own, which stays
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
    compilation_cache.enable()
    before = list(compilation_cache._seconds_saved())
    jax.monitoring.record_event_duration_secs(compilation_cache.TIME_SAVED, 1.5)
    jax.monitoring.record_event_duration_secs("/jax/something_else", 7.0)
    assert compilation_cache._seconds_saved() == [*before, 1.5]
    assert compilation_cache.saved_seconds() == max(0.0, sum(before) + 1.5)


def test_machine_is_named_after_its_processor_and_the_name_is_a_file_name(monkeypatch):
    name = compilation_cache._machine()
    assert name == compilation_cache._machine() and "/" not in name
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda path: "flags\t\t: fpu avx512f\ncpu MHz : 1\n")
        other = compilation_cache._machine()
        patch.setattr(Path, "read_text", lambda path: "flags\t\t: fpu avx512f\ncpu MHz : 2\n")
        assert compilation_cache._machine() == other != name
        patch.setattr(Path, "read_text", lambda path: "flags\t\t: fpu\ncpu MHz : 1\n")
        assert compilation_cache._machine() not in (other, name)
