"""TensorBoard's files, read back by tensorboardX's messages."""

import math
import os
import struct
import time

import numpy as np
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2

from flaxcls.runs.metric_log import MetricLog
from flaxcls.runs.tensorboard import TensorBoard, read_events

ROW = {"loss": 0.5, "accuracy": 0.75, "learning_rate": 0.1}


def events(path):
    """Of one file, whose checksums have to be right."""

    def take(size):
        part = bytes(data[:size])
        del data[:size]
        masked = struct.unpack("<I", data[:4])[0]
        del data[:4]
        crc = crc32c(part)
        assert masked == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        return part

    data = bytearray(path.read_bytes())
    while data:
        yield event_pb2.Event.FromString(take(struct.unpack("<Q", take(8))[0]))


@pytest.fixture
def board(tmp_path):
    board = TensorBoard(tmp_path)
    yield board
    board.close()


def scalars(found):
    return {(value.tag, e.step): value.simple_value for e in found for value in e.summary.value}


def files(folder):
    return sorted(folder.glob("events.out.tfevents.*"))


def test_metrics_of_a_run_are_in_its_file(tmp_path):
    with MetricLog(tmp_path, 0, 40, 8) as log:
        log.training(10, 1.0, ROW, (100.0, 0.25))
        log.evaluation(10, 1.0, {"ema": {"accuracy": 0.5, "loss": 1.0, "count": 4}})
    (path,) = files(tmp_path / "tensorboard")
    found = scalars(events(path))
    assert found["train/loss", 10] == 0.5
    assert found["train/learning_rate", 10] == pytest.approx(0.1)
    assert found["ema/accuracy", 10] == 0.5
    assert found["time/images_per_second", 10] == 800
    assert found["time/data_wait", 10] == 0.25


def test_file_begins_as_tensorboard_expects_it(board, tmp_path):
    began = time.time()
    board.open(300)
    version, start = events(files(tmp_path)[0])
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (300, event_pb2.SessionLog.START)
    assert began <= start.wall_time <= time.time()
    board.open(300)  # within the same second
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("step", [0, 1, 127, 128, 16_383, 16_384, 2**31, 2**62])
def test_any_step_is_written(board, tmp_path, step):
    board.add(step, {"a": 1.0})
    *_, event = events(files(tmp_path)[0])
    assert scalars([event]) == {("a", step): 1.0}


def test_numbers_are_those_of_float32_and_nan_is_left_out(board, tmp_path):
    numbers = [0.0, -0.1, 1 / 3, 1e-45, 3.4e38, 1e39, -1e39, math.inf, np.float32(0.7), 5]
    values = {f"über/{i}": number for i, number in enumerate(numbers)}
    board.add(7, {**values, "nan": math.nan, "x" * 300: 2.0})
    found = scalars(events(files(tmp_path)[0]))
    with np.errstate(over="ignore"):
        rounded = [float(np.array(number).astype("f4")) for number in numbers]
    assert found == {
        **{(name, 7): value for name, value in zip(values, rounded, strict=True)},
        ("x" * 300, 7): 2.0,
    }


def test_full_disk_drops_a_file_and_the_next_begins(board, tmp_path):
    board.add(1, {"a": 1.0})
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, board._file.fileno())
    os.close(full)
    board.add(2, {"a": 2.0})
    board.add(3, {"a": 3.0})
    first, second = files(tmp_path)
    assert scalars(events(first)) == {("a", 1): 1.0}
    assert scalars(events(second)) == {("a", 3): 3.0}


def test_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    for board in (TensorBoard(tmp_path / "file" / "board"), TensorBoard(None)):
        board.open(1)
        board.add(1, {"a": 1.0})
        board.close()


def test_what_is_written_is_read_again_as_far_as_it_is_whole(tmp_path):
    board = TensorBoard(tmp_path)
    board.open(300)
    board.add(301, {"a/b": 0.5, "größe": -1e30})
    board.add(2**31, {"a/b": math.inf})
    board.close()
    (path,) = tmp_path.iterdir()
    found = list(read_events(path))
    assert [(event.step, event.is_start) for event in found] == [
        (0, False), (300, True), (301, False), (2**31, False),
    ]  # fmt: skip
    assert found[2].values == {"a/b": 0.5, "größe": pytest.approx(-1e30)}
    assert found[3].values == {"a/b": math.inf}
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        cut = list(read_events(path))
        assert cut == found[: len(cut)] and len(cut) < len(found)
    random = np.random.default_rng(0)
    for _ in range(200):  # of whatever else is there nothing is raised
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] = random.integers(256)
        path.write_bytes(damaged)
        list(read_events(path))
