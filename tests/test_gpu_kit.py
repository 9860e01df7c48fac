"""The kit of benchmarks/gpu runs on a CPU, at sizes that mean nothing."""

import importlib.util
import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from flaxcls.perf.hlo_text import Module
from flaxcls.perf.traffic import traffic

ROOT = Path(__file__).parent.parent
KIT = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def run_kit(start_python, tmp_path):
    """Runs the kit's one command: its exit code, its results by part, and what it printed."""

    def run(*arguments):
        out = tmp_path / "out"
        process = start_python(KIT / "run.py", "--tiny", f"--out={out}", *arguments)
        stdout, stderr = process.communicate(timeout=300)
        assert "Traceback" not in stderr, stderr
        return process.returncode, json.loads((out / "results.json").read_text()), stdout

    return run


@pytest.mark.slow
def test_kit_times_and_profiles_a_training_step(run_kit):
    code, results, stdout = run_kit("--only=^about$|^flaxcls_cifar_resnet18_128$")
    assert code == 0, stdout
    assert results["about"]["result"]["platform"] == "cpu"
    step = results["flaxcls_cifar_resnet18_128"]["result"]
    assert step["train_milliseconds"] > 0 and len(step["train_rounds"]) == 2
    assert step["forward_images_per_second"] > 0 and len(step["forward_rounds"]) == 2
    kernels = step["kernels"]
    total = sum(milliseconds for milliseconds, _ in kernels["kinds"].values())
    assert total == pytest.approx(kernels["milliseconds"]) and kernels["launches"] > 10
    assert "flaxcls_cifar_resnet18_128 [ok" in stdout and " kernels a step" in stdout


@pytest.mark.torture
def test_kit_times_pieces(run_kit):
    code, results, stdout = run_kit("--only=^pieces$")
    assert code == 0, stdout
    assert {
        "convolution_flaxcls",
        "max_pool_flaxcls",
        "attention_of_three_products",
        "a3",
    } <= results["pieces"]["result"].keys()


def test_part_that_takes_too_long_is_stopped_and_fails_the_kit(run_kit):
    code, results, stdout = run_kit("--only=^flaxcls_resnet50$", "--limit=1")
    assert code == 1
    assert results["flaxcls_resnet50"]["status"] == "stopped after 1 s"
    assert "stopped after 1 s" in stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_resnet18_128", "vit_s16"])
def test_peer_trains_networks_of_torchvision_and_timm(name, torchvision, monkeypatch, capsys):
    """Not compiled, which takes minutes here."""
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(KIT))
    arguments = (name, "--tiny", "--rounds=1", "--mode=eager")
    monkeypatch.setattr(sys, "argv", ["torch_step.py", *arguments])
    runpy.run_path(str(KIT / "torch_step.py"), run_name="__main__")
    sys.modules.pop("workloads")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["batch_size"] == 4
    assert result["train_images_per_second"] > 0 and result["forward_images_per_second"] > 0


def test_peer_is_timed_with_and_without_cuda_graphs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(KIT))
    import run

    options = Namespace(tiny=False, out=tmp_path, data=None)
    commands = {part.name: part.command for part in run.parts(options)}
    peers = {name for name, workload in run.WORKLOADS.items() if workload.peer}
    for name in peers:
        plain, graphs = commands[f"torch_{name}"], commands[f"torch_{name}_graphs"]
        assert set(graphs) - set(plain) == {"--mode=reduce-overhead"}
    assert len([name for name in commands if name.startswith("torch_")]) == 2 * len(peers)
    for module in ("run", "workloads", "correctness"):
        sys.modules.pop(module)


def test_every_workload_names_a_recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(KIT))
    from workloads import WORKLOADS

    for name, workload in WORKLOADS.items():
        assert (ROOT / "configs" / f"{workload.recipe}.py").is_file(), name
    sys.modules.pop("workloads")


def test_what_two_checkpoints_differ_in_is_told(monkeypatch):
    monkeypatch.syspath_prepend(str(KIT))
    from correctness import differences

    first = {"params/kernel": [1.0, 2.0], "step": 3}
    assert differences(first, first)["same"]
    other = {"params/kernel": [1.0, 2.5], "step": 3}
    found = differences(first, other)
    assert (found["same"], found["different"], found["largest_difference"]) == (False, 1, 0.5)
    assert not differences(first, {"step": 3})["same"]
    sys.modules.pop("correctness")


class FakeRun:
    """A process that has saved step 20, and what XLA has chosen, when it is killed."""

    def __init__(self, workdir):
        (workdir / "checkpoints" / "20").mkdir(parents=True, exist_ok=True)
        self.began_with = sorted(path.name for path in workdir.glob("autotuning/*"))
        (workdir / "autotuning").mkdir(exist_ok=True)
        (workdir / "autotuning" / "choices.txt").write_text("")
        self.returncode = 0

    def poll(self):
        return None

    def kill(self):
        self.returncode = -9

    def communicate(self):
        return "", ""


@pytest.mark.parametrize(
    ("setting", "resumed", "whole"),
    [("run_folder", ["choices.txt"], ["choices.txt"]), ("cache", ["choices.txt"], []),
     ("no_choices", [], []), ("deterministic", [], [])],
)  # fmt: skip
def test_resumed_runs_have_the_choices_of_their_setting(
    setting, resumed, whole, monkeypatch, tmp_path
):
    monkeypatch.syspath_prepend(str(KIT))
    import correctness

    runs = []

    def start_module(module, *arguments, environment):
        [workdir] = [a.removeprefix("--workdir=") for a in arguments if a.startswith("--workdir=")]
        runs.append(FakeRun(Path(workdir)))
        cache = environment.get("JAX_ENABLE_COMPILATION_CACHE") != "false"
        assert cache == (setting == "cache")
        return runs[-1]

    monkeypatch.setattr(correctness, "start_module", start_module)
    monkeypatch.setattr(correctness, "saved_arrays", lambda run: {"step": [60]})
    result = correctness.resume(tmp_path, setting, tiny=True)
    assert result["same"] and result["choices"] == ["choices.txt"]
    assert [run.began_with for run in runs] == [[], resumed, whole]
    sys.modules.pop("correctness")


def test_compiling_for_a_gpu_says_what_it_needs(start_python):
    if importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("it is here")
    process = start_python(KIT / "compiled.py", "cifar_resnet18_128", "model.width=8")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "pip install 'flaxcls[cuda]'" in stderr and "Traceback" not in stderr


def test_traffic_of_kernels_is_that_of_the_program(monkeypatch):
    monkeypatch.syspath_prepend(KIT)
    recipes = runpy.run_path(str(KIT / "recipes.py"))
    compiled = jax.jit(lambda x: (x @ x).sum(0)).lower(jnp.ones((64, 64))).compile()
    sizes = [size for _, size in recipes["kernels"](compiled.as_text())]
    assert sum(sizes) == 4 * (64 * 64 + 64)  # all is one kernel
    assert sum(sizes) == sum(one.read + one.written for one in traffic(Module(compiled.as_text())))
