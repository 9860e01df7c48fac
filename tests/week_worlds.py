"""Where the run of the simulated week can be, and what befalls it there; see test_week.py."""

import collections
import itertools
import os
import resource
import signal
import subprocess
import threading
import time

STRETCH = 150  # batches, of which six in a row are NaN: the run rolls back twice
# What is measured in the process at each save, and the bad batches. Where saves fail, as
# on a full disk, a run rolls back to another checkpoint, and other examples follow, rightly so; a
# fault may therefore not begin near a bad batch, and is over before one comes: here the run waits.
RECIPE = """
import contextlib
import os
import time
from pathlib import Path

import jax.numpy as jnp

from flaxcls import augment
from flaxcls.config import default
from flaxcls.training import session

FOLDER, STRETCH = Path({folder!r}), {stretch}
build, save = augment.build, session.Session._save


def get_config():
    config = default()
    config.batch_size = 16
    config.duration = "{steps} steps"
    config.log_every = "1 steps"
    config.eval.every = "100 steps"
    config.checkpoint.every = "1 steps"
    config.checkpoint.keep = 3
    config.divergence.max_skipped = 3
    config.divergence.within = "100 steps"
    config.data.name = "digits"
    config.data.train_split = "train[:96]"
    config.data.eval_split = "test[:50]"
    config.model.name = "dense"
    config.model.widths = (16,)
    config.ema_decay = 0.9
    config.optimizer.momentum = 0.9
    config.mesh.cpu_devices = 1
    return config


def poisoned(*arguments, **options):
    augmentation = build(*arguments, **options)

    def apply(key, batch):
        bad = (batch["epoch"] % (STRETCH // 6) == STRETCH // 12)[:, None, None, None]
        batch = augmentation(key, batch)
        return {{**batch, "image": jnp.where(bad, jnp.nan, batch["image"])}}

    return apply


def measured(self, state, must=False):
    began = time.perf_counter()
    save(self, state, must)
    seconds = time.perf_counter() - began
    offset = self._progress["data_offset"]
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    row = (self.step, offset, os.getpid(), time.time(), seconds, memory)
    row += (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))
    row += (time.process_time(),)
    with contextlib.suppress(OSError):  # the disk is full
        os.write(rows, (" ".join(map(str, row)) + "\\n").encode())
    while (self.step + offset) % STRETCH == STRETCH // 2 - 8 and (FOLDER / "fault").exists():
        time.sleep(0.01)


FOLDER.mkdir(exist_ok=True)
rows = os.open(FOLDER / "rows", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
augment.build, session.Session._save = poisoned, measured
"""
COLUMNS = ("step", "offset", "process", "time", "seconds", "memory", "files", "threads", "cpu")


class World:
    """A run somewhere, and what can befall it there; the driver of the week knows only this.

    Attributes:
      length: the steps of the run, each of which is saved.
      first_fault, next_fault: after so many saves, at least and at most, of a process a fault may
        begin, and another one after that.
      starts: when the run was started, seconds since 1970 each.
      not_saved: how many checkpoints it has said that it could not save.
      left: how many folders a process that was killed had left in its $TMPDIR, for each.
    """

    length: int
    first_fault: tuple[int, int]
    next_fault: tuple[int, int]
    patience = 5  # seconds at most that a fault lasts
    connections = 0  # to a store, which come and go

    def __init__(self, folder, run, start_main, rng):
        self.run, self._folder, self._rng = run, folder, rng
        self._measured, self._temporary = folder / "measured", folder / "tmp"
        self._recipe, self._start_main, self.process = folder / "week.py", start_main, None
        folder.mkdir()
        self._temporary.mkdir()
        self._recipe.write_text(
            RECIPE.format(folder=str(self._measured), steps=self.length, stretch=STRETCH)
        )
        self._seen, self._rows = 0, []
        self.environment = {}  # of the run's process, besides this one's
        self.starts, self.not_saved, self.left = [], 0, []

    def start(self):
        """Starts the run, or resumes it."""
        arguments = (f"--config={self._recipe}", f"--workdir={self.run}")
        environment = {**os.environ, **self.environment, "TMPDIR": str(self._temporary)}
        self.starts.append(time.time())
        self.process = self._start_main(*arguments, stderr=subprocess.STDOUT, env=environment)
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, output):
        # Not a file, which a limit of the size of files would reach as well.
        with (self._folder / "output").open("a", buffering=1) as file:
            for line in output:
                file.write(line)
                self.not_saved += " not saved: " in line

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.left.append(len(self.temporary()))

    def fault(self):
        """From now on no checkpoint can be written; why, or "" if that may not be now."""
        self.process.send_signal(signal.SIGSTOP)
        last = self.rows()[-1]
        batch = (last["step"] + last["offset"]) % STRETCH
        may_be = not STRETCH // 2 - 20 <= batch < STRETCH // 2 + 20
        if may_be:
            (self._measured / "fault").touch()
            what = self._fail()
        self.process.send_signal(signal.SIGCONT)
        return what if may_be else ""

    def mend(self):
        self._mend()
        (self._measured / "fault").unlink(missing_ok=True)

    def damage(self):
        """Damages a file of the newest checkpoint, while no process runs; how."""
        newest = max(self.steps())
        files = sorted(p for p in (self.run / f"checkpoints/{newest}").rglob("*") if p.is_file())
        path = self._rng.choice([file for file in files if not file.name.startswith("_CHECKP")])
        how = self._rng.choice(("a bit flipped", "truncated", "missing"))
        content = bytearray(path.read_bytes())
        if how == "missing":
            path.unlink()
        elif how == "truncated":
            path.write_bytes(bytes(content[: len(content) // 2]))
        else:
            content[self._rng.randrange(len(content))] ^= 1 << self._rng.randrange(8)
            path.write_bytes(bytes(content))
        return how

    def temporary(self):
        """What processes have left in their $TMPDIR."""
        return os.listdir(self._temporary)

    def rows(self):
        """What was measured until now, a dict for each save."""
        path = self._measured / "rows"
        content = path.read_bytes()[self._seen :] if path.exists() else b""
        content = content[: content.rfind(b"\n") + 1]  # the last line may be half written
        self._seen += len(content)
        for line in content.decode().splitlines():
            self._rows.append(dict(zip(COLUMNS, map(float, line.split()), strict=True)))
        return self._rows


class LocalDisk(World):
    """A folder of this machine, whose disk is full now and then."""

    length = 2000  # a checkpoint every five minutes of a week
    first_fault, next_fault = (20, 200), (60, 300)

    def __init__(self, folder, start_main, rng):
        super().__init__(folder, folder / "run", start_main, rng)

    def _fail(self):
        self._limit(64)
        return "full disk"

    def _mend(self):
        self._limit(resource.RLIM_INFINITY)

    def _limit(self, size):
        """RLIMIT_FSIZE stands for a full disk: what is written beyond it fails."""
        if self.process.poll() is None:
            limits = size, resource.RLIM_INFINITY
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limits)

    def steps(self):
        return [int(p.name) for p in self.run.glob("checkpoints/[0-9]*") if p.name.isdigit()]

    def is_torn(self):
        """Whether something of a checkpoint is there that is none."""
        return any(self.run.glob("checkpoints/*tmp*"))

    def copy(self):
        return self.run


class Bucket(World):
    """A bucket that is reached by `proxy`, which makes it fail: single requests at any time, and
    for some seconds all of them. Without one it is left alone.
    """

    length = 600  # a save takes an emulator longer than a disk
    first_fault, next_fault = (5, 30), (15, 50)
    connections = 15  # the clients keep a dozen, and close those that were not used for 12 s
    WRITES = "^(PUT|POST|DELETE) "
    PASSING = (  # of single requests, which are asked again
        {"fault": "status", "status": 503},
        {"fault": "status", "status": 429},
        {"fault": "slow", "seconds": 1},
        {"fault": "cut"},
        {"fault": "lost", "match": WRITES},
        {"fault": "refuse"},
    )
    LASTING = {
        "writing is denied (403)": {"fault": "status", "status": 403, "match": WRITES},
        "all is refused (503)": {"fault": "status", "status": 503},
        "all is refused (429)": {"fault": "status", "status": 429},
        "no connection": {"fault": "refuse"},
        "slow": {"fault": "slow", "seconds": 0.5},
        "uploads are cut off": {"fault": "cut", "match": WRITES},
        "answers are lost": {"fault": "lost", "match": WRITES},
    }

    def __init__(self, folder, there, proxy, start_main, rng):
        super().__init__(folder, there.path, start_main, rng)
        self._there, self._proxy, self._kinds = there, proxy, []
        self.environment = proxy.environment if proxy else {}

    def start(self):
        self._mend()
        super().start()

    def kill(self):
        # When a save has begun nothing of it is in the bucket yet: mostly it waits until some is,
        # and looks at the bucket while the process stands still.
        end = time.monotonic() + self._rng.choice((0, 10, 10))
        while self.process.poll() is None and time.monotonic() < end:
            self.process.send_signal(signal.SIGSTOP)
            if self.is_torn():
                break
            self.process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
        super().kill()

    def _fail(self):
        self._kinds = self._kinds or self._rng.sample(sorted(self.LASTING), len(self.LASTING))
        what = self._kinds.pop()  # each once, then all of them again
        # The clients ask again for 12 s (s3fs) and 34 s (gcsfs) before a save has failed.
        self.patience = 20 if "denied" in what else self._rng.choice((1, 5, 20))
        self._proxy.plan(self.LASTING[what])
        return what

    def _mend(self):
        if self._proxy is None:
            return
        self._proxy.plan(
            *({**fault, "every": self._rng.randint(200, 1500)} for fault in self.PASSING)
        )

    def steps(self):
        return self._there.steps()

    def is_torn(self):
        """Whether objects of a step are there that has no manifest, or not any more."""
        return bool(self._there.unfinished())

    def copy(self):
        return self._there.copy()

    def passed(self):
        """How many requests have gone wrong in each way."""
        ends = (line.rpartition(" -> ")[2] for line in self._proxy.log())
        kinds = ("503", "429", "403", "slow", "cut", "lost", "refused")
        return collections.Counter(
            kind for end, kind in itertools.product(ends, kinds) if end.endswith(kind)
        )
