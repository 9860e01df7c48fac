import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import sharding
from flaxcls.checkpoint import Checkpoints
from flaxcls.errors import ConfigError

MESH = sharding.make_mesh(2)


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


def test_state_and_facts_come_back_bitwise_and_placed(tmp_path):
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
    assert checkpoints.facts(7) == {"progress": {"best": {}, "seconds": 0.5}, "names": ["a", "b"]}
    checkpoints.close()


def test_saving_goes_on_after_restoring(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 1)
    restored(checkpoints, 1, state_of(1))
    checkpoints.facts(1)
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


def test_what_is_not_there_is_told(tmp_path):
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
