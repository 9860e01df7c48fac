import ast
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from flaxcls import build, models
from flaxcls.errors import ConfigError, DataError
from flaxcls.runtime import sharding


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_mesh_has_all_devices(fsdp):
    mesh = sharding.make_mesh(fsdp)
    assert mesh.size == 8 and dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp, "model": 1}
    assert f"data {8 // fsdp}, fsdp {fsdp}" in sharding.describe(mesh)


@pytest.mark.parametrize("fsdp", [0, 3, 16])
def test_mesh_that_does_not_fit_the_devices_is_refused(fsdp):
    with pytest.raises(ConfigError, match=f"divide the number of devices, 8, got {fsdp}"):
        sharding.make_mesh(fsdp)


def test_batch_must_split_over_the_devices():
    mesh = sharding.make_mesh()
    sharding.check_batch_size(mesh, 24)
    with pytest.raises(ConfigError, match="multiple of the 8 devices, got 20"):
        sharding.check_batch_size(mesh, 20)


def test_rules_split_large_kernels_along_their_largest_axis_only():
    shapes = {
        "kernel": (256, 512),
        "wide/kernel": (512, 256),
        "small/kernel": (16, 16),
        "odd/kernel": (129, 513),
        "only_one_fits/kernel": (3, 3, 513, 64),
        "bias": (2**15,),
        "mean": (2**15,),
        "step": (),
    }
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = {k: v.spec for k, v in sharding.shardings(sharding.make_mesh(4), tree).items()}
    assert specs == {
        "kernel": PartitionSpec(None, "fsdp"),
        "wide/kernel": PartitionSpec("fsdp", None),
        "small/kernel": PartitionSpec(),
        "odd/kernel": PartitionSpec(),
        "only_one_fits/kernel": PartitionSpec(None, None, None, "fsdp"),
        "bias": PartitionSpec(),
        "mean": PartitionSpec(),
        "step": PartitionSpec(),
    }
    assert {v.spec for v in sharding.shardings(sharding.make_mesh(), tree).values()} == {
        PartitionSpec()
    }


def test_batch_is_split_in_order_over_both_axes():
    batch = sharding.split_batch(sharding.make_mesh(2), {"index": np.arange(16, dtype=np.int32)})
    np.testing.assert_array_equal(batch["index"], np.arange(16))
    parts = [np.asarray(shard.data).tolist() for shard in batch["index"].addressable_shards]
    assert sorted(parts) == [[2 * i, 2 * i + 1] for i in range(8)]


@pytest.mark.parametrize("batch_size", [1, 7, 12, 128])
def test_cpu_devices_divide_the_batch_and_do_not_exceed_the_cores(monkeypatch, batch_size):
    for cores in (1, 2, 3, 64):
        monkeypatch.setattr(
            "os.sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False
        )
        count = sharding.cpu_devices(batch_size)
        assert 1 <= count <= min(cores, 8) and batch_size % count == 0
    assert sharding.cpu_devices(128) == 8


def test_a_cpu_is_one_device_where_onednn_computes_on_all_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(sharding.onednn, "version", lambda: "3.2.0")
    assert sharding.cpu_devices(128) == 1
    tokens = {name: models.is_of_tokens(name) for name in ("vit_s16", "mixer", "swin_t", "quick")}
    assert tokens == {"vit_s16": True, "mixer": True, "swin_t": True, "quick": False}
    assert sharding.cpu_devices(128, tokens=True) == 8


@pytest.mark.parametrize(
    ("count", "num_processes", "threads"), [(1, 1, None), (2, 1, "8"), (3, 1, "12"), (1, 2, "8")]
)
def test_devices_that_wait_for_each_other_have_threads_to_spare(
    monkeypatch, count, num_processes, threads
):
    monkeypatch.delenv("NPROC", raising=False)
    sharding.set_up_devices(count, 12, num_processes)
    assert os.environ.pop("NPROC", None) == threads


class FakeDevice(NamedTuple):
    platform: str
    compute_capability: str | None = None


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        (FakeDevice("cpu"), "float32"),
        (FakeDevice("tpu"), "bfloat16"),
        (FakeDevice("gpu", "6.1"), "float32"),
        (FakeDevice("gpu", "7.5"), "float32"),
        (FakeDevice("gpu", "8.0"), "bfloat16"),
        (FakeDevice("gpu", "9.0"), "bfloat16"),
        (FakeDevice("gpu", "12.0"), "bfloat16"),
        (FakeDevice("gpu", "gfx90a"), "bfloat16"),
        (FakeDevice("gpu"), "bfloat16"),
    ],
)
def test_network_is_computed_in_bfloat16_where_the_device_has_it(tiny_config, device, dtype):
    assert sharding.fast_dtype(device) == dtype
    mesh = SimpleNamespace(devices=np.empty((1, 1), object))
    mesh.devices[0, 0] = device
    assert sharding.platform(mesh) == device.platform
    assert build.model(tiny_config(), mesh, 5, ((8, 8, 1),)).dtype == dtype
    given = tiny_config(model__dtype="float32")
    assert build.model(given, mesh, 5, ((8, 8, 1),)).dtype == "float32"


def test_platform_is_asked_of_the_mesh_alone():
    for path in Path(sharding.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = getattr(node, "attr", None), getattr(node, "id", None)
            assert "default_backend" not in names, f"{path}:{node.lineno}"


def numbered(count, taken=None):
    """Batches that hold their number; `taken` collects the numbers of those that were asked for."""
    for number in range(count):
        if taken is not None:
            taken.append(number)
        yield {"index": np.full(8, number, np.int32)}


def transfer_threads():
    return [each for each in threading.enumerate() if each.name.startswith("flaxcls-transfer")]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_prefetched_batches_keep_their_order_and_their_places(count, ahead):
    mesh = sharding.make_mesh()
    batches = list(sharding.prefetch(mesh, numbered(count), ahead))
    assert [int(batch["index"][0]) for batch in batches] == list(range(count))
    assert all(batch["index"].sharding.spec == sharding.BATCH for batch in batches)
    assert not transfer_threads()


def test_batches_are_prefetched_while_the_last_one_is_used():
    taken = []
    batches = sharding.prefetch(sharding.make_mesh(), numbered(100, taken), ahead=2)
    for number in range(3):
        next(batches)
        deadline = time.monotonic() + 5
        while len(taken) < number + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert taken == list(range(number + 3))
    batches.close()


def test_error_of_the_input_comes_out_after_the_batches_before_it():
    def failing():
        yield from numbered(3)
        raise DataError("cat.jpg is not a readable image")

    batches, seen = sharding.prefetch(sharding.make_mesh(), failing()), []
    with pytest.raises(DataError, match="^cat.jpg is not a readable image$"):
        for batch in batches:
            seen.append(int(batch["index"][0]))
    assert seen == [0, 1, 2] and not transfer_threads()


def test_closing_a_prefetched_input_ends_its_thread():
    batches = sharding.prefetch(sharding.make_mesh(), numbered(10**9))
    next(batches)
    assert len(transfer_threads()) == 1
    batches.close()
    assert not transfer_threads()


@pytest.fixture
def no_implicit_transfers():
    """Forbids them in all threads: what `jax.transfer_guard` says holds in its own thread only."""
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow")
    yield
    jax.config.update("jax_transfer_guard", before)


def test_prefetched_batches_are_put_on_the_devices_explicitly(no_implicit_transfers):
    mesh = sharding.make_mesh()
    assert len(list(sharding.prefetch(mesh, numbered(3)))) == 3
    implicit = ({"index": jnp.asarray(batch["index"])} for batch in numbered(3))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        list(sharding.prefetch(mesh, implicit))
