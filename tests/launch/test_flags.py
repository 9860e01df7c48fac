"""The flags are known to the installed XLA, which aborts a process for one that is not."""

import os
import subprocess
import sys

import pytest

START = "import jax; jax.devices()"


def start(variables):
    clean = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_OPTIMIZATION_LEVEL")
    }
    return subprocess.run(
        [sys.executable, "-c", START],
        env={**clean, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
    )


def test_gpu_environment_is_accepted_by_jax():
    from launch import flags

    result = start(flags.environment(flags.H100 + flags.DETERMINISTIC_GPU))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "variable, value",
    [
        ("XLA_FLAGS", "--xla_gpu_made_up=true"),
        ("XLA_FLAGS", "--xla_gpu_deterministic_ops=perhaps"),
        ("XLA_FLAGS", "--xla_tpu_scoped_vmem_limit_kib=65536"),
        ("JAX_OPTIMIZATION_LEVEL", "O9"),
    ],
)
def test_made_up_flag_is_not(variable, value):
    result = start({variable: value})
    assert result.returncode != 0
    assert value.split("=")[0].lstrip("-") in result.stderr or value in result.stderr


def test_flags_of_the_tpu_compiler_stay_out_of_xla_flags():
    from launch import flags

    for settings in flags.TPU.values():
        for setting in settings:
            assert setting.variable == "LIBTPU_INIT_ARGS" and setting.value.startswith("--xla_tpu_")
    for setting in (*flags.H100, *flags.DETERMINISTIC_GPU):
        assert "tpu" not in setting.variable.lower() + setting.value


def test_every_setting_has_its_source():
    from launch import flags

    settings = [*flags.H100, *flags.DETERMINISTIC_GPU, *sum(flags.TPU.values(), ())]
    assert all(setting.source.startswith("https://") and setting.reason for setting in settings)


def test_flags_of_one_variable_are_joined_and_the_users_come_last():
    from launch import flags

    first = flags.Setting("XLA_FLAGS", "--a=1", "", "")
    second = flags.Setting("XLA_FLAGS", "--b=2", "", "")
    level = flags.Setting("JAX_OPTIMIZATION_LEVEL", "O1", "", "")
    extra = [("XLA_FLAGS", "--a=3"), ("JAX_OPTIMIZATION_LEVEL", "O2"), ("MINE", "x y")]
    assert flags.environment((first, second, level), extra) == {
        "XLA_FLAGS": "--a=1 --b=2 --a=3",
        "JAX_OPTIMIZATION_LEVEL": "O2",
        "MINE": "x y",
    }
