"""Trains on a Kubernetes cluster that has JobSet (version 0.10 or newer; kubernetes 1.31 or newer).

    python -m launch.kubernetes gpu --name=r50 --image=IMAGE --nodes=2 [--dry_run] \\
        -- --config=configs/NAME.py --workdir=gs://BUCKET/NAME
    python -m launch.kubernetes tpu --name=r50 --image=IMAGE --type=v5e --topology=4x4 -- ...

creates a JobSet with a process a host. The run is in a bucket, which the pods' service account, or
the variables of `--env_secret`, may read and write; the exception is `--workdir=/runs/NAME` on the
volume `--claim`. `--dry_run` prints the YAML instead of handing it to `kubectl apply`.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from launch import flags, training

PORT = 1234
USER = 1000  # as in launch/Dockerfile
RUNS = "/runs"  # where a volume is mounted
# What gives pods of GKE their credentials answers some seconds after their start. Google's client,
# which asks three times in 3 s, would find none, and the run would end for good with code 2.
# https://cloud.google.com/kubernetes-engine/docs/how-to/workload-identity
WAIT_FOR_CREDENTIALS = ("GCE_METADATA_DETECT_RETRIES", "6")  # after 1, 2, 4, 8 and 16 s

# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
ACCELERATORS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}

TAINTS = ("nvidia.com/gpu", "google.com/tpu", "cloud.google.com/gke-spot")

# The Job fails with any of its pods. Which rule was it that failed it is in its message only, which
# ends in "matching FailJob rule at index N"; so the JobSet tells the codes apart.
# https://kubernetes.io/docs/tasks/job/pod-failure-policy
POD_RULES = [
    {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": "train",
            "operator": "In",
            "values": sorted(training.STOP),
        },
    },
    {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": [training.PREEMPTED]},
    },
    {  # the node was drained or taken away before training could end by itself
        "action": "FailJob",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    },
]
# The first rule that matches counts; what matches none restarts the JobSet and counts towards
# maxRestarts. https://jobset.sigs.k8s.io/docs/tasks/failure_policy/
# Code 2 is final at a restart too, other than under SLURM: the Job is made anew when all pods of
# the last one are gone, those of a node that can't be reached included; none still has the run.
JOBSET_RULES = [
    {
        "name": "useless",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": ["matching FailJob rule at index 0$"],
    },
    {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    },
]


def jobset(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """The JobSet, as plain data."""
    on_tpu = options.platform == "tpu"
    hosts, chips, selector = _tpu_nodes(options) if on_tpu else _gpu_nodes(options)
    settings = flags.TPU[options.type] if on_tpu else flags.H100
    if not on_tpu:  # JAX finds out by itself in a TPU slice
        arguments = [
            *arguments,
            f"--coordinator_address={options.name}-train-0-0.{options.name}:{PORT}",
            f"--num_processes={hosts}",
            "--process_id=$(JOB_COMPLETION_INDEX)",  # replaced by the kubelet
        ]
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    patience = [WAIT_FOR_CREDENTIALS] if options.workdir.startswith("gs://") else []
    environment = flags.environment(settings, [*patience, *options.env])
    resources = {"google.com/tpu" if on_tpu else "nvidia.com/gpu": chips}
    container = {
        "name": "train",
        "image": options.image,
        "args": list(arguments),
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "ports": [{"containerPort": PORT}],
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    # As root where there are TPUs, for access to their devices.
    user = {"runAsUser": 0} if on_tpu else {"runAsUser": USER, "fsGroup": USER}
    pod = {
        "restartPolicy": "Never",  # podFailurePolicy asks for it
        "terminationGracePeriodSeconds": options.grace,
        "nodeSelector": {**selector, **dict(options.node_selector)},
        "tolerations": [
            {"key": taint, "operator": "Exists", "effect": "NoSchedule"} for taint in TAINTS
        ],
        "securityContext": user,
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if options.claim:
        claim = {"claimName": options.claim}
        container["volumeMounts"].append({"name": "runs", "mountPath": RUNS})
        pod["volumes"].append({"name": "runs", "persistentVolumeClaim": claim})
    if options.env_secret:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in options.env_secret]
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    job = {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": 0,  # one pod less and the others can't continue
        "podFailurePolicy": {"rules": POD_RULES},
        "template": {"spec": pod},
    }
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "namespace": options.namespace,
            "annotations": exclusive if on_tpu else {},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": options.max_failures, "rules": JOBSET_RULES},
            "replicatedJobs": [{"name": "train", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _gpu_nodes(options: argparse.Namespace) -> tuple[int, int, dict[str, str]]:
    """How many hosts, how many accelerators each has, and the labels of their nodes."""
    return options.nodes, options.gpus, {}


def _tpu_nodes(options: argparse.Namespace) -> tuple[int, int, dict[str, str]]:
    chips = math.prod(int(size) for size in options.topology.split("x"))
    a_host = min(options.chips, chips)
    labels = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[options.type],
        "cloud.google.com/gke-tpu-topology": options.topology,
    }
    return chips // a_host, a_host, labels


def to_yaml(value: Any, indent: str = "") -> str:
    """Plain data as block YAML: what is not a plain word or number, quoted as in JSON."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        return "\n".join(f"{indent}{key}:{_after_key(value[key], deeper)}" for key in value)
    if isinstance(value, list) and value:  # an item's first line stands beside its dash
        return "\n".join(f"{indent}- {to_yaml(item, deeper).lstrip()}" for item in value)
    plain = isinstance(value, str) and re.fullmatch("[A-Za-z][A-Za-z/-]*", value)
    if plain and value.lower() not in ("true", "false", "yes", "no", "on", "off", "null", "y", "n"):
        return f"{indent}{value}"
    return f"{indent}{json.dumps(value)}"


def _after_key(value: Any, indent: str) -> str:
    if value and isinstance(value, dict | list):
        return f"\n{to_yaml(value, indent)}"
    return f" {to_yaml(value)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.kubernetes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("platform", choices=("gpu", "tpu"))
    add("--name", required=True, help="of the JobSet, and of the network of its pods")
    add("--namespace", default="default")
    add("--image", required=True, help="made by launch/Dockerfile, target cuda or tpu")
    add("--nodes", type=int, default=1, help="with GPUs")
    add("--gpus", type=int, default=8, help="a node")
    add("--type", choices=ACCELERATORS, default="v5e", help="of the TPUs")
    add("--topology", type=_topology, default="2x4", help="of the TPU slice, in chips")
    add("--chips", type=int, default=4, help="a TPU host")
    add("--spot", action="store_true", help="cheaper, and may be taken away (GKE)")
    add("--service_account", help="of Kubernetes, that may use the bucket")
    add("--grace", type=int, default=120, help="seconds between SIGTERM and SIGKILL")
    add("--max_failures", type=int, default=5, help="restarts after crashes and hangs")
    add("--dry_run", action="store_true", help="only print the YAML")
    selector = "a label that the nodes must have"
    add("--node_selector", action="append", default=[], metavar="LABEL=VALUE", type=_label,
        help=selector)  # fmt: skip
    claim = f"a PersistentVolumeClaim, ReadWriteMany, mounted at {RUNS}"
    add("--claim", help=f"{claim}, where the run is not in a bucket")
    secret = "a Secret whose keys become environment variables, such as AWS_ACCESS_KEY_ID"
    add("--env_secret", action="append", default=[], metavar="NAME", help=secret)
    training.add_env(parser)
    return parser


def _topology(text: str) -> str:
    if not re.fullmatch(r"\d+(x\d+){1,2}", text):
        raise argparse.ArgumentTypeError(f"must be such as 4x4 or 2x2x2, got {text!r}")
    return text


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be LABEL=VALUE, got {text!r}")
    return name, value


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    options, arguments = training.split(parser, argv, absolute=True)
    on_claim = options.claim and PurePosixPath(options.workdir).is_relative_to(RUNS)
    if not on_claim and not training.is_in_bucket(options.workdir):
        parser.error(
            f"--workdir must be gs://BUCKET/... or s3://BUCKET/..., or below {RUNS}, where "
            f"--claim=CLAIM is mounted, got {options.workdir!r}"
        )
    text = to_yaml(jobset(options, arguments)) + "\n"
    if options.dry_run:
        print(text, end="")
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
