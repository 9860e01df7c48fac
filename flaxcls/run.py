"""The folder of a run: whose it is, what made it and how it ended.

config.json      the resolved config; versions, device, commit and sizes beside it
metrics.jsonl    a row a log step and an evaluation; tensorboard/ shows the same
checkpoints/     the newest steps and the best one
summary.json     how it ended
"""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from flaxcls.config import default
from flaxcls.errors import ConfigError
from flaxcls.output import printable

# What may differ between the processes of a run: where the data lies and who decodes it.
OWN_FIELDS = ("data.dir", "data.path", "input.threads", "input.processes", "input.read_ahead")
# What a resumed run may change: it changes no number that was computed before.
FREE_FIELDS = (
    *OWN_FIELDS,
    "duration",
    "log_every",
    "input",
    "eval.every",
    "eval.batch_size",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.on_error",
    "divergence",
    "hang_after",
    "mesh",
)
# What a run may have left in its folder before it got so far as to write config.json.
LEFTOVERS = (
    "broken_images*.log",
    "goodput.json",
    "metrics.jsonl",
    "*.tmp",
    "checkpoints",
    "quarantine",
    "tensorboard",
    ".*",
)
PACKAGES = ("flaxcls", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def new_folder(recipe: str) -> Path:
    """`runs/NAME-<date-time>` for a recipe's file name."""
    return Path("runs") / f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file, None if there is none; ConfigError if it can't be read."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not readable as JSON: {error}") from error


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON has it: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def load_config(workdir: Path) -> ConfigDict:
    """The config of the run in `workdir`; ConfigError if there is no run.

    Fields that came to be after the run was made have their defaults.
    """
    content = read_json(workdir / "config.json")
    if content is None:
        raise ConfigError(f"there is no run in {workdir}: it holds no config.json")
    config = ConfigDict(plain(default()), type_safe=False)
    config.update(content["config"])
    return config


def claim(workdir: Path, config: ConfigDict) -> tuple[ConfigDict | None, dict[str, Any] | None]:
    """Checks that `config` may train in `workdir`, in a new run or the one that is there.

    Returns the config that the run had until now, None for a new one; and what summary.json holds
    if it has finished and nothing longer is asked for.
    """
    if not (workdir / "config.json").exists():
        _check_free(workdir)
        return None, None
    before = load_config(workdir)
    for field, (old, new) in changes(before, config).items():
        if not _is_among(field, FREE_FIELDS):
            raise ConfigError(
                f"the run in {workdir} has config.{field} = {old!r}, got {new!r}; give another "
                "--workdir to start a new run"
            )
    summary = read_json(workdir / "summary.json")
    if not summary or not summary["finished"] or before.duration != config.duration:
        summary = None
    return before, summary


def changes(before: ConfigDict, now: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """The fields that differ between two configs, with both values."""
    before, now = (dict(fields(ConfigDict(plain(config)))) for config in (before, now))
    return {
        field: (before.get(field), now.get(field))
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    }


def _check_free(workdir: Path) -> None:
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
    elif workdir.exists():
        raise ConfigError(f"--workdir={workdir} is a file; it must be a folder")


def fields(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The paths and values of all fields: ("model.name", "dense"), ..."""
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _is_among(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(name + ".") for name in names)


def identity(config: ConfigDict, facts: Mapping[str, Any], eval_fingerprint: str) -> dict[str, Any]:
    """What must be the same in all processes of a run, by name; JSON."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    return {
        **{
            f"config.{field}": value
            for field, value in fields(ConfigDict(plain(config)))
            if not _is_among(field, OWN_FIELDS)
        },
        **{name: fact for name, fact in facts.items() if name not in ("config", "fingerprint")},
        "the fingerprint of the training data": facts["fingerprint"],
        "the fingerprint of the evaluation data": eval_fingerprint,
        "the code of flaxcls": code.hexdigest()[:16],
        "versions": {"python": platform.python_version(), **_versions()},
    }


def record(
    workdir: Path, config: ConfigDict, facts: Mapping[str, Any], before: ConfigDict | None = None
) -> None:
    """Writes config.json: the config, and what else one wants to know of a run years later.

    Of a resumed run, whose config was `before`, only if that has changed; "changes" keeps how.
    """
    earlier = []
    if before is not None:
        if not (changed := changes(before, config)):
            return
        earlier = (read_json(workdir / "config.json") or {}).get("changes", [])
        earlier = [*earlier, {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "fields": changed}]
    content = {
        "config": plain(config),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "commit": _commit(),
        **facts,
        **({"changes": earlier} if earlier else {}),
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", content)
    except OSError as error:
        raise ConfigError(f"{workdir} can't be written: {error.strerror or error}") from error


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
