"""What attacks and corruptions did to a run: robustness.jsonl in its folder, a row each."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def keep(workdir: Path, row: Mapping[str, Any]) -> None:
    """Adds a row; who may not write into the folder does without."""
    with contextlib.suppress(OSError), (workdir / "robustness.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(workdir: Path) -> list[dict[str, Any]]:
    """The rows, in the order in which they were added, as far as they can be read."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (workdir / "robustness.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
