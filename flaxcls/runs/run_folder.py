"""The folder of a run: whose it is, what made it and how it ended.

config.json      the resolved config; versions, device, commit, sizes and when the training files
                 were written last ("data_modified", seconds since 1970) beside it
metrics.jsonl    a row a log step and an evaluation; tensorboard/ shows the same
checkpoints/     the newest steps and the best one
profile/         the trace of config.profile
autotuning/      the kernels that XLA has chosen on a GPU; see `runtime/autotuning.py`
code/            the user's own modules that the config names; see `run_code`
lease.json       which job trains now; see `lease`
summary.json     how it ended
report.html      all of it as a page, see flaxcls/report
"""

import contextlib
import hashlib
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flaxcls.buckets import AnyPath, as_path
from flaxcls.config import default, options
from flaxcls.config.fields import changes, fields, plain
from flaxcls.data.source import Source
from flaxcls.errors import ConfigError, FlaxclsError
from flaxcls.files import read_json, write_json
from flaxcls.runs import run_code
from flaxcls.runs.run_code import PACKAGES
from flaxcls.runtime import sharding
from flaxcls.runtime.output import printable, say

Folder = str | AnyPath
# What may differ between the processes of a run: where the data is and who decodes it.
OWN_FIELDS = ("data.dir", "data.path", "data.fold_groups")
OWN_FIELDS += ("input.threads", "input.processes", "input.read_ahead")
# What a resumed run may change: it changes no number that was computed before.
FREE_FIELDS = (
    *OWN_FIELDS,
    "duration",
    "steps_per_dispatch",
    "log_every",
    "log_to",
    "input",
    "eval.every",
    "eval.batch_size",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.on_error",
    "divergence",
    "hang_after",
    "profile",
    "mesh",
)
# What a run may have left in its folder before it got so far as to write config.json.
LEFTOVERS = (
    "autotuning",
    "broken_images*.log",
    "goodput.json",
    "lease*.json",
    "metrics.jsonl",
    "*.tmp",
    "checkpoints",
    "code",
    "quarantine",
    "tensorboard",
    "trackers.json",
    ".*",
)


def folders(runs: Folder | Sequence[Folder]) -> list[AnyPath]:
    """Where a run, or each of several, is."""
    several = [runs] if isinstance(runs, Folder) else runs
    return [as_path(run, "--run=") for run in several]


def new_folder(recipe: str) -> Path:
    """`runs/NAME-<date-time>` for a recipe's file name."""
    return Path("runs") / f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


class NoRun(ConfigError):
    """There is no run in a folder."""


def load_config(workdir: AnyPath) -> ConfigDict:
    """The config of the run in `workdir`; NoRun if there is none.

    Fields that came to be after the run was made have their defaults. If config.json is missing or
    damaged it is rebuilt from the newest checkpoint, which holds the config as well; without one,
    ConfigError says what is wrong with the file.
    """
    path = workdir / "config.json"
    try:
        content = read_json(path)
        if content is None:
            raise NoRun(f"there is no run in {workdir}: it holds no config.json")
        return _config_in(content, path)
    except ConfigError as error:
        problem = error
    from flaxcls.runs.checkpoint_reader import CheckpointReader  # Orbax takes a second to import

    try:
        step, metadata = CheckpointReader(workdir / "checkpoints").newest_metadata()
        config = _config_in(metadata, workdir / "checkpoints" / str(step))
    except FlaxclsError:
        raise problem from None
    say(f"flaxcls: {printable(str(problem))}; it is restored from step {step}", error=True)
    with contextlib.suppress(OSError):  # who only reads may have no right to write
        write_json(path, {name: fact for name, fact in metadata.items() if name != "progress"})
    return config


def _config_in(content: Mapping[str, Any], path: AnyPath) -> ConfigDict:
    """The config in what config.json or a checkpoint holds; ConfigError if it is none."""
    config = ConfigDict(plain(default()), type_safe=False)
    standard = dict(fields(config))
    try:
        config.update(content["config"])
        now = dict(fields(config))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} holds no config of a run") from error
    for field, value in standard.items():
        kind = object if value is None else type(value)
        if field not in now or not options.fits(now[field], kind):
            what = f"{now[field]!r:.50}" if field in now else "nothing"
            raise ConfigError(f"{path} has {what} as config.{field}")
    return config


def read_summary(workdir: AnyPath) -> dict[str, Any] | None:
    """What summary.json says of a run that has finished; None where it is to be rebuilt."""
    path = workdir / "summary.json"
    try:
        summary = read_json(path)
    except ConfigError as error:
        say(f"flaxcls: {printable(str(error))}; it is rebuilt", error=True)
        return None
    if summary is None or not summary.get("finished"):
        return None
    kinds = {"step": int, "seconds": float, "goodput": dict, "eval": dict, "best": dict}
    if all(options.fits(summary.get(name), kind) for name, kind in kinds.items()):
        metrics = {"accuracy": None, "loss": None, "count": None, **summary["eval"]}
        best = {name: value for name, value in summary["best"].items() if name != "weights"}
        if summary["best"]:
            best = {**dict.fromkeys(("step", "accuracy", "loss", "count")), **best}
        spent = {"seconds": {}, "goodput": None, "restarts": None, **summary["goodput"]}
        seconds = spent.pop("seconds")
        numbers = (*metrics.values(), *best.values(), *spent.values())
        if options.fits(seconds, dict) and all(
            options.fits(value, float) for value in (*numbers, *seconds.values())
        ):
            return summary
    say(f"flaxcls: {printable(path)} is no summary of a run; it is rebuilt", error=True)
    return None


def claim(workdir: AnyPath, config: ConfigDict) -> tuple[ConfigDict | None, dict[str, Any] | None]:
    """Checks that `config` may train in `workdir`, in a new run or the one that is there.

    Returns the config that the run had until now, None for a new one; and what summary.json holds
    if it has finished and nothing longer is asked for.
    """
    try:
        before = load_config(workdir)
    except NoRun:
        _check_free(workdir)
        return None, None
    for field, (old, new) in changes(before, config).items():
        if not _is_among(field, FREE_FIELDS):
            raise ConfigError(
                f"the run in {workdir} has config.{field} = {old!r}, got {new!r}; give another "
                "--workdir to start a new run"
            )
    return before, read_summary(workdir) if before.duration == config.duration else None


def normalization(workdir: AnyPath, fingerprint: str) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that the run in `workdir` has begun with; None if none with these
    data has.

    A streamed split's are estimated, a resident one's are not: a run that changes between them
    keeps its own.
    """
    try:
        content = read_json(workdir / "config.json")
    except ConfigError:
        return None
    if not isinstance(content, dict) or content.get("fingerprint") != fingerprint:
        return None
    mean, std = content.get("mean"), content.get("std")
    return (mean, std) if all(options.fits(v, tuple[float, ...]) for v in (mean, std)) else None


def _check_free(workdir: AnyPath) -> None:
    """ConfigError if a folder without a run has something that is not a run's."""
    if workdir.is_dir():
        names = (path for path in sorted(workdir.iterdir()))
        foreign = [p.name for p in names if not any(p.match(pattern) for pattern in LEFTOVERS)]
        if foreign:
            raise ConfigError(
                f"--workdir={workdir} is not empty and holds no run, but "
                f"{', '.join(map(printable, foreign[:3]))}{' and more' * (len(foreign) > 3)}: "
                "give a new or an empty folder"
            )


def _is_among(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(name + ".") for name in names)


def identity(metadata: Mapping[str, Any], eval_fingerprint: str) -> dict[str, Any]:
    """What must be the same in all processes of a run, by name; JSON. `metadata` has the config."""
    own = run_code.named_by(metadata["config"])
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return {
        **{
            f"config.{field}": value
            for field, value in fields(metadata["config"])
            if not _is_among(field, OWN_FIELDS)
        },
        **{name: fact for name, fact in metadata.items() if name not in ("config", "fingerprint")},
        "the fingerprint of the training data": metadata["fingerprint"],
        "the fingerprint of the evaluation data": eval_fingerprint,
        "the code of flaxcls": code.hexdigest()[:16],
        **({"the code that the config names": [own.digest, own.packages]} if own else {}),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def record(
    workdir: AnyPath, metadata: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> None:
    """Writes config.json: the config, and what else one wants to know of a run years later.

    The user's own code that the config names is copied beside it first. Of a resumed run, whose
    config was `before`, only if that or the code has changed; "changes" keeps how. What
    summary.json told of the end of a shorter run does not hold any more.
    """
    earlier, code = [], run_code.named_by(metadata["config"])
    with _writing(workdir):
        if code and (note := run_code.keep(workdir, code)):
            say(f"note: {note}")
    if before is not None:
        first = read_json(workdir / "config.json") or {}
        changed = changes(before, metadata["config"])
        other_code = run_code.changed(first.get("code"), code)
        if not changed and not other_code:
            return
        if other_code:
            say(f"note: {_another(other_code)}")
        if "data_modified" in first:  # stays as it was when the run began
            metadata = {**metadata, "data_modified": first["data_modified"]}
        earlier = [
            *first.get("changes", []),
            {
                "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                "fields": changed,
                **({"code": first.get("code")} if other_code else {}),
            },
        ]
    content = {
        "config": metadata["config"],
        **surroundings(),
        **metadata,
        **({"code": code.record()} if code else {}),
        **({"changes": earlier} if earlier else {}),
    }
    with _writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "summary.json").unlink(missing_ok=True)
        write_json(workdir / "config.json", content)


@contextlib.contextmanager
def _writing(workdir: AnyPath) -> Iterator[None]:
    """Around writing into a run's folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{workdir} can't be written: {error.strerror or error}") from error


def _another(changed: Sequence[str]) -> str:
    """What is said of own code that has changed since a run began."""
    return (
        f"{', '.join(changed)} {'is' if len(changed) == 1 else 'are'} not as when the run began: "
        "the run resumes with what is there now, and its folder keeps both"
    )


def surroundings() -> dict[str, Any]:
    """The versions, the devices and the commit that a result comes from; JSON."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "device": sharding.device_kind_and_count(),
        "commit": _commit(),
    }


def changed_data(workdir: AnyPath, source: Source) -> Iterator[str]:
    """That training files were written after the run in `workdir` began, if they were.

    The fingerprint does not tell: what a picture shows may change and its size not.
    """
    began = (read_json(workdir / "config.json") or {}).get("data_modified")
    if source.modified and options.fits(began, float) and source.modified[0] > began:
        yield (
            f"files to train on were written after the run began, such as {source.modified[1]}: "
            "if they show something else now, the run resumes with other pictures"
        )


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout without installing
            continue
    return versions


def _commit() -> str | None:
    """The git commit of the code, with "+" if the checkout differs from it; None without git."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
