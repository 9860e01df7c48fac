"""A user's own code in the folder of a run, so that the run stays usable without the recipe.

RUN/code/DIGEST/ holds the modules that a run's config names, and those that they import from beside
them. What was installed is known by its name and version. Nothing in it is executed but for a run
whose config names it.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flaxcls.buckets import AnyPath, BucketPath
from flaxcls.config import user_code
from flaxcls.errors import ConfigError
from flaxcls.remote import is_remote
from flaxcls.runtime.scratch import scratch_folder

FOLDER = "code"
MAX_BYTES = 2**22  # of source in all: more is not written by hand
# Whose versions config.json has in any case.
PACKAGES = ("flaxcls", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Code(NamedTuple):
    """The user's own code that a config names.

    Attributes:
      files: where each module is, by its path from the folder that it is imported from.
      packages: the installed packages that are named or imported, as "einops 0.8.1", by module.
    """

    files: dict[str, Path]
    packages: dict[str, str]

    @property
    def digest(self) -> str:
        """16 hex digits that say which files these are, wherever they lie."""
        content = {name: _sha256(path) for name, path in self.files.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {
            "digest": self.digest,
            "files": {
                name: {"origin": str(path), "sha256": _sha256(path)}
                for name, path in self.files.items()
            },
            "packages": self.packages,
        }


def named_by(config: Mapping[str, Any]) -> Code | None:
    """The code that a config's names stand for, which can be imported; None if there is none."""
    names = user_code.names(config)
    if not names:
        return None
    files, imported = {}, set()
    for field, name in sorted(names.items()):
        module_name = name.partition(":")[0]
        module = user_code.import_module(f"{field} is {name!r}", module_name)
        imported.add(module_name.partition(".")[0])
        file = Path(getattr(module, "__file__", None) or "")
        if file.name and not user_code.is_installed(file.absolute()):
            _collect(module_name, _root(module_name, file), files, imported)
    packages = importlib.metadata.packages_distributions()
    versions = {
        top: f"{packages[top][0]} {importlib.metadata.version(packages[top][0])}"
        for top in sorted(imported & packages.keys())
        if not {f"{top}.py", f"{top}/__init__.py"} & files.keys()
        and packages[top][0] not in PACKAGES
    }
    return Code(dict(sorted(files.items())), versions)


def _root(module_name: str, file: Path) -> Path:
    """The folder from which a module is imported."""
    return file.absolute().parents[module_name.count(".") + (file.name == "__init__.py")]


def _collect(name: str, root: Path, files: dict[str, Path], imported: set[str]) -> None:
    """Adds the files of a module and of what it imports from the same root, as its source says."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):  # a package's __init__.py runs before its modules
        path = root.joinpath(*parts[:length])
        package = path / "__init__.py"
        file = package if package.is_file() else path.with_suffix(".py")
        relative = file.relative_to(root).as_posix()
        if relative in files or not file.is_file():
            continue
        if user_code.is_installed(file) or _is_elsewhere(".".join(parts[:length]), file):
            return  # the name is that of something else, such as flaxcls beside another checkout
        files[relative] = file
        around = parts[: length if file == package else length - 1]
        for other in _imports(file, around):
            imported.add(other.partition(".")[0])
            _collect(other, root, files, imported)


def _is_elsewhere(module_name: str, file: Path) -> bool:
    """Whether a module is imported already, and not from this file."""
    module = sys.modules.get(module_name)
    loaded = Path(getattr(module, "__file__", None) or "")
    return module is not None and loaded.resolve() != file.resolve()


def _imports(file: Path, package: list[str]) -> Iterator[str]:
    """The absolute names of all modules that a file of a package may import, and of some more."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def keep(workdir: AnyPath, code: Code) -> str | None:
    """Copies the files into the run's folder, atomically; a note where it does not."""
    folder = workdir / FOLDER / code.digest
    if not code.files or (folder.is_dir() and not is_remote(folder)):
        return None
    size = sum(path.stat().st_size for path in code.files.values())
    if size > MAX_BYTES:
        return (
            f"the {size / 2**20:.1f} MiB of your own code are not kept in the run's folder, which "
            f"takes {MAX_BYTES / 2**20:.0f} MiB at most: whoever uses the run needs them too"
        )
    if isinstance(folder, BucketPath):
        there = folder.files()  # perhaps not all, of a process that was killed
        folder.upload({name: path for name, path in code.files.items() if name not in there})
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        for name, path in code.files.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return None


def changed(record: Any, code: Code | None) -> list[str]:
    """The files and packages that are not as config.json has recorded them."""
    before = _versions(record)
    now = _versions(code.record() if code else None)
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _versions(record: Any) -> dict[str, str]:
    """What tells one version of each file and package from another."""
    try:
        files = {name: file["sha256"] for name, file in record["files"].items()}
        return {**files, **record["packages"]}
    except (TypeError, KeyError, AttributeError):  # written before there was one, or by hand
        return {}


def use(workdir: AnyPath, config: Mapping[str, Any]) -> None:
    """The modules that a run's config names are from now on found in its folder, before elsewhere.

    Raises ConfigError where a module of the name is imported already and is another, or where what
    the config names is neither in the folder nor to be found elsewhere.
    """
    names = user_code.names(config)
    if not names:
        return
    folder, record = _kept(workdir)
    if folder:
        for path in folder.rglob("*.py"):
            _check_imported(path, path.relative_to(folder))
        user_code.search(folder)
    packages = record.get("packages") or {}
    for field, name in names.items():
        top = name.partition(":")[0].partition(".")[0]
        if not _exists(top):
            needs = f"{field} of the run in {workdir} is {name!r}, but "
            if top in packages:
                raise ConfigError(f"{needs}{packages[top]} is not installed")
            raise ConfigError(
                f"{needs}{workdir / FOLDER} holds no module {top}{_origin(record, top)}"
            )


def fall_back(workdir: AnyPath) -> None:
    """A run that is resumed without what was beside its recipe finds it in its folder, last."""
    config = _read(workdir / "config.json").get("config")
    folder, _ = _kept(workdir)
    if folder and isinstance(config, dict) and user_code.names(config):
        entry = str(folder.resolve())
        if entry not in sys.path:
            sys.path.append(entry)


def _kept(workdir: AnyPath) -> tuple[Path | None, dict[str, Any]]:
    """The folder of the run's newest code, if it has one, and what config.json says of it."""
    record = _read(workdir / "config.json").get("code")
    record = record if isinstance(record, dict) else {}
    folder = workdir / FOLDER / str(record.get("digest"))
    if folder.is_dir():
        return _here(folder), record
    folders = [path for path in (workdir / FOLDER).glob("[!.]*") if path.is_dir()]
    newest = max(folders, key=_written, default=None)
    return newest and _here(newest), record


def _written(folder: AnyPath) -> float:
    """When it was written, in seconds since 1970; of a bucket, in which folders have no time."""
    if isinstance(folder, BucketPath):
        return max(status.st_mtime for status in folder.files().values())
    return folder.stat().st_mtime


def _here(folder: AnyPath) -> Path:
    """The folder, or a copy of one in a bucket: Python imports files. It goes with the process."""
    return _copied(folder) if isinstance(folder, BucketPath) else folder


@functools.cache
def _copied(folder: BucketPath) -> Path:
    copy = scratch_folder()
    folder.download({name: copy / name for name in folder.files()})
    return copy


def _read(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none, which is told elsewhere."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    return {}


def _check_imported(kept: Path, name: Path) -> None:
    parts = name.parent.parts if name.name == "__init__.py" else name.with_suffix("").parts
    module = sys.modules.get(".".join(parts))
    if module is None:
        return
    file = getattr(module, "__file__", None)
    with contextlib.suppress(OSError):
        if file and Path(file).read_bytes() == kept.read_bytes():
            return
    raise ConfigError(
        f"the module {'.'.join(parts)} is imported already, from {file}, and is another than the "
        f"run's in {kept}: use the run in a process of its own"
    )


def _exists(top: str) -> bool:
    try:
        return top in sys.modules or importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False


def _origin(record: Mapping[str, Any], top: str) -> str:
    """Where a module was when the run was made."""
    files = record.get("files") or {}
    for name in (f"{top}.py", f"{top}/__init__.py"):
        if name in files:
            return f"; it was {files[name]['origin']}"
    return ""
