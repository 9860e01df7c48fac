"""What the tests of whole runs share: recipes, waiting for a moment, and what a run has left."""

import itertools
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flaxcls.buckets import as_path

ROOT = Path(__file__).parents[2]
# All that a run can carry: BatchNorm, Adam's moments, an average, a best result, augmentation,
# dropout and accumulation.
EVERYTHING = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 32
    config.gradient_accumulation = 2
    config.duration = "60 steps"
    config.ema_decay = 0.9
    config.log_every = "7 steps"
    config.eval.every = "9 steps"
    config.checkpoint.every = "1 steps"
    config.augment = ({"name": "pad_crop", "padding": 1}, {"name": "mixup", "alpha": 0.2})
    config.data.name = "digits"
    config.data.train_split = "train[:200]"
    config.data.eval_split = "test[:77]"
    config.model.name = "digits_cnn"
    config.model.dropout = 0.2
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.01
    config.schedule.warmup = "5 steps"
    config.mesh.cpu_devices = 2
    return config
"""


POISON = """
from flaxcls import augment
import jax.numpy as jnp
build = augment.build


def poisoned(*arguments, **options):
    augmentation = build(*arguments, **options)

    def apply(key, batch):
        epoch = batch["epoch"]
        bad = ({condition})[:, None, None, None]
        batch = augmentation(key, batch)
        return {{**batch, "image": jnp.where(bad, jnp.nan, batch["image"])}}

    return apply


augment.build = poisoned
"""


@pytest.fixture
def poison():
    """Changes a recipe's file: images become NaN where a condition on `epoch` holds."""

    def change(recipe, condition):
        recipe.write_text(recipe.read_text() + POISON.format(condition=condition))

    return change


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """The file of a recipe of 60 steps with all that a run can carry."""
    path = tmp_path_factory.mktemp("recipe") / "everything.py"
    path.write_text(EVERYTHING)
    return path


@pytest.fixture(scope="session")
def whole(everything):
    """The folder of a run of `everything` that was never interrupted."""
    folder = everything.parent / "whole"
    command = [sys.executable, "-m", "flaxcls.main", "--noreport", f"--config={everything}"]
    subprocess.run([*command, f"--workdir={folder}"], cwd=ROOT, check=True)
    return folder


class Run:
    """The folder of a run, looked at from outside."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def steps(self):
        """The steps that are saved."""
        return [int(p.name) for p in self.folder.glob("checkpoints/[0-9]*") if p.name.isdigit()]

    def unfinished(self):
        """The folders that Orbax writes into before it renames them."""
        return set(self.folder.glob("checkpoints/*tmp*"))

    def rows(self):
        """(step, "train" or "eval" or ..., metrics) of every group of metrics.jsonl."""
        found = []
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            found += [
                (row["step"], key, row[key]) for key in ("train", "eval", "ema") if key in row
            ]
        return found

    def log(self):
        path = self.folder / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    def json(self, name):
        return json.loads((self.folder / name).read_text())


@pytest.fixture
def run_folder():
    return Run


class There:
    """The folder of a run in a bucket, looked at from outside."""

    def __init__(self, url, tmp_path):
        self.path, self._copies = as_path(url), itertools.count()
        self._tmp_path = tmp_path

    def steps(self):
        time.sleep(0.05)  # between two looks, which are requests
        return self._look()[0]

    def unfinished(self):
        """The steps of which something, but no manifest, is there."""
        return self._look()[1]

    def _look(self):
        names = [name.split("/") for name in (self.path / "checkpoints").files()]
        whole = {step for step, *rest in names if rest == ["manifest.json"]}
        return sorted(map(int, whole)), {step for step, *_ in names} - whole

    def log(self):
        path = self.path / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    def copy(self):
        """A copy of all of it."""
        target = self._tmp_path / f"copy{next(self._copies)}"
        self.path.download({name: target / name for name in self.path.files()})
        return target


@pytest.fixture
def bucket_folder():
    return There


@pytest.fixture
def there(bucket, tmp_path):
    return There(f"{bucket}/run", tmp_path)


class Faults:
    """A proxy before the server of a bucket, which does what its plan says."""

    def __init__(self, server):
        command = [sys.executable, str(ROOT / "tests" / "store_proxy.py")]
        self._process = subprocess.Popen(
            [*command, server.url.removeprefix("http://")], stdout=subprocess.PIPE, text=True
        )
        self.url = f"http://127.0.0.1:{self._process.stdout.readline().strip()}"
        self.environment = dict.fromkeys(("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL"), self.url)

    def plan(self, *faults):
        body = json.dumps(faults).encode()
        request = urllib.request.Request(f"{self.url}/_plan", data=body, method="PUT")
        urllib.request.urlopen(request, timeout=30).close()

    def log(self):
        with urllib.request.urlopen(f"{self.url}/_log", timeout=30) as answer:
            return answer.read().decode().splitlines()

    def close(self):
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def proxy(bucket_server):
    """A proxy before the store, for who is given its `environment`."""
    proxy = Faults(bucket_server)
    yield proxy
    proxy.close()


@pytest.fixture
def faults(proxy, monkeypatch):
    """What the processes that a test starts take for the store."""
    for name, value in proxy.environment.items():
        monkeypatch.setenv(name, value)
    return proxy


def wait_until(process, condition, timeout=120):
    """Polls without a pause; False if the process ends before."""
    end = time.monotonic() + timeout
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, "the run does not get there"
        time.sleep(0.0005)
    return False


@pytest.fixture(name="wait_until")
def _wait_until():
    return wait_until


def stopped_step(stderr):
    """The step that a run says it has stopped and saved at."""
    return int(re.search(r"stopped after step (\d+) of \d+ and saved", stderr)[1])


@pytest.fixture(name="stopped_step")
def _stopped_step():
    return stopped_step


@pytest.fixture
def start_two(start_main):
    """Starts two processes with arguments of their own."""

    def start(first, second, **options):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        address = (f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2")
        return [
            start_main(*arguments, *address, f"--process_id={number}", **options)
            for number, arguments in enumerate((first, second))
        ]

    return start


@pytest.fixture
def run_two(start_two):
    """Runs two processes with arguments of their own; [(exit code, stdout, stderr), ...]."""

    def run(first, second, timeout=120):
        started = start_two(first, second)
        outputs = [process.communicate(timeout=timeout) for process in started]
        return [(p.returncode, *texts) for p, texts in zip(started, outputs, strict=True)]

    return run


@pytest.fixture
def start_processes(start_main):
    """Starts N processes by launch/local.py."""

    def start(*arguments, count=2, heartbeat=60):
        own = ("-n", count, f"--heartbeat_timeout={heartbeat}", "--")
        return start_main(*own, *arguments, "--noreport", module="launch.local")

    return start


@pytest.fixture
def run_processes(start_processes):
    """Runs N processes to their end: their code and what they said."""

    def run(*arguments, count=2):
        process = start_processes(*arguments, count=count)
        stdout, stderr = process.communicate(timeout=240)
        return process.returncode, stdout, stderr

    return run


def assert_close(first, second):
    """The same rows with the same counts, and all numbers equal to float tolerance."""
    assert [row[:2] for row in first] == [row[:2] for row in second]
    for (step, group, one), (_, _, other) in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5), (step, group)
        assert one.get("count") == other.get("count")
        assert one.get("accuracy") == other.get("accuracy"), (step, group)


@pytest.fixture(name="assert_close")
def _assert_close():
    return assert_close


@pytest.fixture
def pictures(tmp_path):
    """A folder of 24 pictures of two classes; its path."""
    random = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "pictures" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return tmp_path / "pictures"
