"""Importing changes nothing in the process; commands do, by functions that they call."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = """
import ast, contextlib, importlib, json, logging, os, pkgutil, signal, sys, threading, warnings
from pathlib import Path
import flaxcls

def used_by(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)

def state():
    import cv2, jax
    from PIL import Image
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}")
    return {
        **{f"logger {each.name}": (each.level, each.filters[:], each.handlers[:])
           for each in loggers if each.filters or each.handlers or each.level},
        **{f"signal {n}": signal.getsignal(n) for n in signal.valid_signals()},
        **{f"descriptor {name}": path for name, path in descriptors.items() if "fd" not in path},
        **{f"jax {name}": value for name, value in jax.config.values.items()},
        "warnings": warnings.filters[:],
        "showwarning": warnings.showwarning,
        "environment": dict(os.environ),
        "hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "threads": threading.enumerate(),
        "OpenCV": cv2.getNumThreads(),
        "Pillow": Image.MAX_IMAGE_PIXELS,
    }

modules = [each.name for each in pkgutil.walk_packages(flaxcls.__path__, "flaxcls.")]
for path in Path(flaxcls.__file__).parent.rglob("*.py"):
    for name in used_by(path):
        if not name.startswith("flaxcls"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
before = state()
for name in modules:
    importlib.import_module(name)
after = state()
assert len(modules) > 50
changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
print(json.dumps(changed))
"""


def test_importing_every_module_changes_nothing_in_the_process():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stdout + result.stderr
