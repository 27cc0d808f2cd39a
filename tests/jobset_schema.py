"""What a JobSet (jobset.x-k8s.io/v1alpha2) may contain, as a JSON schema: names, types, what is required, allowed words.

Only the parts of a pod that our manifests use are listed; a field that is not listed is refused, as strict servers do.
"""

from typing import Any

TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
LABEL = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
WORDS = {"type": "object", "additionalProperties": TEXT}  # labels, annotations, selectors: numbers and booleans are refused


def things(needed: str = "", **fields: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": needed.split(), "additionalProperties": False}


def each(item: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A list."""
    return {"type": "array", "items": item, **more}


def one_of(*words: str) -> dict[str, Any]:
    """One of some words."""
    return {"enum": list(words)}


METADATA = things("", name=LABEL, namespace=LABEL, labels=WORDS, annotations=WORDS)

CONTAINER = things(
    "name image", name=LABEL, image=TEXT, command=each(TEXT), args=each(TEXT),
    ports=each(things("containerPort", containerPort={"type": "integer", "minimum": 1, "maximum": 65535}, name=LABEL)),
    env=each(things("name", name=TEXT, value=TEXT)),
    resources=things("", **dict.fromkeys(
        ("limits", "requests"), {"type": "object", "additionalProperties": {"type": ["integer", "string"]}}
    )),
    volumeMounts=each(things("name mountPath", name=LABEL, mountPath=TEXT, readOnly=FLAG)),
)  # fmt: skip

POD = things(
    "containers", containers=each(CONTAINER, minItems=1), restartPolicy=one_of("Never"),  # a pod failure policy needs it
    hostNetwork=FLAG, dnsPolicy=one_of("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    terminationGracePeriodSeconds=COUNT, nodeSelector=WORDS, serviceAccountName=TEXT,
    tolerations=each(things(
        "", key=TEXT, operator=one_of("Exists", "Equal"), value=TEXT,
        effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
    )),
    volumes=each(things("name", name=LABEL, persistentVolumeClaim=things("claimName", claimName=TEXT, readOnly=FLAG))),
)  # fmt: skip

EXIT_CODES = things(
    "operator values", containerName=LABEL, operator=one_of("In", "NotIn"),
    values=each({"type": "integer", "minimum": 1, "maximum": 255}, minItems=1, maxItems=255, uniqueItems=True),
)  # fmt: skip
POD_CONDITIONS = each(things("type", type=TEXT, status=one_of("True", "False", "Unknown")), minItems=1, maxItems=20)

JOB = things(
    "template", parallelism=COUNT, completions=COUNT, completionMode=one_of("Indexed", "NonIndexed"), backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT, ttlSecondsAfterFinished=COUNT,
    podFailurePolicy=things("rules", rules=each({
        **things("action", action=one_of("FailJob", "FailIndex", "Ignore", "Count"), onExitCodes=EXIT_CODES,
                 onPodConditions=POD_CONDITIONS),
        "oneOf": [{"required": ["onExitCodes"]}, {"required": ["onPodConditions"]}],
    }, maxItems=20)),
    template=things("spec", metadata=METADATA, spec=POD),
)  # fmt: skip

RULE = things(
    "name action", name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", "maxLength": 128},
    action=one_of(
        "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"
    ),
    onJobFailureReasons=each(
        one_of("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"),
        uniqueItems=True,
    ),
    onJobFailureMessagePatterns=each(TEXT, uniqueItems=True), targetReplicatedJobs=each(LABEL),
)  # fmt: skip

SPEC = things(
    "replicatedJobs",
    replicatedJobs=each(things(
        "name template", name=LABEL, groupName=LABEL, replicas=COUNT, template=things("spec", metadata=METADATA, spec=JOB),
        dependsOn=each(things("name status", name=LABEL, status=one_of("Ready", "Complete")), maxItems=5),
    ), minItems=1),
    network=things("", enableDNSHostnames=FLAG, subdomain=LABEL, publishNotReadyAddresses=FLAG),
    successPolicy=things("operator", operator=one_of("All", "Any"), targetReplicatedJobs=each(LABEL)),
    failurePolicy=things(
        "", maxRestarts=COUNT, restartStrategy=one_of("Recreate", "BlockingRecreate", "InPlaceRestart"), rules=each(RULE)
    ),
    startupPolicy=things("startupPolicyOrder", startupPolicyOrder=one_of("AnyOrder", "InOrder")),
    coordinator=things("replicatedJob", replicatedJob=LABEL, jobIndex=COUNT, podIndex=COUNT),
    suspend=FLAG, managedBy=TEXT, ttlSecondsAfterFinished=COUNT,
)  # fmt: skip

JOBSET = things(
    "apiVersion kind metadata spec", apiVersion=one_of("jobset.x-k8s.io/v1alpha2"), kind=one_of("JobSet"),
    metadata={**METADATA, "required": ["name"]}, spec=SPEC,
)  # fmt: skip
