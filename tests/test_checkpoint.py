import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flaxcls.errors import CheckpointError, ConfigError, ProcessesError
from flaxcls.runs import checkpoint, manifest, recovery
from flaxcls.runs.checkpoint import Checkpoints
from flaxcls.runs.checkpoint_reader import CheckpointReader
from flaxcls.runs.manifest import Damaged
from flaxcls.runs.recovery import restore_newest
from flaxcls.runtime import sharding

MESH = sharding.make_mesh(2)

# Reads that fail leave Orbax's coroutines unfinished.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state_of(number):
    state = {
        "params": {"layer": {"kernel": jnp.arange(2.0**15).reshape(128, 256) + number}},
        "opt_state": (jnp.full(3, number, jnp.float32), (), {"count": jnp.int32(number)}),
        "step": jnp.int32(number),
        "ema": {},
    }
    return jax.device_put(state, sharding.shardings(MESH, state))


def shapes_of(tree):
    return jax.eval_shape(lambda: tree)


def save(checkpoints, *steps, best=None):
    for step in steps:
        progress = {"best": {"step": best} if best else {}, "seconds": 0.5}
        checkpoints.save(step, state_of(step), {"progress": progress, "names": ["a", "b"]})
    checkpoints.wait()


def restored(checkpoints, step, tree):
    shapes = shapes_of(tree)
    return checkpoints.state(step, shapes, sharding.shardings(MESH, shapes))


def test_state_and_metadata_come_back_bitwise_and_placed(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 7)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "c")
    state = state_of(7)
    loaded = restored(checkpoints, 7, state)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    kernel = loaded["params"]["layer"]["kernel"]
    assert kernel.sharding == state["params"]["layer"]["kernel"].sharding
    assert kernel.sharding.shard_shape(kernel.shape) == (128, 128)
    assert checkpoints.metadata(7) == {
        "progress": {"best": {}, "seconds": 0.5},
        "names": ["a", "b"],
    }
    checkpoints.close()


def test_saving_goes_on_after_restoring(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 1)
    restored(checkpoints, 1, state_of(1))
    checkpoints.metadata(1)
    save(checkpoints, 2)
    jax.tree.map(np.testing.assert_array_equal, restored(checkpoints, 2, state_of(2)), state_of(2))
    checkpoints.close()


def test_part_of_the_state_can_be_restored(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 3)
    part = {"params": state_of(3)["params"]}
    loaded = restored(checkpoints, 3, part)
    assert loaded.keys() == {"params"}
    jax.tree.map(np.testing.assert_array_equal, loaded, part)
    checkpoints.close()


def test_newest_and_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    save(checkpoints, 1)
    save(checkpoints, 2, best=2)
    save(checkpoints, 3, 4, 5, best=2)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.find("last") == 5 and checkpoints.find("best") == 2
    assert checkpoints.find("4") == 4
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", keep=1)  # as a resumed run does
    assert again.steps() == [2, 4, 5]
    save(again, 6, best=6)
    assert again.steps() == [6]
    again.close()


def test_what_is_not_there_is_reported(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        checkpoints.find("last")
    save(checkpoints, 10)
    with pytest.raises(ConfigError, match="no checkpoint '100', did you mean '10'"):
        checkpoints.find("100")
    with pytest.raises(ConfigError, match="no best checkpoint yet"):
        checkpoints.find("best")
    checkpoints.close()


def test_half_written_checkpoint_is_not_seen(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 1)
    checkpoints.close()
    (tmp_path / "c/2.orbax-checkpoint-tmp/state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.steps() == [1]
    save(checkpoints, 2)
    assert checkpoints.steps() == [2]
    checkpoints.close()


# Restoring what is whole, and nothing else.

FILES = ("facts/metadata", "state/_METADATA", "state/manifest.ocdbt")


def restored_newest(folder, tree=None, directory="checkpoints"):
    """Step, state and metadata, or None, and what was said."""
    said = []
    shapes = shapes_of(state_of(0) if tree is None else tree)
    with Checkpoints(folder / directory) as checkpoints:
        result = restore_newest(checkpoints, shapes, sharding.shardings(MESH, shapes), said.append)
    return result, said


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder / "checkpoints", keep=5) as checkpoints:
        save(checkpoints, 4, 8)
    return folder


@pytest.fixture
def run(two_steps, tmp_path):
    """The folder of a run with the checkpoints 4 and 8."""
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run"


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def assert_goes_back(run, problem):
    """Step 8 is moved away, which is said together with why, and step 4 restored."""
    result, said = restored_newest(run)
    assert result[0] == 4 and result[2]["names"] == ["a", "b"]
    jax.tree.map(np.testing.assert_array_equal, result[1], state_of(4))
    [sentence] = said
    assert sentence.startswith("the checkpoint of step 8 ") and problem in sentence
    assert sentence.endswith(f"; it is moved to {run / 'quarantine/8'}")
    assert (run / "quarantine/8").is_dir()
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [4]


def test_newest_step_is_restored_when_it_is_intact(run):
    result, said = restored_newest(run)
    assert result[0] == 8 and said == [] and not (run / "quarantine").exists()
    jax.tree.map(np.testing.assert_array_equal, result[1], state_of(8))
    kernel = result[1]["params"]["layer"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (128, 128)


def test_no_step_is_no_news(tmp_path):
    assert restored_newest(tmp_path) == (None, [])
    assert not (tmp_path / "checkpoints").exists()  # it is made when something is saved


SAVING = """
import itertools, sys
from pathlib import Path
import jax.numpy as jnp
from flaxcls.runs.checkpoint import Checkpoints
from flaxcls.runs.checkpoint_reader import CheckpointReader

with Checkpoints(Path(sys.argv[1]), keep=1) as checkpoints:
    for step in itertools.count(1):
        state = {"a": jnp.full((256, 256), step, jnp.float32), "b": jnp.int32(step)}
        best = step - step % 3
        progress = {"best": {"step": best} if best else {}}
        checkpoints.save(step, state, {"progress": progress, "step": step})
        print(step, flush=True)
"""


def test_a_run_that_saves_and_deletes_all_the_time_can_be_read(tmp_path, start_python):
    saving = start_python("-c", SAVING, tmp_path)
    for line in iter(saving.stdout.readline, "10\n"):
        assert line
    shapes = shapes_of({"a": jnp.zeros((256, 256), jnp.float32), "b": jnp.int32(0)})
    shardings = sharding.shardings(MESH, shapes)
    reader = CheckpointReader(tmp_path)
    read = []
    end = time.monotonic() + 120
    while len(read) < 30 or len({*read}) <= 5:  # however slowly it goes on meanwhile
        assert saving.poll() is None and time.monotonic() < end
        which = "best" if len(read) % 3 == 2 else "last"
        step, (facts, state) = reader.read(
            which, lambda step: (reader.metadata(step), reader.state(step, shapes, shardings))
        )
        assert facts["step"] == step == int(state["b"]) and (np.asarray(state["a"]) == step).all()
        assert which == "last" or step % 3 == 0
        read.append(step)
    deleted = 0
    while deleted < 5:  # each time while the step is there when reading begins
        oldest = reader.steps()[0]
        try:
            reader.read(str(oldest), lambda step: reader.state(step, shapes, shardings))
        except ConfigError as error:
            assert str(error).startswith(f"there is no checkpoint '{oldest}'")
            deleted += 1
    assert saving.poll() is None
    saving.kill()
    saving.wait()
    for file in tmp_path.glob("*/state/_METADATA"):
        file.unlink()
    with pytest.raises(Damaged, match="_METADATA is missing"):
        CheckpointReader(tmp_path).read("last", lambda step: reader.metadata(step))


def test_a_flipped_bit_in_any_file_is_found(run):
    step, pristine = run / "checkpoints/8", run / "pristine"
    shutil.copytree(step, pristine)
    names = files_of(step)
    assert sum("/d/" in name for name in names) >= 2  # the arrays' files among them
    for name in names:
        if name == manifest.NAME or name in checkpoint.WRITTEN_LAST:
            continue
        size = (step / name).stat().st_size
        for place in {0, size // 2, size - 1}:
            flip(step / name, place)
            with Checkpoints(run / "checkpoints") as checkpoints:
                with pytest.raises(Damaged, match=f"step 8 is damaged: {name} is not what was"):
                    checkpoints.metadata(8)
                with pytest.raises(Damaged, match=f"step 8 is damaged: {name} is not what was"):
                    restored(checkpoints, 8, state_of(8))
            flip(step / name, place)
    assert (step / "state/d").is_dir() and not (
        run / "quarantine"
    ).exists()  # reading moves nothing
    flip(next((step / "state/ocdbt.process_0/d").iterdir()), 20)
    assert_goes_back(run, "its digest differs")


def test_what_orbax_writes_after_the_manifest_is_not_needed(run):
    for name in checkpoint.WRITTEN_LAST:
        (run / "checkpoints/8" / name).write_text("{")
    assert restored_newest(run)[0][0] == 8
    for name in checkpoint.WRITTEN_LAST:
        (run / "checkpoints/8" / name).unlink()
    result, said = restored_newest(run)
    assert result[0] == 8 and said == []
    jax.tree.map(np.testing.assert_array_equal, result[1], state_of(8))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_off_or_missing_is_found(run, name):
    path = run / "checkpoints/8" / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    checkpoints = Checkpoints(run / "checkpoints")
    with pytest.raises(Damaged, match=f"{name} has {size - 1} bytes instead of {size}"):
        checkpoints.metadata(8)
    checkpoints.close()
    path.unlink()
    assert_goes_back(run, f"damaged: {name} is missing")


def test_a_broken_manifest_is_damage(run):
    (run / "checkpoints/8" / manifest.NAME).write_text("{")
    assert_goes_back(run, "manifest.json is not a readable manifest")


def test_an_empty_step_is_not_the_newest(run):
    shutil.rmtree(run / "checkpoints/8")
    (run / "checkpoints/8").mkdir()
    assert_goes_back(run, "the folder is empty")


@pytest.mark.parametrize("left_out", [*FILES, "facts", "state", "state/ocdbt.process_0"])
def test_a_half_copied_step_without_manifest_is_found(run, left_out):
    step = run / "checkpoints/8"
    (step / manifest.NAME).unlink()
    path = step / left_out
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_goes_back(run, "damaged: it can't be read: ")


def test_a_step_without_manifest_is_used_unchecked(run):
    (run / "checkpoints/8" / manifest.NAME).unlink()
    result, said = restored_newest(run)
    assert result[0] == 8
    assert said == ["the checkpoint of step 8 has no manifest: it is used unchecked"]
    jax.tree.map(np.testing.assert_array_equal, result[1], state_of(8))


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("linked", ["", "state", "facts/metadata"])
def test_symbolic_links_are_not_followed(run, linked, with_manifest):
    if not with_manifest:
        (run / "checkpoints/8" / manifest.NAME).unlink()
    path = run / "checkpoints/8" / linked
    path.rename(run / "elsewhere")
    path.symlink_to(run / "elsewhere")
    assert_goes_back(run, f"{linked} is a symbolic link")
    assert (run / "elsewhere").exists()


def test_the_run_starts_from_scratch_when_nothing_is_intact(run):
    for step in (4, 8):
        flip(run / f"checkpoints/{step}/facts/metadata", 3)
    result, said = restored_newest(run)
    assert result is None and len(said) == 3
    assert said[-1] == "no checkpoint is left: the run starts from scratch"
    assert sorted(path.name for path in (run / "quarantine").iterdir()) == ["4", "8"]
    with Checkpoints(run / "checkpoints") as checkpoints:
        save(checkpoints, 2)
        assert checkpoints.steps() == [2]


def test_quarantine_takes_the_same_step_again(run):
    for _ in range(3):
        (run / "checkpoints/9").mkdir()
        restored_newest(run)
    assert sorted(path.name for path in (run / "quarantine").iterdir()) == ["9", "9.1", "9.2"]


def test_quarantine_keeps_what_was_saved_last_and_says_what_it_deletes(run):
    (run / "quarantine").mkdir()
    (run / "quarantine/notes.txt").write_text("of the user")
    said = []
    for step in range(9, 9 + recovery.QUARANTINED + 2):
        (run / f"checkpoints/{step}").mkdir()
        if step == 10:
            (run / "checkpoints/10").rmdir()
            (run / "checkpoints/10").symlink_to(run / "checkpoints/8")
        said += restored_newest(run)[1]
    kept = [str(step) for step in range(11, 11 + recovery.QUARANTINED)]
    assert sorted(path.name for path in (run / "quarantine").iterdir()) == [*kept, "notes.txt"]
    assert [sentence.partition(" keeps ")[2] for sentence in said if "deleted" in sentence] == [
        "the 5 checkpoints that were saved last: 9 is deleted",
        "the 5 checkpoints that were saved last: 10 is deleted",
    ]
    assert (run / "checkpoints/8").is_dir()  # a link's target is not touched


def test_a_run_goes_on_after_going_back(run):
    (run / "checkpoints/8/facts/metadata").unlink()
    shapes = shapes_of(state_of(0))
    with Checkpoints(run / "checkpoints", keep=5) as checkpoints:
        step, *_ = restore_newest(checkpoints, shapes, sharding.shardings(MESH, shapes), print)
        assert step == 4 and checkpoints.steps() == [4]
        save(checkpoints, 6, 8)
        assert checkpoints.steps() == [4, 6, 8]
    assert restored_newest(run)[0][0] == 8


OTHER = {
    "name": lambda state: state | {"params": {"other": state["params"]["layer"]}},
    "shape": lambda state: state | {"step": jnp.zeros(2, jnp.int32)},
    "dtype": lambda state: state | {"step": jnp.float32(1)},
    "more": lambda state: state | {"ema": {"kernel": jnp.zeros(3)}},
    "fewer": lambda state: {name: part for name, part in state.items() if name != "opt_state"},
}
DIFFERENCE = {
    "name": "params/other/kernel is not there and should be float32[128, 256]",
    "shape": "step is int32[] and should be int32[2]",
    "dtype": "step is int32[] and should be float32[]",
    "more": "ema/kernel is not there and should be float32[3]",
    "fewer": "opt_state/0 is float32[3] and should be absent",
}


@pytest.mark.parametrize("other", OTHER)
def test_arrays_that_do_not_match_are_named_and_nothing_is_moved(run, other):
    before = files_of(run)
    with pytest.raises(ConfigError) as error:
        restored_newest(run, OTHER[other](state_of(0)))
    assert str(error.value) == (f"the checkpoint of step 8 does not match: {DIFFERENCE[other]}")
    assert files_of(run) == before


@pytest.mark.parametrize("other", OTHER)
def test_an_older_step_that_fits_is_taken(run, other):
    shutil.rmtree(run / "checkpoints/8")
    state = jax.device_put(OTHER[other](state_of(4)), jax.devices()[0])
    with Checkpoints(run / "checkpoints", keep=5) as checkpoints:
        facts = {"progress": {"best": {}}}
        checkpoints.save(8, state, facts)
    assert_goes_back(run, "does not match: ")


def test_a_part_is_compared_too(run):
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert restored(checkpoints, 8, {"step": state_of(0)["step"]})["step"] == 8
        for part in (
            {"step": jnp.float32(0)},
            {"step": jnp.zeros(1, jnp.int32)},
            {"st": jnp.ones(1)},
        ):
            with pytest.raises(ConfigError, match="of step 8 does not match: st"):
                restored(checkpoints, 8, part)


def test_structures_of_optimizers_are_compared_by_name(tmp_path):
    Adam = namedtuple("Adam", "count mu")
    state = {"opt_state": (Adam(jnp.int32(1), {"w": jnp.ones(2)}), [jnp.ones(1)])}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {"progress": {"best": {}}})
    result, _ = restored_newest(tmp_path, state)
    jax.tree.map(np.testing.assert_array_equal, result[1], state)
    Other = namedtuple("Other", "count nu")
    with pytest.raises(ConfigError, match="opt_state/0/nu/w is not there"):
        restored_newest(tmp_path, {"opt_state": (Other(*state["opt_state"][0]), [jnp.ones(1)])})


def test_a_failing_device_moves_no_checkpoint(run, monkeypatch):
    def out_of_memory(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", out_of_memory)
    with pytest.raises(jax.errors.JaxRuntimeError):
        restored_newest(run)

    def confused(*arguments, **options):
        raise ValueError("what is this?\nmore")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", confused)
    with pytest.raises(
        CheckpointError, match="step 8 is intact but can't be read: what is this[?]$"
    ):
        restored_newest(run)
    assert not (run / "quarantine").exists()


# Saving, and what stands in its way.


def test_the_manifest_is_there_with_the_step_and_goes_with_it(tmp_path):
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step)
            assert manifest.verify(tmp_path / f"c/{step}", checkpoint.WRITTEN_LAST)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["3"]


def test_a_step_is_not_there_before_its_manifest(tmp_path, monkeypatch):
    seen = []

    def write(folder, left_out):
        seen.append((folder.name, sorted(path.name for path in folder.parent.iterdir())))
        return real(folder, left_out)

    real = manifest.write
    monkeypatch.setattr(manifest, "write", write)
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    unfinished = "2.orbax-checkpoint-tmp"
    assert seen[1] == (unfinished, ["1", unfinished])  # and the previous one is still there


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path):
    left = tmp_path / "c/5.orbax-checkpoint-tmp/state"
    left.mkdir(parents=True)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [] and left.exists()  # it may be another process's
        save(checkpoints, 1)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


def test_save_that_can_begin_in_some_processes_only_ends_them_all(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 1)

    def refused(*arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ocp.CheckpointManager, "save", refused)
    with pytest.raises(CheckpointError, match="step 2 not saved: Input/output error"):
        save(checkpoints, 2)
    checkpoints._barrier = SimpleNamespace(begin=lambda: None, failure="")  # of several
    with pytest.raises(ProcessesError, match="step 3 not saved: Input/output error"):
        save(checkpoints, 3)
    assert checkpoints.steps() == [1]
    checkpoints.close()


def test_too_little_space_is_reported_before_saving(run, monkeypatch):
    needed = 2**20 + 2 * 2**17
    usage = shutil.disk_usage(run)
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=300_000))
        with pytest.raises(CheckpointError) as error:
            save(checkpoints, 12)
        assert str(error.value) == (
            f"checkpoint of step 12 not saved: 1.2 MB needed, 0.3 MB free in {run / 'checkpoints'}"
        )
        assert checkpoints.steps() == [4, 8] and checkpoints.failure() is None
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
        save(checkpoints, 12)
        assert checkpoints.steps() == [12]


def test_what_the_last_checkpoint_took_is_needed_again(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c") as checkpoints:
        usage = shutil.disk_usage(tmp_path)
        facts = {"progress": {"best": {}}, "text": "x" * 3_000_000}
        checkpoints.save(1, state_of(1), facts)
        checkpoints.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
        with pytest.raises(CheckpointError, match="3.1 MB needed, 2.0 MB free"):
            checkpoints.save(2, state_of(1), facts)


def test_a_folder_that_cannot_be_written_is_reported_at_once(tmp_path):
    (tmp_path / "c").write_text("a file where the folder should be")
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(CheckpointError, match="of step 1 not saved: .*/c can't be written: "):
            save(checkpoints, 1)
        (tmp_path / "c").unlink()
        save(checkpoints, 1)
        assert checkpoints.steps() == [1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_reported_at_once(run):
    (run / "checkpoints").chmod(0o555)
    try:
        with Checkpoints(run / "checkpoints") as checkpoints:
            with pytest.raises(CheckpointError, match="can't be written: Permission denied"):
                save(checkpoints, 12)
            assert checkpoints.steps() == [4, 8]
    finally:
        (run / "checkpoints").chmod(0o755)


def test_a_failure_in_the_background_is_reported_once(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        assert checkpoints.failure() is None
        save(checkpoints, 1)
        with monkeypatch.context() as patched:
            patched.setattr(manifest, "write", fail)
            with pytest.raises(CheckpointError, match="step 2 not saved: No space left on device$"):
                save(checkpoints, 2)
            assert checkpoints.failure() is None and checkpoints.steps() == [1]
            assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]
            checkpoints.save(3, state_of(3), {"progress": {"best": {}}})
            while not (failure := checkpoints.failure()):
                pass
            assert str(failure) == "checkpoint of step 3 not saved: No space left on device"
            checkpoints.wait()
        save(checkpoints, 2)  # also a step that has failed before
        assert checkpoints.steps() == [2]
    jax.tree.map(
        np.testing.assert_array_equal, restored_newest(tmp_path, directory="c")[0][1], state_of(2)
    )


FULL_DISK = """
import resource, sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from flaxcls.runs.checkpoint import Checkpoints
from flaxcls.runs.checkpoint_reader import CheckpointReader
from flaxcls.errors import CheckpointError

folder = Path(sys.argv[1])
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
noise = np.random.default_rng(0)
state = {name: noise.normal(size=10**5).astype(np.float32) for name in "abcd"}
facts = {"progress": {"best": {}}}
checkpoints = Checkpoints(folder, keep=1)
checkpoints.save(1, state, facts)
checkpoints.wait()
for step in (2, 3):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    checkpoints.save(step, state, facts)
    try:
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    print(sorted(path.name for path in folder.iterdir()), checkpoints.steps())
checkpoints.save(3, state, facts)
checkpoints.close()
print(sorted(path.name for path in folder.iterdir()))
"""


def test_a_disk_that_is_full_in_the_middle_leaves_the_previous_step(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 5, result.stdout
    assert lines[0] == "checkpoint of step 2 not saved: File too large"
    assert lines[2] == "checkpoint of step 3 not saved: File too large"
    assert lines[1] == lines[3] == "['1'] [1]"
    assert lines[4] == "['3']"


TWO_PROCESSES = """
import shutil, sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flaxcls.runs import checkpoint
from flaxcls.runs import manifest
from flaxcls.runtime import processes
from flaxcls.runtime import sharding
from flaxcls.errors import CheckpointError, ConfigError
from flaxcls.runs.recovery import restore_newest

run, first, said = Path(sys.argv[1]), processes.is_first(), []
mesh = sharding.make_mesh(4)
shapes = {"w": jax.ShapeDtypeStruct((512, 64), jnp.float32)}
places = sharding.shardings(mesh, shapes)
facts = {"progress": {"best": {}}}


def save(step):
    part = lambda index: np.full((512, 64), step, np.float32)[index]
    state = {"w": jax.make_array_from_callback((512, 64), places["w"], part)}
    checkpoints.save(step, state, facts)
    checkpoints.wait()


def tell(*what):
    print(*what, flush=True)


with checkpoint.Checkpoints(run / "checkpoints", keep=5) as checkpoints:
    for step in (1, 2, 3):
        save(step)
    processes.agree(0)
    if first:
        (run / "checkpoints/3/facts/metadata").write_text("")
    step, state, _ = restore_newest(checkpoints, shapes, places, said.append)
    parts = state["w"].addressable_shards
    tell(step, parts[0].data.shape, {float(x) for part in parts for x in part.data.ravel()})
    tell(len(said), checkpoints.steps())
    try:
        other = {"w": jax.ShapeDtypeStruct((512, 64), jnp.int32)}
        restore_newest(checkpoints, other, places, said.append)
    except ConfigError as error:
        tell(error)
    usage = shutil.disk_usage
    if first:
        shutil.disk_usage = lambda path: usage(path)._replace(free=0)
    try:
        save(4)
    except CheckpointError as error:
        tell("not saved: " in str(error), "needed, 0.0 MB free" in str(error))
    shutil.disk_usage = usage
    save(4)
    tell(checkpoints.steps(), manifest.verify(run / "checkpoints/4", checkpoint.WRITTEN_LAST))
    processes.agree(0)
"""


def test_all_processes_go_the_same_way(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(index)], **pipes) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    for index, (stdout, stderr) in enumerate(outputs):
        lines = [line for line in stdout.splitlines() if not line.startswith("[Gloo]")]
        assert lines == [
            "2 (128, 64) {2.0}",
            f"{1 - index} [1, 2]",
            "the checkpoint of step 2 does not match: w is float32[512, 64] and should be "
            "int32[512, 64]",
            "True True",
            "[1, 2, 4] True",
        ], stderr
