"""Files that are written atomically, and JSON or CSV in them."""

import contextlib
import csv
import io
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from flaxcls.errors import ConfigError


@contextlib.contextmanager
def atomic_write(
    path: Path, mode: str = "wb", *, fsync: bool = False, shared: bool = False
) -> Iterator[IO]:
    """Opens a temporary file, NAME.tmp, which replaces `path` when the block ends.

    If the block or writing raises, `path` is as it was and the temporary is removed; a process that
    is killed leaves the temporary, and the next one writes over it.

    Args:
      path: the file to write; its folder exists.
      mode: as `open` takes it, to write.
      fsync: whether the content is on the disk, safe from a power cut, before it replaces `path`.
      shared: whether several processes may write `path` at the same time: each has a temporary with
        a name of its own, and the last one wins.

    Raises:
      OSError: it can't be written.
    """
    suffix = f".{secrets.token_hex(8)}.tmp" if shared else ".tmp"
    temporary = path.with_name(path.name + suffix)
    try:
        with temporary.open(mode) as file:
            yield file
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any, *, fsync: bool = False) -> None:
    """Writes a JSON file atomically; see `atomic_write`."""
    text = json.dumps(content, indent=2) + "\n"
    with atomic_write(path, "w", fsync=fsync) as file:
        file.write(text)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table in UTF-8, atomically; file names that are in no encoding keep their bytes."""
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
        text.flush()
        text.detach()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no file.

    Raises ConfigError, with the file's name, for whatever else is there.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{path} is not readable as JSON: {why}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__} instead of an object of JSON")
    return content
