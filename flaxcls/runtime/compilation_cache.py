"""Compiled programs are kept between processes, so that a restart does not compile them again."""

import contextlib
import functools
import glob
import hashlib
import os
import platform
import re
import stat
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax import monitoring
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from flaxcls.runtime.output import printable, say

MAX_BYTES = 2 * 2**30  # digits_cnn has half a megabyte, a large network on a GPU some hundred
TIME_SAVED = "/jax/compilation_cache/compile_time_saved_sec"
JAX_WARNING = r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)"
# What XLA:CPU compiles for: a program may use any instruction that the machine has.
CPU_LINES = r"^(?:vendor_id|cpu family|model|flags|CPU implementer|CPU part|Features|isa)\s*:.*$"


def enable() -> None:
    """Turns JAX's persistent compilation cache on, in a private folder of this user.

    To be called before the first compilation; a second call does nothing. Who has set
    JAX_COMPILATION_CACHE_DIR, or JAX_ENABLE_COMPILATION_CACHE=false, is left alone. Where there
    can't be such a folder one sentence says so on standard error. JAX itself continues without
    entries that it can't read or write; one sentence replaces its warning about each.
    """
    _seconds_saved()
    _warn_once()
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    try:
        folder = _private_folder("flaxcls", "compiled", _machine())
        _tidy(folder)
    except (OSError, RuntimeError) as error:
        strerror, filename = getattr(error, "strerror", None), getattr(error, "filename", None)
        reason = f"{filename}: {strerror}" if strerror else error
        say(f"flaxcls: compiled programs are not kept: {reason}", error=True)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX keeps only what took a second to compile. Of the 41 programs of digits_cnn these are two,
    # with two thirds of the time; reading one back takes less than compiling the smallest.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """While it lasts all that is needed is compiled, and nothing kept.

    For what measures that, and for programs of devices that aren't there: JAX keeps these, but
    can't read them back (jax 0.10.2).
    """
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()


def saved_seconds() -> float:
    """At least how much compile time the cache has saved this process since `enable`.

    JAX notes the whole seconds that a program took, so that one of 1.9 s counts as 1.
    """
    return max(0.0, sum(_seconds_saved()))


def hits() -> int:
    """How many programs were read from the cache since this was called first, or `enable`."""
    return len(_seconds_saved())


@functools.cache
def _seconds_saved() -> list[float]:
    """The time saved by each program read from the cache; listens from the first call on."""
    saved = []

    def listen(event: str, seconds: float, **details: str | int) -> None:
        if event == TIME_SAVED:
            saved.append(seconds)

    monitoring.register_event_duration_secs_listener(listen)
    return saved


@functools.cache
def _warn_once() -> None:
    """From the first call on, JAX's warnings about entries become a sentence for each kind."""
    original = warnings.showwarning

    def show_other(message, category, *details, **options):
        trouble = re.match(JAX_WARNING, str(message), re.DOTALL)
        if trouble:
            _warn(*trouble.groups())
        else:
            original(message, category, *details, **options)

    warnings.showwarning = show_other


@functools.cache
def _warned() -> set[str]:
    """What has been warned of: "reading" or "writing" entries fails."""
    return set()


def _warn(doing: str, program: str, reason: str) -> None:
    """Says once that JAX can't read or write entries, and removes one that it can't read.

    JAX never writes over an entry: a damaged one would be compiled at every start.
    """
    folder = Path(jax.config.jax_compilation_cache_dir or "")
    what = f"compiled programs can't be kept in {folder}"
    if doing == "reading":
        what = f"some of the compiled programs in {folder} can't be read: they are compiled again"
        try:
            for path in folder.glob(f"{glob.escape(program)}-*-cache"):
                path.unlink(missing_ok=True)
            what += " and replaced"
        except OSError as error:
            what += f" at every start, as they can't be replaced: {error.strerror}"
    if doing not in _warned():
        _warned().add(doing)
        say(f"flaxcls: {printable(what)} ({printable(reason)[:200]})", error=True)


def _machine() -> str:
    """A name for machines that can run each other's programs; unlike ones may share a home."""
    try:
        cpu = sorted(set(re.findall(CPU_LINES, Path("/proc/cpuinfo").read_text(), re.MULTILINE)))
    except OSError:
        cpu = [platform.processor()]
    digest = hashlib.sha256("\n".join(cpu).encode()).hexdigest()[:16]
    return f"{platform.system()}-{platform.machine()}-{digest}".lower()


def _private_folder(*names: str) -> Path:
    """Makes folders in the user's cache that no one else can write to: they hold code that is run.

    Raises OSError, also if somebody else could, and RuntimeError if the user has no home.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # In a sticky folder, as those for temporary files are, no one can replace what others have.
    if not folder.stat().st_mode & stat.S_ISVTX:
        _check_private(folder)
    for name in names:
        folder /= name
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_private(folder)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} can't be written")
    return folder


def _check_private(folder: Path) -> None:
    """PermissionError if another user could put something into a folder, or put another there."""
    if not hasattr(os, "getuid"):  # Windows: a user's profile is private
        return
    link, info = folder.lstat(), folder.stat()  # who owns a link says where it leads to
    if not {link.st_uid, info.st_uid} <= {os.getuid(), 0}:
        raise PermissionError(f"{folder} belongs to another user")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to {folder}, which `chmod go-w` would end")


def _tidy(folder: Path) -> None:
    """Removes what can't be read, and the entries used longest ago while there are too many bytes.

    JAX's own limit needs the package filelock and waits for others at each entry. A process that is
    killed, or a full disk, leaves an entry cut short, which JAX would find broken at every start
    and never replace. One that has been found intact is made read-only and not checked again.
    """
    entries = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process tidies as well
            info = path.stat()
            if info.st_mode & stat.S_IWUSR:
                if not _is_intact(path.read_bytes()):
                    path.unlink()
                    continue
                path.chmod(stat.S_IRUSR)
            entries.append((max(info.st_atime, info.st_mtime), info.st_size, path))
    excess = sum(size for _, size, _ in entries) - MAX_BYTES
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size


def _is_intact(entry: bytes) -> bool:
    try:
        zlib.decompress(entry)
    except zlib.error:
        return entry.startswith(b"\x28\xb5\x2f\xfd")  # Zstandard, JAX's choice where it is at hand
    return True
