"""The example of a network of one's own, in real processes: killed, resumed, moved and used."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

EXAMPLE = Path(__file__).parents[2] / "configs" / "examples"
SHORT = (
    "--config.duration=60 steps",
    "--config.log_every=5 steps",
    "--config.eval.every=20 steps",
    "--config.checkpoint.every=5 steps",
    "--config.mesh.cpu_devices=1",
    "--config.data.train_split=train[:400]",
)


@pytest.fixture
def example(tmp_path):
    """A copy of the example's folder."""
    return shutil.copytree(EXAMPLE, tmp_path / "example")


@pytest.fixture
def command(example):
    return [f"--config={example / 'own_network.py'}", *SHORT]


@pytest.mark.slow
def test_own_network_survives_sigkill_and_the_loss_of_its_folder(
    tmp_path, example, command, run_main, start_main, run_folder, wait_until
):
    whole, killed = run_folder(tmp_path / "whole"), run_folder(tmp_path / "killed")
    result = run_main(*command, f"--workdir={whole.folder}")
    assert result.returncode == 0, result.stderr

    process = start_main(*command, f"--workdir={killed.folder}")
    assert wait_until(process, lambda: max(killed.steps(), default=0) >= 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    shutil.move(example / "mixer.py", tmp_path / "mixer.py")  # the recipe alone is left
    result = run_main(*command, f"--workdir={killed.folder}")
    assert result.returncode == 0, result.stderr
    assert "resumed from step" in result.stdout and "not as when" not in result.stdout
    assert killed.log() == whole.log() != b""

    shutil.rmtree(example)
    result = run_main(f"--run={killed.folder}", module="flaxcls.evaluate")
    assert result.returncode == 0, result.stderr
    results = killed.json("summary.json")["eval"]
    assert f"{results['accuracy']:.2%}".replace("%", " %") in result.stdout
    assert f"loss {results['loss']:.4f}" in result.stdout

    picture = tmp_path / "digit.png"
    Image.fromarray((load_digits().images[0] * 255 / 16).astype("uint8")).save(picture)
    arguments = (f"--run={killed.folder}", "--format=jsonl", "--topk=10", picture)
    result = run_main(*arguments, module="flaxcls.predict")
    assert result.returncode == 0, result.stderr
    predictions = json.loads(result.stdout)["predictions"]
    assert sum(each["probability"] for each in predictions) == pytest.approx(1, abs=1e-5)

    shutil.rmtree(killed.folder / "code")
    result = run_main(f"--run={killed.folder}", module="flaxcls.evaluate")
    assert result.returncode == 2
    assert result.stderr == (
        f"flaxcls: config.model.name of the run in {killed.folder} is 'mixer:Mixer', but "
        f"{killed.folder / 'code'} holds no module mixer; it was {example / 'mixer.py'}\n"
    )


@pytest.mark.torture
def test_two_processes_train_an_own_network(tmp_path, command, start_main, run_main, run_folder):
    two, one = run_folder(tmp_path / "two"), run_folder(tmp_path / "one")
    changes = ("--config.duration=10 steps", "--config.checkpoint.every=10 steps")
    arguments = (*command, *changes, f"--workdir={two.folder}")
    processes = start_main("-n", 2, "--", *arguments, module="launch.local")
    stdout, stderr = processes.communicate(timeout=240)
    assert processes.returncode == 0, stderr
    assert stdout.count("Finished after 10 steps") == 1
    assert len(list((two.folder / "code").iterdir())) == 1
    arguments = (*command, *changes, "--config.mesh.cpu_devices=2", f"--workdir={one.folder}")
    assert run_main(*arguments).returncode == 0
    for (step, group, first), (_, _, second) in zip(two.rows(), one.rows(), strict=True):
        assert first == pytest.approx(second, rel=2e-3, abs=1e-5), (step, group)


def test_mistakes_in_naming_ones_own_are_a_sentence_and_exit_code_2(command, run_main):
    for changes, sentence in (
        (
            ["--config.model.name=mixr:Mixer"],
            "flaxcls: config.model.name is 'mixr:Mixer', but there is no module mixr beside the "
            "recipe or installed, did you mean 'mixer'?\n",
        ),
        (
            ["--config.model.pach=2"],
            "flaxcls: config.model.pach is not used by mixer:Mixer, did you mean 'patch'?\n",
        ),
    ):
        result = run_main(*command, *changes)
        assert (result.returncode, result.stderr) == (2, sentence)
