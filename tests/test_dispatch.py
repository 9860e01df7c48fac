"""Several steps in one dispatch: the same training, and what is due comes at its step."""

import collections
import json
import signal

import jax
import numpy as np
import pytest

from flaxcls import build
from flaxcls.errors import ConfigError, Interrupted
from flaxcls.runtime import sharding
from flaxcls.runtime.stop_request import StopRequest
from flaxcls.training import dispatch
from flaxcls.training.program import Program
from flaxcls.training.train import train_config as train


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def dispatched(monkeypatch):
    """How many steps each call of `Program.update` made."""
    counts, update = [], Program.update

    def counting(self, state, batch):
        counts.append(len(batch["index"]) if sharding.is_stacked(batch) else 1)
        return update(self, state, batch)

    monkeypatch.setattr(Program, "update", counting)
    return counts


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        # Due are 3, 6, 9 and 12 (logs and evaluations) and 4, 8 and 12 (checkpoints).
        (2, [2, 1, 1, 2, 2, 1, 2, 1]),
        (3, [3, 1, 1, 1, 1, 1, 1, 3]),
        (5, [1] * 12),
        (None, [1] * 12),  # on a CPU
    ],
)
def test_what_is_due_comes_at_its_step(tmp_path, tiny_config, dispatched, count, expected):
    train(tiny_config(steps_per_dispatch=count, checkpoint__keep=9), tmp_path / "run")
    assert dispatched == expected
    assert [row["step"] for row in rows(tmp_path / "run") if "train" in row] == [3, 6, 9, 12]
    assert [row["step"] for row in rows(tmp_path / "run") if "eval" in row] == [6, 12]
    saved = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert {"4", "8", "12"} <= saved


def test_a_trace_begins_and_ends_at_its_steps(tmp_path, tiny_config, dispatched, capsys):
    profile = {"profile__start": "3 steps", "profile__stop": "6 steps"}
    every = {"log_every": "12 steps", "eval__every": "12 steps", "checkpoint__every": "12 steps"}
    train(tiny_config(steps_per_dispatch=3, **every, **profile), tmp_path / "run")
    assert dispatched == [3] * 4
    assert "traced 3 steps, from 4 to 6" in capsys.readouterr().out
    dispatched.clear()
    train(tiny_config(steps_per_dispatch=4, **every, **profile), tmp_path / "other")
    assert dispatched == [1] * 6 + [4, 1, 1]
    assert "traced 3 steps, from 4 to 6" in capsys.readouterr().out


CHANGES = {
    "log_every": "6 steps",
    "checkpoint__every": "6 steps",
    "augment": ({"name": "pad_crop", "padding": 1},),
    "ema_decay": 0.9,
}


@pytest.mark.parametrize("parts", [1, 2])
def test_steps_in_one_dispatch_are_the_same_steps(
    tmp_path, tiny_config, saved_arrays, dispatched, parts
):
    changes = CHANGES | {"gradient_accumulation": parts, "batch_size": 32}
    for count in (1, 3):
        config = tiny_config(steps_per_dispatch=count, **changes)
        train(config, tmp_path / str(count))
    assert dispatched == [1] * 12 + [3] * 4
    one, other = (saved_arrays(tmp_path / name, 12) for name in "13")
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-4, atol=1e-6, err_msg=name)
    for row, same in zip(rows(tmp_path / "1"), rows(tmp_path / "3"), strict=True):
        assert row.keys() == same.keys() and row["step"] == same["step"]
        for group in row.keys() & {"train", "eval", "ema"}:
            assert same[group] == pytest.approx(row[group], rel=1e-4)


def test_run_stopped_between_dispatches_resumes_bitwise(
    tmp_path, tiny_config, monkeypatch, saved_arrays, assert_same_arrays, dispatched
):
    config = tiny_config(steps_per_dispatch=2, **CHANGES)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        asked = collections.Counter()

        def second(self):
            asked[self] += 1
            return signal.SIGTERM if asked[self] == 2 else None

        patch.setattr(StopRequest, "__call__", second)
        with pytest.raises(Interrupted, match="stopped after step 4 of 12"):
            train(config, tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    assert dispatched == [2] * 12
    assert_same_arrays(*(saved_arrays(tmp_path / name, 12) for name in ("whole", "stopped")))
    texts = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert texts[0] == texts[1]


def test_two_programs_are_compiled_and_batches_stay_split(tiny_config):
    mesh = sharding.make_mesh()
    with Program.open(build.make_experiment(tiny_config(steps_per_dispatch=4), mesh)) as program:
        program.compile()
        assert set(program._train_steps) == {(16,), (4, 16)}
        stacks = list(program.batches(0, 9, 0, lambda step: 4 if step < 8 else 1))
        assert [stack["index"].shape for stack in stacks] == [(4, 16), (4, 16), (16,)]
        assert stacks[0]["index"].sharding.shard_shape((4, 16)) == (4, 2)  # on 8 devices
        for step in range(8):
            expected = program.batch(step)["index"]
            np.testing.assert_array_equal(stacks[step // 4]["index"][step % 4], expected)


def test_light_steps_are_dispatched_together_on_accelerators_alone():
    def compiled(size):
        matrix = jax.ShapeDtypeStruct((size, size), np.float32)
        return jax.jit(lambda x, y: x @ y).lower(matrix, matrix).compile()

    assert dispatch.automatic(compiled(64), "cpu") == 1
    assert dispatch.automatic(compiled(64), "gpu") == dispatch.automatic(compiled(64), "tpu") == 16
    assert dispatch.automatic(compiled(4096), "gpu") == 1  # 1.4e11 operations


def test_streamed_images_are_refused(tiny_config):
    config = tiny_config(steps_per_dispatch=2, input__mode="stream")
    with pytest.raises(ConfigError, match="must be 1 or None where the training images are strea"):
        build.make_experiment(config, sharding.make_mesh())
