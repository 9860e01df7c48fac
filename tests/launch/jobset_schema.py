"""The fields of a JobSet, v1alpha2, as JSON Schema: what its CRD has in `spec`, no other field.

Names, types and what is required are those of hack/python-sdk/swagger.json of
https://github.com/kubernetes-sigs/jobset at commit 0336a8f, of 2026, which goes with Kubernetes
1.35.3 and is made from the same types as config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml;
the values to choose from are as its descriptions have them. The template of a job and that of a
volume claim are Kubernetes' own.
"""

from typing import Any

STRING, INTEGER, BOOLEAN, OWN = (
    {"type": name} for name in ("string", "integer", "boolean", "object")
)


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


_FAILURE_RULE = _object(
    ("name", "action"),
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action=_one_of(
        *("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
        *("RestartJob", "RestartJobAndIgnoreMaxRestarts"),
    ),
    onJobFailureReasons=_list(STRING),
    onJobFailureMessagePatterns=_list(STRING),
    targetReplicatedJobs=_list(STRING),
)
_REPLICATED_JOB = _object(
    ("name", "template"),
    name=STRING,
    groupName=STRING,
    replicas=INTEGER,
    template=OWN,
    dependsOn=_list(_object(("name", "status"), name=STRING, status=_one_of("Ready", "Complete"))),
)
SPEC = _object(
    coordinator=_object(
        ("replicatedJob",), replicatedJob=STRING, jobIndex=INTEGER, podIndex=INTEGER
    ),
    failurePolicy=_object(
        maxRestarts=INTEGER,
        restartStrategy=_one_of("Recreate", "BlockingRecreate", "InPlaceRestart"),
        rules=_list(_FAILURE_RULE),
    ),
    managedBy=STRING,
    network=_object(enableDNSHostnames=BOOLEAN, publishNotReadyAddresses=BOOLEAN, subdomain=STRING),
    replicatedJobs=_list(_REPLICATED_JOB),
    startupPolicy=_object(
        ("startupPolicyOrder",), startupPolicyOrder=_one_of("AnyOrder", "InOrder")
    ),
    successPolicy=_object(
        ("operator",), operator=_one_of("All", "Any"), targetReplicatedJobs=_list(STRING)
    ),
    suspend=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER,
    volumeClaimPolicies=_list(
        _object(templates=_list(OWN), retentionPolicy=_object(whenDeleted=STRING))
    ),
)
JOBSET = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=OWN,
    spec=SPEC,
)
