"""Eight CPU devices, compiled programs shared between the tests' processes, and short runs."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before JAX is imported, here and in the processes that tests start. Who sets the cache's folder
# keeps it, and has the second run of the tests much faster.
_own_cache = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if _own_cache:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="flaxcls-tests-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What commands give themselves (flaxcls/runtime/huge_pages.py), so that these need no new start.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import pytest  # noqa: E402

from flaxcls import config as configs  # noqa: E402
from flaxcls.errors import SIGNAL_EXIT_CODES  # noqa: E402
from flaxcls.runtime import onednn, sharding  # noqa: E402
from flaxcls.training.train import train_config  # noqa: E402

sharding.set_up_devices(8, 8)
jax.devices()
del os.environ["NPROC"]  # the processes that tests start choose their own

# The same values every time, on machines of any speed; others by --hypothesis-profile=thorough.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("fixed")

ROOT = Path(__file__).parent.parent

_spec = importlib.util.spec_from_file_location("buckets", ROOT / "tests" / "buckets.py")
buckets = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(buckets)
gcs_server, s3_server = buckets.gcs_server, buckets.s3_server
gcs_bucket, s3_bucket = buckets.gcs_bucket, buckets.s3_bucket
bucket, bucket_server = buckets.bucket, buckets.bucket_server


def pytest_unconfigure(config):
    if _own_cache:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture
def tpu_compiler(monkeypatch):
    """Lets this process compile for TPUs that aren't there."""
    from flaxcls.plan import ENVIRONMENT

    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the compiler for TPUs is not installed")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """A command that runs inside this process takes Ctrl-C over; give it back."""
    before = {number: signal.getsignal(number) for number in SIGNAL_EXIT_CODES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def convolutions_by_xla(monkeypatch):
    """Also where oneDNN is installed; its own tests take this back, and processes have it."""
    monkeypatch.setattr(onednn, "version", lambda: None)


# What looks at compiled programs, or compares itself with processes of users' own.
FULLY_OPTIMIZED = (
    *("integration", "launch", "test_bench.py", "test_collectives.py", "test_compilation_cache.py"),
    *("test_export.py", "test_gpu_kit.py", "test_plan.py", "test_profile.py"),
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Programs that a test runs some times are compiled without most optimizations.

    Compiling them takes far longer than running them. Processes that tests start have what users
    have.
    """
    place = request.path.relative_to(ROOT / "tests")
    jax.config.update("jax_disable_most_optimizations", place.parts[0] not in FULLY_OPTIMIZED)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, also beside a PyTorch that it was not built for; skips the test without it."""
    path = ROOT / "tests" / "models" / "references.py"
    spec = importlib.util.spec_from_file_location("references", path)
    references = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(references)
    return references.torchvision()


@pytest.fixture
def tiny_config():
    """The config of a run of seconds, 12 steps on 96 made-up images of 8x8; changes by path."""

    def make(**changes):
        config = configs.default()
        config.batch_size = 16
        config.duration = "12 steps"
        config.log_every = "3 steps"
        config.eval.every = "6 steps"
        config.checkpoint.every = "4 steps"
        config.data.name = "fake"
        config.data.image_shape = (8, 8, 1)
        config.data.num_classes = 5
        config.data.num_examples = 96
        config.model.name = "dense"
        config.model.widths = (16,)
        config.optimizer.momentum = 0.9
        for path, value in changes.items():
            section, names = config, path.split("__")
            for name in names[:-1]:
                section = section[name]
            section[names[-1]] = value
        return config

    return make


RECIPE = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 16
    config.duration = "12 steps"
    config.log_every = "3 steps"
    config.eval.every = "6 steps"
    config.checkpoint.every = "4 steps"
    config.data.name = "digits"
    config.data.train_split = "train[:96]"
    config.data.eval_split = "test[:50]"
    config.model.name = "dense"
    config.model.widths = (16,)
    config.optimizer.momentum = 0.9
    config.mesh.cpu_devices = 2
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    """The file of a recipe that runs for seconds: 12 steps of a dense network on 96 digits."""
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The folder of a run of a small convolutional network on digits, right on some 95 % of them.

    It is for reading only: a test that changes a run copies it first.
    """
    config = configs.default()
    config.batch_size, config.duration, config.eval.every = 64, "4 epochs", "4 epochs"
    config.data.name, config.model.name = "digits", "digits_cnn"
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 3e-3
    workdir = tmp_path_factory.mktemp("digits") / "run"
    train_config(config, workdir)
    return workdir


@pytest.fixture
def start_python():
    """Starts `python ARGUMENTS` in the checkout; what is left is killed at the end of the test."""
    processes = []

    def starter(*arguments, python=sys.executable, **options):
        command = [python, *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        processes.append(subprocess.Popen(command, cwd=ROOT, **options))
        return processes[-1]

    yield starter
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.fixture
def start_main(start_python):
    """Starts `python -m MODULE ARGUMENTS` in the checkout.

    A run makes no page, which takes seconds, unless it is asked to by --report.
    """

    def starter(*arguments, module="flaxcls.main", **options):
        if module == "flaxcls.main" and "--report" not in arguments:
            arguments = (*arguments, "--noreport")
        return start_python("-m", module, *arguments, **options)

    return starter


@pytest.fixture
def run_main(start_main):
    """Runs a command to its end: a CompletedProcess with text, and `seconds`."""

    def runner(*arguments, timeout=240, **options):
        began = time.perf_counter()
        process = start_main(*arguments, **options)
        stdout, stderr = process.communicate(timeout=timeout)
        result = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        result.seconds = time.perf_counter() - began
        return result

    return runner


@pytest.fixture
def saved_arrays():
    """All arrays of a checkpoint by path, read by Orbax alone: step, parameters, optimizer, ..."""

    def read(workdir, step):
        path = (Path(workdir) / "checkpoints" / str(step) / "state").resolve()
        with ocp.PyTreeCheckpointer() as checkpointer:
            shapes = checkpointer.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree = checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}

    return read


@pytest.fixture
def assert_same_arrays():
    """Fails unless two dicts of arrays are bitwise the same."""

    def check(first, second):
        assert first.keys() == second.keys()
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name], err_msg=name)

    return check
