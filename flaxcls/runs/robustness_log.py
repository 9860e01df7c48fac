"""What attacks and corruptions did to a run: robustness.jsonl in its folder, a row each."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from flaxcls.buckets import AnyPath
from flaxcls.files import append_line


def keep(workdir: AnyPath, row: Mapping[str, Any]) -> None:
    """Adds a row; who may not write into the folder does without."""
    with contextlib.suppress(OSError):
        append_line(workdir / "robustness.jsonl", json.dumps(row))


def read(workdir: AnyPath) -> list[dict[str, Any]]:
    """The rows, in the order in which they were added, as far as they can be read."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (workdir / "robustness.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
