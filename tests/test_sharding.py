import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from flaxcls import sharding
from flaxcls.errors import ConfigError


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_mesh_has_all_devices(fsdp):
    mesh = sharding.make_mesh(fsdp)
    assert mesh.size == 8 and dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}
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
