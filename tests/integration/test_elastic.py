"""A run of four processes goes on with three and then with two, as hosts are lost or taken away."""

import collections
import json
import signal
import time

import numpy as np
import pytest

STEPS = 90
# Streamed pictures, twelve a batch: three, four and six a process. What each process is given of a
# batch, and its last, is written down.
RECIPE = """
import json
import os
import zlib
from pathlib import Path

import jax

from flaxcls.config import default
from flaxcls.training import program

update, noted = program.Program.update, []


def get_config():
    config = default()
    config.batch_size = 12
    config.duration = "{steps} steps"
    config.log_every = "3 steps"
    config.eval.every = "45 steps"
    config.checkpoint.every = "45 steps"
    config.data.name = "folder"
    config.data.path = {pictures!r}
    config.data.train_split = config.data.eval_split = "all"
    config.image_size = 8
    config.input.mode = "stream"
    config.augment = ({{"name": "flip"}}, {{"name": "mixup", "alpha": 0.2}})
    config.model.name = "dense"
    config.model.widths = (8,)
    config.model.dropout = 0.2
    config.ema_decay = 0.9
    config.optimizer.learning_rate = 3e-3
    config.optimizer.momentum = 0.9
    config.mesh.cpu_devices = 1
    return config


def note(self, state, batch):
    step, (shard,) = int(jax.device_get(state.step)), batch["index"].addressable_shards
    images = jax.device_get(batch["image"].addressable_shards[0].data)
    index = jax.device_get(shard.data).tolist()
    first = shard.index[0].start or 0
    for row, (example, image) in enumerate(zip(index, images), first):
        noted.append([step, row, example, zlib.crc32(image)])
    return update(self, state, batch)


def close(self, close=program.Program.close):
    name = f"{{jax.process_count()}}-{{jax.process_index()}}.json"
    (Path({folder!r}) / os.environ["NOTED"]).mkdir(parents=True, exist_ok=True)
    (Path({folder!r}) / os.environ["NOTED"] / name).write_text(json.dumps(noted))
    close(self)


program.Program.update, program.Program.close = note, close
"""


def batches(folder):
    """step -> the example and the digest of the image in each row, as all processes had them."""
    found = collections.defaultdict(dict)
    for path in folder.iterdir():
        for step, row, example, digest in json.loads(path.read_text()):
            assert row not in found[step], "an example came twice"
            found[step][row] = example, digest
    return {step: [found[step][row] for row in range(12)] for step in sorted(found)}


@pytest.mark.torture
def test_run_goes_on_with_fewer_processes_and_the_same_batches(
    tmp_path,
    monkeypatch,
    pictures,
    start_processes,
    run_main,
    run_folder,
    wait_until,
    saved_arrays,
    assert_close,
):
    recipe = tmp_path / "elastic.py"
    recipe.write_text(
        RECIPE.format(steps=STEPS, pictures=str(pictures), folder=str(tmp_path / "noted"))
    )
    run, alone = run_folder(tmp_path / "run"), run_folder(tmp_path / "alone")
    monkeypatch.setenv("NOTED", "elastic")
    for count in (4, 3, 2):
        began, before = time.perf_counter(), run.log()
        processes = start_processes(f"--config={recipe}", f"--workdir={run.folder}", count=count)
        if count > 2:
            assert wait_until(processes, lambda before=before: len(run.log()) > len(before))
            processes.send_signal(signal.SIGTERM)
        _, stderr = processes.communicate(timeout=120)
        assert processes.returncode == (42 if count > 2 else 0), stderr
        print(f"{count} processes: {time.perf_counter() - began:.1f} s, at {max(run.steps())}")

    monkeypatch.setenv("NOTED", "alone")
    result = run_main(f"--config={recipe}", f"--workdir={alone.folder}")
    assert result.returncode == 0, result.stderr
    assert {path.name[0] for path in (tmp_path / "noted/elastic").iterdir()} == set("432")
    assert batches(tmp_path / "noted/elastic") == batches(tmp_path / "noted/alone")
    # Bitwise no further: the gradient is summed over the devices, in another order.
    assert_close(run.rows(), alone.rows())
    arrays, expected = (saved_arrays(folder.folder, STEPS) for folder in (run, alone))
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)
    worst = max(
        abs(one[2]["loss"] / other[2]["loss"] - 1)
        for one, other in zip(run.rows(), alone.rows(), strict=True)
    )
    print(f"the loss differs by at most {worst:.1e} of itself")
