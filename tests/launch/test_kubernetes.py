"""The JobSet against the schemas of JobSet and Kubernetes, and against what their controllers do.

https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/ and the reference of Job and Pod.
"""

import copy
import re

import pytest
from jobset_schema import JOBSET

from launch import kubernetes, training

jsonschema = pytest.importorskip("jsonschema")
kubernetes_validate = pytest.importorskip("kubernetes_validate")
yaml = pytest.importorskip("yaml")

RUN = ("--", "--config=configs/c.py", "--config.duration=90 epochs")
ON_CLAIM, IN_BUCKET = (*RUN, "--workdir=/runs/r"), (*RUN, "--workdir=s3://b/r")
GPU = ("gpu", "--name=r", "--image=i", "--nodes=3")
TPU = ("tpu", "--name=r", "--image=i", "--type=v6e", "--topology=4x4", "--spot")
CREDENTIALS = ("--service_account=trainer", "--env_secret=keys")
CASES = {
    "gpu": (*GPU, "--claim=runs", "--dry_run", *ON_CLAIM),
    "tpu": (*TPU, *CREDENTIALS, "--dry_run", *IN_BUCKET),
}


@pytest.fixture(params=CASES)
def jobset(request, launch):
    result = launch("kubernetes", *CASES[request.param])
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def parts(jobset):
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    return job, pod, pod["containers"][0]


def test_fields_go_together_as_the_controllers_ask(jobset):
    assert re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", jobset["metadata"]["name"])
    [replicated] = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    job, pod, container = parts(jobset)
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy asks for
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}
    for rule in job["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if "onExitCodes" in rule:
            values = rule["onExitCodes"]["values"]
            assert values == sorted(set(values)) and 0 not in values
            assert rule["onExitCodes"]["containerName"] == container["name"]
            assert rule["onExitCodes"]["operator"] == "In"


def validate(jobset, kubernetes_version):
    """Raises jsonschema.ValidationError where a field is unknown, missing or of another type."""
    jsonschema.validate(jobset, JOBSET)
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", **replicated["template"]}
        job["metadata"] = jobset["metadata"]
        kubernetes_validate.validate(job, kubernetes_version, strict=True)


# The oldest that the launcher is for, and the newest that is known.
@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_schemas_of_jobset_and_kubernetes_are_kept(jobset, version):
    validate(jobset, version)


@pytest.mark.parametrize(
    "path, value",
    [
        ("spec/failurePolicy/maxRestart", 3),
        ("spec/failurePolicy/maxRestarts", "3"),
        ("spec/failurePolicy/rules/0/action", "Restart"),
        ("spec/failurePolicy/rules/0/onJobFailureMessages", []),
        ("spec/replicatedJobs/0/template/spec/backoffLimit", "none"),
        ("spec/replicatedJobs/0/template/spec/template/spec/gracePeriodSeconds", 3),
        ("spec/replicatedJobs/0/template/spec/podFailurePolicy/rules/0/onExitCodes/values", [2.5]),
    ],
)
def test_schemas_find_what_is_wrong(jobset, path, value):
    wrong = copy.deepcopy(jobset)
    *parents, name = path.split("/")
    part = wrong
    for parent in parents:
        part = part[int(parent) if parent.isdigit() else parent]
    part[name] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(wrong, "1.31")


def action(jobset, code=None, disrupted=False):
    """What becomes of the JobSet when a pod ends so: the rules of both, as their controllers do."""
    job, _, container = parts(jobset)
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if code in rule.get("onExitCodes", {}).get("values", ()) or (
            disrupted and "onPodConditions" in rule
        ):
            # pkg/controller/job/pod_failure_policy.go of Kubernetes
            reason = "PodFailurePolicy"
            message = f"Container train for pod default/r-train-0-0-x failed with exit code {code} "
            message += f"matching FailJob rule at index {index}"
            break
    assert job["backoffLimit"] == 0
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"] and any(
            re.search(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [""])
        ):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("code", training.STOP)
def test_no_restart_after_codes_that_would_come_again(code, jobset):
    assert action(jobset, code) == "FailJobSet"


def test_restart_after_preemption_is_not_counted(jobset):
    assert action(jobset, 42) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(jobset, 42, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(jobset, 137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"


@pytest.mark.parametrize("code", [1, 44, 134, 137])
def test_restart_after_a_crash_is_counted(code, jobset):
    assert action(jobset, code) == "RestartJobSet"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5


def test_training_has_time_to_save_and_shared_memory(jobset):
    _, pod, container = parts(jobset)
    assert pod["terminationGracePeriodSeconds"] >= 120
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    assert memory in pod["volumes"]
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_run_in_a_bucket_needs_no_volume_but_credentials(launch):
    _, pod, container = parts(yaml.safe_load(launch("kubernetes", *CASES["tpu"]).stdout))
    assert [volume["name"] for volume in pod["volumes"]] == ["shared-memory"]
    assert pod["serviceAccountName"] == "trainer"
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]


def test_run_on_a_claim_has_it_mounted(launch):
    _, pod, container = parts(yaml.safe_load(launch("kubernetes", *CASES["gpu"]).stdout))
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]
    assert {"name": "runs", "mountPath": "/runs"} in container["volumeMounts"]
    assert "serviceAccountName" not in pod and "envFrom" not in container


def test_processes_on_gpus_are_told_of_each_other(launch):
    text = launch("kubernetes", *GPU, "--dry_run", *IN_BUCKET).stdout
    job, _, container = parts(yaml.safe_load(text))
    assert job["completions"] == 3
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    # <JobSet>-<replicated job>-<job>-<pod>.<subdomain>, the subdomain being the JobSet's name
    assert container["args"][-3:] == [
        "--coordinator_address=r-train-0-0.r:1234",
        "--num_processes=3",
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]


@pytest.mark.parametrize(
    "topology, chips, hosts", [("4x4", 4, 4), ("2x4", 8, 1), ("1x1", 4, 1), ("2x2x2", 4, 2)]
)
def test_hosts_and_chips_follow_from_the_topology(topology, chips, hosts, launch):
    words = ("--type=v5p", f"--topology={topology}", f"--chips={chips}", "--dry_run")
    text = launch("kubernetes", *TPU, *words, *IN_BUCKET).stdout
    job, pod, container = parts(yaml.safe_load(text))
    total = 1
    for size in topology.split("x"):
        total *= int(size)
    assert job["completions"] == hosts
    assert container["resources"]["limits"]["google.com/tpu"] * hosts == total
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert not any("coordinator" in argument for argument in container["args"])


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1, "b": True, "c": "true", "d": "No", "e": "null", "f": "~", "g": "1e3", "h": ""},
        {"list": [{"a": {"b": []}, "c": [1, "2"]}, ["x", ["y"]], {}], "d/e.f": "g: h # i"},
        {"text": "quotes \" and ' and \\ and \n and \u00e9", "version": "v1alpha2", "y": "y"},
    ],
)
def test_yaml_reads_back_as_what_was_written(value):
    assert yaml.safe_load(kubernetes.to_yaml(value)) == value


def test_yaml_is_handed_to_kubectl(launch, executable, tmp_path):
    executable(
        "kubectl", f"#!/bin/sh\necho \"$@\" >'{tmp_path}/words'\ncat >'{tmp_path}/applied'\n"
    )
    assert launch("kubernetes", *GPU, *IN_BUCKET).returncode == 0
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    dry = launch("kubernetes", *GPU, "--dry_run", *IN_BUCKET).stdout
    assert (tmp_path / "applied").read_text() == dry
