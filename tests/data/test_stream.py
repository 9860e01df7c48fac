"""A batch is a function of (seed, step) and the data, whoever makes it; nothing is left behind."""

import errno
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from flaxcls.data import open_source
from flaxcls.data.loader import BrokenImages, Loader
from flaxcls.data.order import Order
from flaxcls.data.resident import Resident, gather
from flaxcls.data.source import Example, Source
from flaxcls.data.stream import Stream, Workers, default_workers
from flaxcls.data.transform import CenterCrop, RandomResizedCrop
from flaxcls.errors import ConfigError, DataError, WorkersError

# What a thread dies of would only be printed.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

SIZE = 53  # examples; a prime number


class Listed(Source):
    """Examples from a function of their index, as a source; counts what is read."""

    def __init__(self, count, make, image_shape=(None, None, 3)):
        super().__init__(
            name="listed",
            split="train",
            class_names=["a", "b", "c"],
            image_shape=image_shape,
            fingerprint="",
        )
        self.count, self.make, self.reads = count, make, 0
        self.lock = threading.Lock()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        with self.lock:
            self.reads += 1
        return Example(self.make(index), index % 3)


def pixels_of(index):
    return np.random.default_rng(index).integers(0, 256, (9 + index % 4, 12, 3), np.uint8)


def encode(image, suffix=".png"):
    return cv2.imencode(suffix, image)[1].tobytes()


FILES = [encode(pixels_of(index)) for index in range(SIZE)]
BROKEN = (3, 4, 40)


def pictures(broken=()):
    return Listed(SIZE, lambda index: FILES[index][: 40 if index in broken else None])


def make(source=None, *, batch_size=12, workers=(2, 0, 3), size=8, repeats=1, **options):
    source = source or pictures()
    order = Order(len(source), batch_size=batch_size, seed=5, repeats=repeats)
    return Stream(
        options.pop("loader", Loader(source, RandomResizedCrop())),
        order,
        image_size=size if callable(size) else lambda step: size,
        workers=Workers(*workers),
        **options,
    )


def rows_of(number, hosts):
    return lambda batch_size: np.split(np.arange(batch_size), hosts)[number]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, column in first.items():
        assert column.dtype == second[name].dtype
        np.testing.assert_array_equal(column, second[name], err_msg=name)


def concatenate(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def take(stream, start, stop):
    try:
        return list(stream.batches(start, stop))
    finally:
        stream.close()


@pytest.fixture(scope="module")
def expected():
    """14 batches, over three borders between epochs, by one thread without reading ahead."""
    return take(make(workers=(1, 0, 0)), 0, 14)


# Which batches come.


def test_batch_is_what_the_order_and_the_transform_say(expected):
    order, loader = Order(SIZE, batch_size=12, seed=5), Loader(pictures(), RandomResizedCrop())
    for step, batch in enumerate(expected):
        plan, draws = order.batch(step), order.draws(step, 24)
        assert batch.keys() == {"image", "label", "index", "epoch", "broken"}
        assert batch["image"].shape == (12, 8, 8, 3) and batch["image"].dtype == np.uint8
        for name, column in plan.items():
            np.testing.assert_array_equal(batch[name], column)
        np.testing.assert_array_equal(batch["label"], plan["index"] % 3)
        assert batch["label"].dtype == np.int32 and not batch["broken"].any()
        for row in (0, 7, 11):
            image, _ = loader(plan["index"][row], 8, draws[row].tolist())
            np.testing.assert_array_equal(batch["image"][row], image)


def test_every_example_comes_once_an_epoch_with_other_crops(expected):
    together = concatenate(expected)
    for epoch in range(3):
        index = together["index"][together["epoch"] == epoch]
        np.testing.assert_array_equal(np.sort(index), np.arange(SIZE))
    seventh = together["image"][together["index"] == 7]
    assert len(seventh) >= 3 and not np.array_equal(seventh[0], seventh[1])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_have_the_batch_of_one(expected, hosts):
    parts = [take(make(rows=rows_of(number, hosts)), 0, 14) for number in range(hosts)]
    for step, batch in enumerate(expected):
        rows = [part[step] for part in parts]
        assert all(len(column) == 12 // hosts for part in rows for column in part.values())
        assert_same(concatenate(rows), batch)


@pytest.mark.parametrize("workers", [(1, 0, 1), (2, 0, 9), (8, 0, 2), (8, 0, 0)])
def test_number_of_threads_and_reading_ahead_change_nothing(expected, workers):
    for batch, other in zip(take(make(workers=workers), 0, 14), expected, strict=True):
        assert_same(batch, other)


def test_resumed_stream_goes_on_with_the_same_batches(expected):
    for start in (1, 4, 5, 13):
        for batch, other in zip(take(make(), start, 14), expected[start:], strict=True):
            assert_same(batch, other)
    stream = make()
    for step in (11, 2, 2):
        assert_same(stream.batch(step), expected[step])
    stream.close()


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_of_sizes_that_divide_by_nothing(batch_size):
    steps = -(-2 * SIZE // batch_size)
    together = concatenate(take(make(batch_size=batch_size), 0, steps))
    for epoch in range(2):
        index = together["index"][together["epoch"] == epoch]
        np.testing.assert_array_equal(np.sort(index), np.arange(SIZE))


def test_repeated_examples_are_cropped_differently():
    batch = take(make(repeats=3), 2, 3)[0]
    np.testing.assert_array_equal(batch["index"], np.repeat(batch["index"][::3], 3))
    for images in batch["image"].reshape(4, 3, *batch["image"].shape[1:]):
        assert len({image.tobytes() for image in images}) == 3


def test_without_a_transform_it_equals_a_resident_split():
    images = np.random.default_rng(0).integers(0, 256, (SIZE, 4, 6, 3), np.uint8)
    source = Listed(SIZE, images.__getitem__, image_shape=(4, 6, 3))
    resident = Resident(images, np.arange(SIZE) % 3, Order(SIZE, batch_size=12, seed=5))
    stream = make(source, loader=Loader(source), size=None)
    for batch, plan in zip(stream.batches(0, 14), resident.batches(0, 14), strict=True):
        batch.pop("broken")
        assert_same(batch, {k: np.asarray(v) for k, v in gather(resident.arrays, plan).items()})
    evaluations = (stream.evaluation_batches(8), resident.evaluation_batches(8))
    for batch, plan in zip(*evaluations, strict=True):
        assert_same(batch, {k: np.asarray(v) for k, v in gather(resident.arrays, plan).items()})
    stream.close()


def test_image_size_follows_its_schedule(expected):
    stream = make(size=lambda step: 8 if step < 3 else 5)
    batches = take(stream, 0, 6)
    assert [batch["image"].shape[1:3] for batch in batches] == [(8, 8)] * 3 + [(5, 5)] * 3
    for step in range(3):
        assert_same(batches[step], expected[step])
    assert_same(stream.batch(4), batches[4])
    stream.close()


def test_images_of_different_sizes_need_a_transform():
    source = Listed(SIZE, pixels_of, image_shape=(9, 12, 3))
    with pytest.raises(ConfigError, match="listed has images of different sizes"):
        take(make(source, loader=Loader(source), size=None), 0, 5)


# Evaluation.


def evaluation(source=None, workers=(2, 0, 3), **options):
    loader = Loader(source or pictures(), CenterCrop())
    return Stream(loader, image_size=lambda step: 8, workers=Workers(*workers), **options)


@pytest.mark.parametrize("batch_size", [4, 12, 64])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_has_every_example_once(hosts, batch_size):
    streams = [evaluation(rows=rows_of(number, hosts)) for number in range(hosts)]
    batches = [
        concatenate(rows)
        for rows in zip(*[s.evaluation_batches(batch_size) for s in streams], strict=True)
    ]
    for stream in streams:
        stream.close()
    assert len(batches) == -(-SIZE // batch_size)
    together = concatenate(batches)
    counted = together["mask"] == 1
    np.testing.assert_array_equal(together["index"][counted], np.arange(SIZE))
    np.testing.assert_array_equal(together["label"][counted], np.arange(SIZE) % 3)
    loader = Loader(pictures(), CenterCrop())
    for index in (0, 31, SIZE - 1):
        np.testing.assert_array_equal(together["image"][index], loader(index, 8, [])[0])


def test_unreadable_image_ends_an_evaluation_by_name():
    stream = evaluation(pictures(BROKEN), broken=BrokenImages(SIZE, 1.0, print))
    with pytest.raises(DataError, match="^example 3 of listed 'train' is not a readable image"):
        list(stream.evaluation_batches(12))
    stream.close()


# Broken images.


def test_broken_images_are_replaced_counted_and_reported_once(expected):
    said = []
    broken = BrokenImages(SIZE, len(BROKEN) / SIZE, said.append)
    batches = take(make(pictures(BROKEN), broken=broken), 0, 14)
    for batch, whole in zip(batches, expected, strict=True):
        was_broken = np.isin(whole["index"], BROKEN)
        np.testing.assert_array_equal(batch["broken"], was_broken)
        assert batch["broken"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"][~was_broken], whole["image"][~was_broken])
        substitutes = {3: 5, 4: 5, 40: 41}
        for given, taken in zip(whole["index"], batch["index"], strict=True):
            assert taken == substitutes.get(int(given), given)
        np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
    assert sorted(said) == sorted(
        f"example {index} of listed 'train' is not a readable image (40 bytes); "
        "another image replaces it"
        for index in BROKEN
    )


@pytest.mark.parametrize("options", [{"workers": (8, 0, 0)}, {"rows": rows_of(1, 2)}])
def test_substitutes_are_the_same_for_all_workers_and_hosts(options):
    def batches(**options):
        return take(make(pictures(BROKEN), broken=BrokenImages(SIZE, 1, str), **options), 0, 9)

    rows = slice(6, 12) if "rows" in options else slice(12)
    for batch, whole in zip(batches(**options), batches(), strict=True):
        assert_same(batch, {name: column[rows] for name, column in whole.items()})


def test_more_broken_images_than_allowed_end_the_training():
    said = []
    stream = make(pictures(BROKEN), broken=BrokenImages(SIZE, 2 / SIZE, said.append))
    with pytest.raises(DataError, match="3 of 53 training images can't be read, more than"):
        list(stream.batches(0, 14))
    assert len(said) == 3
    stream.close()


def test_nothing_is_replaced_unless_that_is_allowed():
    stream = make(pictures(BROKEN))
    with pytest.raises(DataError, match="is not a readable image"):
        list(stream.batches(0, 14))
    stream.close()


# Threads and memory.


def decoding_threads():
    return [each for each in threading.enumerate() if each.name.startswith("flaxcls-decode")]


def test_reading_ahead_is_bounded():
    source = pictures()
    for read_ahead in (0, 1, 5):
        stream, source.reads = make(source, workers=(4, 0, read_ahead)), 0
        batches = stream.batches(0, 100)
        for taken in range(1, 4):
            next(batches)
            deadline = time.monotonic() + 5
            while source.reads < 12 * (taken + read_ahead) and time.monotonic() < deadline:
                time.sleep(0.001)
            assert source.reads == 12 * (taken + read_ahead)
        batches.close()
        stream.close()


def test_closing_in_the_middle_ends_what_was_under_way():
    assert not decoding_threads()
    started, go_on = threading.Event(), threading.Event()

    def slow(index):
        started.set()
        go_on.wait(10)
        return FILES[index]

    source = Listed(SIZE, slow)
    stream = make(source, workers=(2, 0, 50))
    batches = stream.batches(0, 1000)
    taker = threading.Thread(target=lambda: next(batches))
    taker.start()
    assert started.wait(10) and decoding_threads()
    go_on.set()
    taker.join()
    batches.close()
    stream.close()
    assert not decoding_threads()
    assert source.reads < 1000 * 12
    stream.close()  # once more does no harm


def test_closed_stream_can_be_used_again(expected):
    stream = make()
    for _ in range(2):
        assert_same(stream.batch(3), expected[3])
        stream.close()
        assert not decoding_threads()


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_memory_stays_flat_over_thousands_of_batches():
    files = [encode(pixels_of(index), ".jpg") for index in range(SIZE)]
    stream = make(Listed(SIZE, files.__getitem__), batch_size=4, size=32)
    batches = stream.batches(0, 10**6)  # of 12 KB each
    gc.collect()
    sizes = []
    for _ in range(4):
        for _ in range(750):
            next(batches)
        sizes.append(resident_bytes())
    assert sizes[-1] - sizes[0] < 6 * 2**20  # 2,250 batches in between, 27 MiB
    tracemalloc.start()
    usage = []
    for _ in range(3):
        for _ in range(60):
            next(batches)
        gc.collect()
        usage.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    batches.close()
    stream.close()
    assert usage[-1] - usage[1] < 60 * 500  # bytes: nothing is kept of a batch


def test_it_says_who_works_and_what_memory_that_takes():
    stream = make(batch_size=2**10, size=lambda step: 32, workers=(3, 0, 5))
    assert stream.describe() == "streamed by 3 threads, at most 8 batches in memory, 24 MiB"
    stream = make(batch_size=2**10, size=lambda step: 32, workers=(3, 2, 5), rows=rows_of(0, 2))
    assert "streamed by 2 processes of 3 threads, at most 8 batches" in stream.describe()
    assert "12 MiB" in stream.describe()


@pytest.mark.parametrize(
    "cores, expected", [(1, (1, 0)), (8, (8, 0)), (15, (15, 0)), (16, (8, 2)), (100, (8, 12))]
)
def test_workers_follow_the_cores(monkeypatch, cores, expected):
    monkeypatch.setattr("flaxcls.data.stream.available_cores", lambda: cores)
    assert default_workers(7) == (*expected, 7)


# Processes.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of pictures as a source, which other processes can open too; one is broken."""
    root = tmp_path_factory.mktemp("pictures")
    for index, data in enumerate(FILES):
        path = root / "train" / "abc"[index % 3] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if index != 17 else data[:40])
    (root / "val").mkdir()
    for name in "abc":
        (root / "val" / name).mkdir()
        (root / "val" / name / "0.png").write_bytes(FILES[0])
    return open_source("folder", "train", path=str(root))


def in_processes(source, **options):
    return make(source, workers=(2, 2, 3), broken=BrokenImages(SIZE, 1, str), **options)


@pytest.fixture(scope="module")
def processes(folder):
    """A stream with two processes, which the tests share: they take a second to start."""
    stream = in_processes(folder)
    yield stream
    stream.close()


def test_processes_make_the_same_batches(folder, processes):
    expected = take(make(folder, broken=BrokenImages(SIZE, 1, str)), 0, 11)
    assert concatenate(expected)["broken"].sum() >= 2
    for batch, other in zip(processes.batches(0, 11), expected, strict=True):
        assert_same(batch, other)
    assert_same(processes.batch(6), expected[6])


def test_batches_of_processes_are_not_written_over(processes):
    batches = processes.batches(0, 12)
    kept = [(batch, batch["image"].copy()) for batch in batches]
    assert all(np.array_equal(batch["image"], copy) for batch, copy in kept)


def test_unreadable_image_in_a_process_is_named(folder):
    stream = evaluation(folder, (2, 2, 3), broken=BrokenImages(SIZE, 1, str))
    with pytest.raises(DataError, match="train/c/17.png is not a readable image"):
        list(stream.evaluation_batches(16))
    stream.close()


def test_memory_of_processes_is_used_again(processes):
    for _ in processes.batches(0, 30):
        pass
    many = len(processes._pool._memory)
    for _ in processes.batches(0, 60):
        pass
    assert len(processes._pool._memory) == many <= 16


def is_running(pid):
    result = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(result.stdout.strip()) and not result.stdout.startswith("Z")


def wait_for_end(pids, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(map(is_running, pids)):
            return True
        time.sleep(0.05)
    return False


def shared_memory_files(names):
    return [name for name in names if os.path.exists(f"/dev/shm/{name.lstrip('/')}")]


def pids_and_memory(stream):
    pool = stream._pool
    return list(pool._executor._processes), [memory.name for memory in pool._memory]


def test_memory_of_batches_that_nobody_takes_is_used_again(processes):
    counts = []
    for _ in range(12):  # as many rollbacks
        batches = processes.batches(0, 30)
        next(batches)
        batches.close()
        counts.append(len(processes._pool._memory))
    assert counts[-1] <= 8  # twice what one run of batches takes: some may still be written


def test_process_that_dies_is_replaced_and_no_batch_is_lost(folder, capsys):
    expected = take(make(folder, broken=BrokenImages(SIZE, 1, str)), 0, 60)
    stream = in_processes(folder)
    batches = stream.batches(0, 60)
    taken = [next(batches)]
    pids, names = pids_and_memory(stream)
    assert len(pids) == 2 and all(map(is_running, pids))
    os.kill(pids[0], signal.SIGKILL)
    taken += batches
    for batch, other in zip(taken, expected, strict=True):
        assert_same(batch, other)
    assert capsys.readouterr().err == (
        "flaxcls: a process that decodes images has died; the system may have run out of memory: "
        "the workers are restarted (1 of 3 times)\n"
    )
    later, more = pids_and_memory(stream)
    stream.close()
    assert not {*pids} & {*later}
    assert wait_for_end(pids + later) and not shared_memory_files(names + more)


def test_processes_that_die_again_and_again_are_no_fault_of_the_data(folder):
    stream = in_processes(folder)
    batches = stream.batches(0, 10**6)
    with pytest.raises(WorkersError, match="^a process that decodes images has died; ") as caught:
        for _ in range(4):
            next(batches)
            pids, names = pids_and_memory(stream)
            os.kill(pids[0], signal.SIGKILL)
            wait_for_end(pids[:1])
            for _ in itertools.islice(batches, 100):  # a busy machine notices it some batches later
                pass
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    stream.close()
    assert wait_for_end(pids) and not shared_memory_files(names)


def test_threads_decode_where_shared_memory_is_too_small(folder, monkeypatch, capsys):
    expected = take(make(folder, broken=BrokenImages(SIZE, 1, str)), 0, 11)
    fallocate, left = os.posix_fallocate, 2

    def full(file, begin, size):
        nonlocal left
        left -= 1
        if left < 0:  # another program has taken the room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(file, begin, size)

    monkeypatch.setattr("os.posix_fallocate", full)
    whole = in_processes(folder)
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=2**12))
    small = in_processes(folder)
    for stream, why in ((small, "MB needed, 0.0 MB free"), (whole, "No space left on device")):
        for batch, other in zip(stream.batches(0, 11), expected, strict=True):
            assert_same(batch, other)
        (sentence,) = capsys.readouterr().err.splitlines()
        assert "4 threads of this process do it" in sentence and why in sentence
        stream.close()
        monkeypatch.undo()
        monkeypatch.setattr("os.posix_fallocate", full)


SMALL = """
import sys
sys.path.insert(0, {here!r})
from flaxcls.data import open_source
from flaxcls.data.loader import Loader
from flaxcls.data.order import Order
from flaxcls.data.stream import Stream, Workers
from flaxcls.data.transform import RandomResizedCrop

if __name__ == "__main__":
    source = open_source("fake", "train", image_shape=(64, 64, 3), num_examples=256)
    stream = Stream(
        Loader(source, RandomResizedCrop()),
        Order(256, batch_size=64, seed=0),
        image_size=lambda step: 64 if step < 2 else 96,
        workers=Workers(1, 2, 3),
    )
    print(sum(len(batch["label"]) for batch in stream.batches(0, 8)))
    stream.close()
"""


@pytest.mark.parametrize("megabytes", [1, 6, 64])
def test_small_shared_memory_is_no_crash(tmp_path, megabytes):
    script = tmp_path / "program.py"
    script.write_text(SMALL.format(here=str(Path(__file__).parents[2])))
    mount = f"mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("a small /dev/shm can't be mounted here")
    command = f"{mount} && {sys.executable} {script}"
    result = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "512\n"), result.stderr
    assert ("threads of this process do it" in result.stderr) == (megabytes < 64)
    assert len(result.stderr.splitlines()) <= 1


def has_begun(pid):
    """Whether a worker has chosen what signals do to it."""
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.split(":\t", 1) for line in file)
    ignored, caught = (int(fields[name], 16) for name in ("SigIgn", "SigCgt"))
    return ignored & 1 << signal.SIGINT - 1 and caught & 1 << signal.SIGTERM - 1


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_processes_work_on_after_a_signal_to_all_until_they_are_closed(folder):
    stream = in_processes(folder)
    batches = stream.batches(0, 10**6)
    next(batches)
    pids, names = pids_and_memory(stream)
    assert shared_memory_files(names) == names
    deadline = time.monotonic() + 20
    while not all(map(has_begun, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid, number in itertools.product(pids, (signal.SIGINT, signal.SIGTERM)):
        os.kill(pid, number)  # as Ctrl-C or a scheduler does, to the main process too
    for _ in itertools.islice(batches, 20):
        pass
    batches.close()
    stream.close()
    assert not any(map(is_running, pids)) and not shared_memory_files(names)


KILLED = """
import sys, time
sys.path.insert(0, {here!r})
from flaxcls.data import open_source
from flaxcls.data.loader import Loader
from flaxcls.data.order import Order
from flaxcls.data.stream import Stream, Workers
from flaxcls.data.transform import RandomResizedCrop

if __name__ == "__main__":
    source = open_source("fake", "train", image_shape=(16, 16, 3), num_examples=64)
    stream = Stream(
        Loader(source, RandomResizedCrop()),
        Order(64, batch_size=32, seed=0),
        image_size=lambda step: 8,
        workers=Workers(2, 2, 3),
    )
    batches = stream.batches(0, 10**9)
    next(batches)
    pool = stream._pool
    print(*pool._executor._processes, *(memory.name for memory in pool._memory), flush=True)
    for _ in batches:
        pass
"""


def test_death_of_the_main_process_ends_the_others(tmp_path):
    script = tmp_path / "program.py"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    script.write_text(KILLED.format(here=root))
    main = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    words = main.stdout.readline().split()
    pids, names = [int(word) for word in words[:2]], words[2:]
    assert len(names) >= 4 and all(map(is_running, pids))
    main.send_signal(signal.SIGKILL)
    main.wait()
    main.stdout.close()
    assert wait_for_end(pids)
    deadline = time.monotonic() + 10  # Python's own tracker of such memory needs a moment
    while shared_memory_files(names) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not shared_memory_files(names)
