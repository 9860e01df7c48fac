"""The offset index of TFRECORD files: right, kept, and never trusted when stale or broken."""

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.record_writer import RecordWriter

from flaxcls.data import tfrecord
from flaxcls.errors import DataError

RECORDS = [b"one", b"", b"three" * 100, b"4"]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/train.tfrecord"
    write(path, RECORDS)
    return path


def write(path, records):
    path.unlink(missing_ok=True)
    writer = RecordWriter(str(path))  # whose checksums are not ours
    for record in records:
        writer.write(record)
    writer.close()


def read(path, skip=0, take=4, count=4):
    part = SimpleNamespace(filename=str(path), skip=skip, take=take, examples_in_shard=count)
    records = tfrecord.TfRecords([part])
    return [records[i] for i in range(len(records))]


def test_a_flipped_bit_anywhere_in_a_record_is_found_by_its_checksums(path):
    part = SimpleNamespace(filename=str(path), skip=1, take=3, examples_in_shard=4)
    records, content = tfrecord.TfRecords([part]), path.read_bytes()
    for index in range(3):
        records.verify(index)
    begin = 16 + len(RECORDS[0]) + 16 + len(RECORDS[1])
    size = len(RECORDS[2])
    for offset in (8, 11, 12, 12 + size // 2, 12 + size, 15 + size):  # checksum, data, checksum
        damaged = bytearray(content)
        damaged[begin + offset] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(
            DataError, match=f"{path} is damaged: .* record at byte {begin} differs"
        ):
            records.verify(1)
        records.verify(0)
        records.verify(2)


def beside(path):
    return path.parent / ".train.tfrecord.offsets.npy"


def test_records_are_read_exactly_and_at_random(path):
    assert read(path) == RECORDS
    assert read(path, skip=1, take=2) == RECORDS[1:3]


def test_second_opening_does_not_scan(path, monkeypatch):
    read(path)
    assert beside(path).exists()
    monkeypatch.setattr(tfrecord, "_scan", None)
    assert read(path) == RECORDS


def test_read_only_folder_keeps_its_index_in_the_users_cache(path, tmp_path, monkeypatch):
    path.parent.chmod(0o555)  # respected even by root
    assert read(path) == RECORDS
    assert os.listdir(path.parent) == ["train.tfrecord"]
    assert len(list((tmp_path / "cache/flaxcls").glob("*.npy"))) == 1
    monkeypatch.setattr(tfrecord, "_scan", None)
    assert read(path) == RECORDS


def test_nothing_writable_still_reads(path, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path.parent.chmod(0o555)
    assert read(path) == RECORDS


def test_stale_index_is_rebuilt(path):
    read(path)
    write(path, RECORDS[::-1])  # of the same size
    os.utime(path, ns=(1, 1))
    assert read(path) == RECORDS[::-1]
    write(path, RECORDS[:2])
    assert read(path, take=2, count=2) == RECORDS[:2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"not an array at all",
        lambda content: content[:-16] + b"\xff" * 8 + content[-8:],
        lambda content: content[:-8],
    ],
)
def test_corrupt_index_is_rebuilt(path, damage):
    read(path)
    good = beside(path).read_bytes()
    beside(path).write_bytes(damage(good))
    assert read(path) == RECORDS
    assert beside(path).read_bytes() == good


def test_interrupted_write_leaves_no_index(path, monkeypatch):
    def full_disk(file, index):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    assert read(path) == RECORDS
    assert os.listdir(path.parent) == ["train.tfrecord"]


@pytest.mark.parametrize("cut", [1, 5, 16, 20, 100])
def test_truncated_file_is_named(path, cut):
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    with pytest.raises(DataError, match="train.tfrecord (is cut short|holds 3 records)"):
        read(path)


def test_file_of_another_kind_is_named(path):
    path.write_bytes(b"\x89PNG" * 50)
    with pytest.raises(DataError, match="is cut short or not a TFRECORD file"):
        read(path)


def test_missing_file_is_named(path):
    path.unlink()
    with pytest.raises(DataError, match="train.tfrecord cannot be read: No such file"):
        read(path)


def test_wrong_number_of_records_is_named(path):
    with pytest.raises(DataError, match="holds 4 records where dataset_info.json says 5"):
        read(path, count=5)


def test_file_changed_while_open_is_named(path):
    part = SimpleNamespace(filename=str(path), skip=0, take=4, examples_in_shard=4)
    records = tfrecord.TfRecords([part])
    write(path, [b"something else"] * 30)
    with pytest.raises(DataError, match="has changed since it was opened"):
        records[2]


def test_threads_read_the_same_file_at_once(path):
    write(path, [b"%d" % i * (i % 50) for i in range(300)])
    part = SimpleNamespace(filename=str(path), skip=0, take=300, examples_in_shard=300)
    records = tfrecord.TfRecords([part])
    wrong = []

    def check():
        for i in range(300):
            if records[i] != b"%d" % i * (i % 50):
                wrong.append(i)

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
