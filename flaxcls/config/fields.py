"""Configs as flat tables of fields, to compare, check and store them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict


def plain(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON has it: tuples are lists."""
    return json.loads(json.dumps(config, default=ConfigDict.to_dict))


def fields(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The paths and values of all fields: ("model.name", "dense"), ..."""
    for name, value in section.items():
        if isinstance(value, (ConfigDict, dict)):
            yield from fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def update(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets fields by their paths, also those of the sections that take any."""
    for path, value in values.items():
        *sections, name = path.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value


def options_of(section: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """The fields of a section of OPEN that are set, as keyword arguments of what it names."""
    return {
        key: value
        for key, value in section.items()
        if value is not None and key not in ("name", *without)
    }


def changes(
    before: ConfigDict | Mapping[str, Any], now: ConfigDict | Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The fields that differ between two configs, with both values; an absent option is None."""
    before, now = (dict(fields(plain(config))) for config in (before, now))
    return {
        field: (before.get(field), now.get(field))
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    }
