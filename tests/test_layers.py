"""The floors of flaxcls: an import goes down, never up or across."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "flaxcls"

# From the roof to the ground. A floor is one or more rooms, which don't know each other.
FLOORS = (
    (
        "__main__",
        "main",
        "evaluate",
        "calibrate",
        "predict",
        "explain",
        "search",
        "export",
        "attack",
        "average",
        "bench",
        "plan",
        "crossval",
        "sweep",
        "audit",
        "data.__main__",
        "data.commands",
        "report.__main__",
        "api",
    ),
    ("cli",),
    ("studies",),
    ("report",),
    ("perf",),
    ("insight",),
    ("training",),
    ("inference",),
    ("weights",),
    ("runs",),
    ("build",),
    ("core",),
    ("models", "augment", "data"),
    ("config",),
    ("runtime",),
    ("files",),
    ("buckets",),
    ("remote",),
    ("errors",),
)


def modules():
    """Module -> file: "core.step", "data" of data/__init__.py; "" is the package itself."""
    files = sorted(ROOT.rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files)
    return {
        name.removesuffix("__init__").rstrip("."): f for name, f in zip(names, files, strict=True)
    }


MODULES = modules()


def imported(path):
    """The modules of flaxcls that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("flaxcls"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            if node.module.partition(".")[0] == "flaxcls":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    is_module = full.removeprefix("flaxcls.") in MODULES
                    yield full if is_module else node.module


def place(module):
    """The number of a module's floor, from the roof, and its room."""
    rooms = [(number, room) for number, floor in enumerate(FLOORS) for room in floor]
    found = [(n, room) for n, room in rooms if module == room or module.startswith(room + ".")]
    assert found, f"flaxcls.{module} is on no floor"
    return max(found, key=lambda place: len(place[1]))


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_down(module):
    floor, room = place(module)
    for name in imported(MODULES[module]):
        below, other = place(name.removeprefix("flaxcls").lstrip("."))
        assert other == room or below > floor, f"flaxcls.{module} imports {name}, which is above"


def test_every_room_is_there():
    known = {place(module)[1] for module in MODULES if module}
    assert known == {room for floor in FLOORS for room in floor}


def test_only_the_runtime_asks_which_platform_it_is_on():
    for module, path in MODULES.items():
        if not module.startswith("runtime."):
            for name in ("default_backend", "jax.local_devices", "jax.device_count"):
                assert name not in path.read_text(), f"flaxcls.{module} asks {name}"
