"""ARRAY_RECORD files are read in parts as the package array_record reads them, or refused."""

import random
from typing import NamedTuple

import numpy as np
import pytest

from flaxcls.data.array_record import RemoteArrayRecords
from flaxcls.errors import ConfigError, DataError

module = pytest.importorskip("array_record.python.array_record_module")


class Part(NamedTuple):
    filename: str
    skip: int
    take: int
    examples_in_shard: int


def write(path, records, options):
    writer = module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def some_records(count, largest, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.bytes(int(rng.integers(0, largest))) for _ in range(count)]


@pytest.mark.parametrize("options", ["group_size:1,uncompressed", "group_size:1", "group_size:7"])
@pytest.mark.parametrize("count, largest", [(1, 10), (300, 5000), (40_000, 20)])
def test_records_are_those_that_were_written(tmp_path, options, count, largest):
    if "uncompressed" not in options:
        pytest.importorskip("backports.zstd", reason="Python has zstd from 3.14 on")
    records = some_records(count, largest)
    path = write(tmp_path / "x.array_record", records, options)
    skip = count // 3
    parts = [Part(path, 0, count, count), Part(path, skip, count - skip, count)]
    found, wanted = RemoteArrayRecords(parts), records + records[skip:]
    assert len(found) == len(wanted)
    for index in {0, len(wanted) - 1, *random.Random(0).sample(range(len(wanted)), count // 100)}:
        assert found[index] == wanted[index]


def test_what_is_damaged_is_refused(tmp_path):
    """Any byte may be another: then it is noticed, or what is read is of the same length."""
    records = some_records(20, 30)
    path = write(tmp_path / "x.array_record", records, "group_size:1,uncompressed")
    content = (tmp_path / "x.array_record").read_bytes()
    part, draw, refused = Part(path, 0, 20, 20), random.Random(0), 0
    used = [i for i, value in enumerate(content) if value]
    for _ in range(600):
        broken, position = bytearray(content), draw.choice(used)
        broken[position] = draw.randrange(256)
        (tmp_path / "x.array_record").write_bytes(broken)
        try:
            found = [*RemoteArrayRecords([part])]
            assert [*map(len, found)] == [*map(len, records)]
        except (DataError, ConfigError) as error:
            assert str(error).startswith(path)
            refused += 1
    assert refused > 100
    for size in (0, 1, 1000, len(content) - 1, len(content) - 2**16):
        (tmp_path / "x.array_record").write_bytes(content[:size])
        with pytest.raises(DataError, match="is damaged or not an ARRAY_RECORD file"):
            RemoteArrayRecords([part])


def test_what_is_not_read_in_parts_is_named(tmp_path):
    for options, message in (
        ("group_size:4,transpose", "is written transposed, which is read from local folders only"),
        ("group_size:1,brotli", "is compressed in a way that is read from local folders only"),
    ):
        path = write(tmp_path / "x.array_record", some_records(8, 100), options)
        with pytest.raises(ConfigError, match=message):
            [*RemoteArrayRecords([Part(path, 0, 8, 8)])]
    with pytest.raises(DataError, match="holds 8 records where dataset_info.json says 9"):
        plain = write(tmp_path / "y", some_records(8, 100), "group_size:1,uncompressed")
        RemoteArrayRecords([Part(plain, 0, 9, 9)])
