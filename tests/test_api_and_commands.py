"""What commands can do Python can do, under the same names, and by one name each."""

import ast
import importlib
import inspect
import pickle
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType

import cloudpickle
import pytest

import flaxcls
from flaxcls import cli

# What each command is in Python, which some divide between two functions.
FUNCTIONS = {
    "train": ("train",),
    "evaluate": ("evaluate",),
    "calibrate": ("calibrate",),
    "predict": ("load",),
    "explain": ("explain",),
    "search": ("search",),
    "export": ("export",),
    "report": ("write_report",),
    "attack": ("attack", "corrupt"),
    "average": ("average",),
    "crossval": ("cross_validate",),
    "sweep": ("sweep_recipe",),
    "audit": ("audit",),
}
WITHOUT = {"data", "data check", "data prepare", "data preview", "bench", "plan"}
# Flags that are no arguments, each with what does the same.
ELSEWHERE = {
    "attack": {"corruptions": "the function `corrupt`"},
    "explain": {"class": "class_name, as Python has the word for itself", "out": "draw()"},
    "predict": {
        "topk": "Prediction.probabilities has all, in order",
        "format": "is of the text",
        "features": "load(run)(images).features",
    },
    "train": {
        "list": "prints text",
        "report": "write_report",
        "coordinator_address": "jax.distributed.initialize, as the next four",
        **dict.fromkeys(("num_processes", "process_id"), ""),
        **dict.fromkeys(("join_timeout", "heartbeat_timeout"), ""),
    },
}
DOORWAYS = [name for name in flaxcls.__all__ if f"flaxcls.{name}" in cli.COMMANDS.values()]


def test_every_command_is_a_function_or_said_to_be_none():
    assert {*FUNCTIONS} | WITHOUT == {*cli.COMMANDS}
    assert {name for names in FUNCTIONS.values() for name in names} <= {*flaxcls.__all__}


@pytest.mark.parametrize("command", FUNCTIONS)
def test_flags_of_a_command_are_arguments_with_the_same_defaults(command):
    """The first argument is what --run or --config names, by whatever name."""
    flags = importlib.import_module(cli.COMMANDS[command]).FLAGS
    for function in FUNCTIONS[command]:
        first, *_ = inspect.signature(getattr(flaxcls, function)).parameters
        assert first in ("run", "runs", "study", "config", "recipe")
    signatures = [inspect.signature(getattr(flaxcls, name)) for name in FUNCTIONS[command]]
    parameters = {name: each for s in signatures for name, each in s.parameters.items()}
    names = {*flags} - {"run", "config"}
    elsewhere = ELSEWHERE.get(command, {}).keys()
    assert elsewhere <= names and names - parameters.keys() == elsewhere
    for name in names - elsewhere:
        default = parameters[name].default
        if default is not inspect.Parameter.empty:
            assert (default or None) == (flags[name].default or None), name


@pytest.mark.parametrize("name", DOORWAYS)
def test_name_is_the_function_also_after_the_command_was_imported(name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"flaxcls.{name}", raising=False)
    module = importlib.import_module(f"flaxcls.{name}")
    assert isinstance(module, ModuleType) and callable(module.main)
    assert inspect.isfunction(getattr(flaxcls, name))


def test_other_modules_are_attributes_of_the_package_as_ever():
    assert len(DOORWAYS) == 8
    for module in pkgutil.iter_modules(flaxcls.__path__):
        if module.name not in (*DOORWAYS, "__main__"):
            found = importlib.import_module(f"flaxcls.{module.name}")
            assert getattr(flaxcls, module.name) is found


def test_package_is_pickled_by_its_name():
    """As modules are by cloudpickle, with a user's function that uses flaxcls."""
    function = eval("lambda: flaxcls", {"flaxcls": flaxcls})
    assert pickle.loads(cloudpickle.dumps(function))() is flaxcls


def test_page_has_a_line_for_every_function():
    page = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    lines = re.findall(r"^\| `(\w+)\((.*?)\)` \| .{20,} \| (?:`(.*?)` )?\|$", page, re.MULTILINE)
    functions = [name for name in flaxcls.__all__ if inspect.isfunction(getattr(flaxcls, name))]
    assert sorted(name for name, _, _ in lines) == functions
    for name, arguments, command in lines:
        given = [text.partition("=")[0] for text in arguments.split(", ") if text]
        assert {*given} <= inspect.signature(getattr(flaxcls, name)).parameters.keys()
        assert not command or name in FUNCTIONS[command.split()[0]]
    others = {*flaxcls.__all__} - {*functions}
    assert all(f"`{name}`" in page for name in others)


def test_type_checkers_are_told_where_everything_is():
    tree = ast.parse(Path(flaxcls.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.asname: node.module for node in block.body for alias in node.names}
    assert sorted(told) == [*flaxcls.__all__]
    for name, module in told.items():
        found = getattr(flaxcls, name)
        assert found is getattr(importlib.import_module(module), name) and found.__doc__
        assert found.__module__ == module
