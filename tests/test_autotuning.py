"""XLA's choices of kernels are kept with a run that is on GPUs, and resumed with."""

import json
from pathlib import Path

import jax
import jaxlib
import pytest

from flaxcls.config import default
from flaxcls.runtime import autotuning, compilation_cache, sharding
from flaxcls.runtime.autotuning import READ, WRITE, Autotuning
from flaxcls.training.train import train_config

FILE = f"jaxlib-{jaxlib.__version__}.txt"


class GpuCompiler:
    """Compiles for the CPU, and reads and writes choices where XLA for GPUs would.

    Attributes:
      options: those that each program was compiled with.
      chosen: in this process.
    """

    def __init__(self, monkeypatch):
        self.options, self.chosen = [], []
        self._compile = jax.stages.Lowered.compile
        monkeypatch.setattr(
            jax.stages.Lowered,
            "compile",
            lambda lowered, options=None: self.compile(lowered, options),
        )

    def compile(self, lowered, options):
        compiled = self._compile(lowered, options)  # XLA's own parser has the options first
        self.options.append(options)
        if options and READ in options:
            text = Path(options[READ]).read_text()
            if not text.startswith("chosen"):
                raise jax.errors.JaxRuntimeError("INTERNAL: Version mismatch in autotune results")
            self.chosen += [choice for choice in text.split("\n") if choice not in self.chosen]
        if options and WRITE in options:
            Path(options[WRITE]).write_text("\n".join(self.chosen))
        else:
            self.chosen.append(f"chosen for program {len(self.options)}")
        return compiled


@pytest.fixture
def gpu(monkeypatch):
    with compilation_cache.unused():
        yield GpuCompiler(monkeypatch)


def program(number=1):
    return jax.jit(lambda x: x * number).lower(jax.ShapeDtypeStruct((3,), "float32"))


def test_resumed_run_has_the_kernels_that_were_chosen(gpu, tmp_path):
    first = Autotuning(tmp_path / "autotuning", "gpu")
    assert first.compile(program())(jax.numpy.ones(3)).tolist() == [1, 1, 1]
    first.compile(program(2))
    first.write()
    assert gpu.options[:2] == [None, None]
    path = tmp_path / "autotuning" / FILE
    assert path.read_text() == "chosen for program 1\nchosen for program 2"

    gpu.options.clear(), gpu.chosen.clear()  # another process
    resumed = Autotuning(tmp_path / "autotuning", "gpu")
    assert resumed.compile(program())(jax.numpy.ones(3)).tolist() == [1, 1, 1]
    assert gpu.options == [{READ: str(path)}]
    assert gpu.chosen[:2] == ["chosen for program 1", "chosen for program 2"]
    resumed.write()  # with what else has been chosen since
    assert path.read_text().split("\n")[:2] == gpu.chosen[:2]
    assert [child.name for child in path.parent.iterdir()] == [FILE]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_nothing_is_asked_or_written_off_gpus(gpu, tmp_path, platform):
    elsewhere = Autotuning(tmp_path / "autotuning", platform)
    elsewhere.compile(program())
    elsewhere.write()
    assert gpu.options == [None] and not list(tmp_path.iterdir())


def test_what_another_version_of_xla_has_chosen_is_not_read(gpu, tmp_path, monkeypatch):
    (tmp_path / "jaxlib-0.1.txt").write_text("chosen of old")
    run = Autotuning(tmp_path, "gpu")
    run.compile(program())
    run.write()
    assert gpu.options[0] is None
    assert {path.name for path in tmp_path.iterdir()} == {"jaxlib-0.1.txt", FILE}


def test_damaged_file_is_named_and_replaced(gpu, tmp_path, capsys):
    (tmp_path / FILE).write_text("")
    run = Autotuning(tmp_path, "gpu")
    run.compile(program())
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / FILE} can't be used, so XLA chooses kernels anew")
    assert len(said.splitlines()) == 1
    run.write()
    assert (tmp_path / FILE).read_text().startswith("chosen for program")


def test_error_of_the_compiler_itself_is_not_hidden(gpu, tmp_path, monkeypatch):
    def fails(lowered, options=None):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fails)
    (tmp_path / FILE).write_text("chosen")
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        Autotuning(tmp_path, "gpu").compile(program())


def test_folder_that_cannot_be_written_is_told_in_one_sentence(gpu, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run = Autotuning(tmp_path / "file" / "autotuning", "gpu")
    run.compile(program())
    run.write()
    said = capsys.readouterr().err
    assert f"{FILE} can't be written, so a resumed run may round differently" in said
    assert len(said.splitlines()) == 1


def test_unknown_choices_of_programs_from_the_cache_are_not_written(gpu, tmp_path, monkeypatch):
    """Resumed by a file without them, these programs would be compiled anew."""
    hits = iter([0, 1, 1, 1])  # before and after each of two programs
    monkeypatch.setattr(autotuning.compilation_cache, "hits", lambda: next(hits))
    run = Autotuning(tmp_path, "gpu")
    run.compile(program(1))
    run.compile(program(2))
    run.write()
    assert not list(tmp_path.iterdir())


def test_xla_knows_the_options_and_no_others():
    for option in (READ, WRITE):
        program().compile({option: "/nowhere/file.txt"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        program().compile({"xla_gpu_load_autotune_result_from": "/nowhere/file.txt"})


def test_training_hands_its_steps_over(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    config = default()
    config.batch_size, config.log_every, config.duration = 8, "1 steps", "1 steps"
    config.steps_per_dispatch = 1
    config.data.name, config.data.num_examples, config.data.image_shape = "fake", 16, (4, 4, 1)
    config.model.name, config.model.widths = "dense", (2,)
    train_config(config, tmp_path / "run")
    partial = tmp_path / "run" / "autotuning" / FILE.replace(".txt", ".partial.txt")
    assert gpu.options[:2] == [None, {WRITE: str(partial)}]
    config.duration = "2 steps"
    gpu.options.clear()
    train_config(config, tmp_path / "run")
    assert gpu.options[0] == {READ: str(tmp_path / "run" / "autotuning" / FILE)}
    assert json.loads((tmp_path / "run/summary.json").read_text())["step"] == 2
