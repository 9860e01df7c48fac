"""What to do about a pod slice and the training on it: a pure function of what one sees."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch import training


@dataclass(frozen=True)
class Limits:
    """After how many of each one gives up."""

    failures: int = 5  # crashes, hangs, slices that could not be made or set up
    preemptions: int = 200
    unreachable: int = 10  # looks in a row at which the slice does not answer
    unknown: int = 60  # looks in a row at which gcloud can't say how the slice is


@dataclass(frozen=True)
class Tries:
    """How many there were of each."""

    failures: int = 0
    preemptions: int = 0
    unreachable: int = 0
    unknown: int = 0


@dataclass(frozen=True)
class Decision:
    """`action` is "wait", "create", "delete" (to be recreated), "start", "rerun" or "stop".

    `delay` says how long to wait before, in multiples of the usual interval; `code` is the
    babysitter's own exit code when it stops.
    """

    action: str
    reason: str
    tries: Tries
    delay: int = 0
    code: int = 0


def combine(told: Sequence[str]) -> str | int:
    """What training does, from what each host says: "absent", "running" or an exit code.

    Of several exit codes the one that says most: where one host found broken data the others crash,
    for want of it.
    """
    codes = {int(text) for text in told if text not in ("absent", "running")}
    if "running" in told:
        return "running"
    if not codes:
        return "absent"
    stop = [code for code in training.STOP if code in codes]
    crashes = codes - {training.DONE, training.PREEMPTED}
    return (stop + sorted(crashes) + sorted(codes, reverse=True))[0]


def decide(slice_state: str | None, doing: str | int, tries: Tries, limits: Limits) -> Decision:
    """What to do next.

    Args:
        slice_state: the state of the queued resource, None if there is none, "UNKNOWN" if gcloud
            can't say.
        doing: "unreachable", "absent", "running" or the exit code of training; it counts only in a
            slice that is ACTIVE.
        tries: how often something went wrong so far.
        limits: how often it may.
    """
    if slice_state == "UNKNOWN":
        tries = replace(tries, unknown=tries.unknown + 1)
        action, code = ("wait", 0) if tries.unknown <= limits.unknown else ("stop", 1)
        return Decision(action, "gcloud can't say how the slice is", tries, code=code)
    tries = replace(tries, unknown=0)
    if slice_state is None:
        return Decision("create", "there is no slice", tries)
    if slice_state == "SUSPENDED":
        return _preempted("delete", "the slice was taken away", tries, limits)
    if slice_state == "FAILED":
        return failed("delete", "the slice could not be made", tries, limits)
    if slice_state != "ACTIVE":
        return Decision("wait", f"the slice is {slice_state}", tries)

    if doing == "unreachable":
        tries = replace(tries, unreachable=tries.unreachable + 1)
        if tries.unreachable <= limits.unreachable:
            return Decision("wait", "the slice does not answer", tries)
        return failed("delete", "the slice does not answer", tries, limits)
    tries = replace(tries, unreachable=0)
    if doing == "running":
        return Decision("wait", "training runs", tries)
    if doing == "absent":
        return Decision("start", "the slice is ready", tries)

    reason = training.describe(int(doing))
    # Code 2 is final at a rerun too, other than under SLURM. No process of an earlier try has the
    # run: on this slice all hosts have told their code, and the hosts of a lost one are deleted.
    if doing == training.DONE or doing in training.STOP:
        return Decision("stop", reason, tries, code=int(doing))
    if doing == training.PREEMPTED:
        return _preempted("rerun", reason, tries, limits)
    return failed("rerun", reason, tries, limits, code=int(doing))


def _preempted(action: str, reason: str, tries: Tries, limits: Limits) -> Decision:
    tries = replace(tries, preemptions=tries.preemptions + 1)
    if tries.preemptions > limits.preemptions:
        reason = f"{reason}, for the {tries.preemptions}th time"
        return Decision("stop", reason, tries, code=training.PREEMPTED)
    return Decision(action, reason, tries)


def failed(action: str, reason: str, tries: Tries, limits: Limits, code: int = 1) -> Decision:
    """`action` after a failure, each time later, or the end after too many."""
    tries = replace(tries, failures=tries.failures + 1, unreachable=0)
    if tries.failures > limits.failures:
        return Decision("stop", f"{reason}; {limits.failures} retries were in vain", tries, 0, code)
    reason = f"{reason}; retry {tries.failures} of {limits.failures}"
    return Decision(action, reason, tries, delay=2 ** min(tries.failures, 6))
