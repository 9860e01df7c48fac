"""Sends a run to Weights & Biases or MLflow, in a process of its own; see `trackers`.

Run as a script, with nothing of flaxcls. Standard input has a line of JSON for the run, one for
each row and one for the end; where that is missing the run was killed. Standard output gets lines
that the user is to see. What hangs, prints, prompts or fails in a client does so here.
"""

import collections
import contextlib
import importlib.util
import json
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

RETRY_SECONDS = 30  # after a failure, until the service is tried again
MOST_PENDING = 10_000  # rows that are kept until then
LAST_SECONDS = 60  # that this process works on after the run has ended
MOST_LETTERS = 500  # of a value of the config: what all versions of MLflow take


class Row(NamedTuple):
    step: int
    milliseconds: int  # since 1970
    values: dict[str, float]


class Service(Protocol):
    """A run at a service, new or continued; any method may raise anything.

    It is made of what the first line holds: `id`, the run's for good, `name` and `config`.
    """

    def __init__(self, run: Mapping[str, Any]): ...

    def log(self, rows: Iterable[Row]) -> None: ...

    def close(self, end: str) -> None:
        """The run has "finished", "failed" or was "preempted"."""


class Wandb:
    def __init__(self, run: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "flaxcls",
            id=run["id"],
            name=run["name"],
            resume="allow",
            settings=wandb.Settings(console="off", init_timeout=RETRY_SECONDS),
        )
        self._run.config.update(run["config"], allow_val_change=True)
        # W&B's own step may not go back, as a run does that was killed after its last checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.url = self._run.url  # None offline

    def log(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._run.log({"step": row.step, **row.values})

    def close(self, end: str) -> None:
        if end == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if end == "finished" else 1)


class Mlflow:
    url = None

    def __init__(self, run: Mapping[str, Any]):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; else minutes pass
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # before a request fails
        if not os.environ.get("MLFLOW_TRACKING_URI") and not importlib.util.find_spec("sqlalchemy"):
            # MLflow's default, a database in a file, is not part of mlflow-skinny.
            raise OSError("set MLFLOW_TRACKING_URI, such as http://HOST:5000")
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._entities, self._client = entities, MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._experiment()
        found = self._client.search_runs([experiment], f"tags.`flaxcls.id` = '{run['id']}'")
        if not found:
            tags = {"flaxcls.id": run["id"]}
            found = [self._client.create_run(experiment, run_name=run["name"], tags=tags)]
        self._id, known = found[0].info.run_id, found[0].data.params
        self._client.update_run(self._id, status="RUNNING")
        config = {name: str(value)[:MOST_LETTERS] for name, value in run["config"].items()}
        new = [entities.Param(*item) for item in config.items() if item[0] not in known]
        for start in range(0, len(new), 100):  # the most that a request takes
            self._client.log_batch(self._id, params=new[start : start + 100])
        for name, value in config.items():  # a parameter is for good
            if known.get(name, value) != value:
                self._client.set_tag(self._id, f"config.{name}", value)

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "flaxcls"
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def log(self, rows: Iterable[Row]) -> None:
        metrics = [
            self._entities.Metric(name, value, row.milliseconds, row.step)
            for row in rows
            for name, value in row.values.items()
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def close(self, end: str) -> None:
        status = {"finished": "FINISHED", "preempted": "KILLED"}.get(end, "FAILED")
        self._client.set_terminated(self._id, status)


SERVICES: dict[str, type[Service]] = {"wandb": Wandb, "mlflow": Mlflow}


class Retried:
    """A service that may be out of reach: rows are kept, and it is tried again now and then."""

    def __init__(self, run: Mapping[str, Any], say: Callable[[str], None]):
        self._run, self._say, self._has_warned = run, say, False
        self._service: Service | None = None
        self._pending: collections.deque[Row] = collections.deque(maxlen=MOST_PENDING)
        self._next_try = 0.0
        self._try(lambda service: None)

    def add(self, row: Row) -> None:
        self._pending.append(row)
        if time.monotonic() >= self._next_try:
            self._try(self._send)

    def close(self, end: str) -> None:
        self._try(self._send)
        self._try(lambda service: service.close(end))

    def _send(self, service: Service) -> None:
        if self._pending:
            service.log(self._pending)
            self._pending.clear()

    def _try(self, action: Callable[[Service], None]) -> None:
        try:
            if self._service is None:
                self._service = SERVICES[self._run["service"]](self._run)
                if self._service.url:
                    self._say(f"{self._run['service']}: {self._service.url}")
            action(self._service)
        except BaseException as error:  # SystemExit of a client, too
            self._next_try = time.monotonic() + RETRY_SECONDS
            if not self._has_warned:
                self._has_warned = True
                self._say(
                    f"note: {self._run['service']} does not take the metrics, and is tried again "
                    f"every {RETRY_SECONDS} s; training continues ({_in_a_line(error)})"
                )


def _in_a_line(error: BaseException) -> str:
    text = re.sub(r"//[^/\s@]*@", "//", " ".join(str(error).split()))  # no user:password@
    return f"{type(error).__name__}: {text}"[:400]


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # the run ends; this one sends that
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)
    lines, out = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # no client asks for a password
        os.dup2(nothing, standard)

    if hasattr(select, "poll"):
        threading.Thread(target=_end_after_run, args=[lines.fileno()], daemon=True).start()

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # the run was killed
            print(text, file=out, flush=True)

    end, service = "failed", Retried(json.loads(lines.readline()), say)
    with contextlib.suppress(ValueError):  # the run was killed in the middle of a line
        for line in lines:
            message = json.loads(line)
            if "end" in message:
                end = message["end"]
                break
            service.add(Row(**message))
    service.close(end)


def _end_after_run(rows: int) -> None:
    """Ends this process and those that it has started some time after the run, come what may.

    Args:
      rows: the descriptor of the pipe, whose other end the run has, as long as it lives.
    """
    poll = select.poll()
    poll.register(rows, 0)  # for nothing but that the other end is closed
    poll.poll()
    time.sleep(LAST_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
