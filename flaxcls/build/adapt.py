"""What a recipe leaves open: options that nothing takes any more, and what data and devices say."""

import re
from pathlib import Path

from flaxcls.build import accepted
from flaxcls.config.recipes import Recipe, in_recipe
from flaxcls.errors import ConfigError


def adapt(recipe: Recipe) -> str:
    """Completes the recipe's config in place; returns what is to be said about it, or "".

    Options that the thing which the command line names does not take are dropped, and a recipe's
    own `adapt` fills in the rest. It is called last, as it may use devices.
    """
    lines = [*accepted.drop_unused(recipe.config, recipe.given)]
    try:
        accepted.check(recipe.config)
    except accepted.UnusedOption as error:
        if recipe.path is None or error.field in recipe.given:
            raise
        raise ConfigError(f"{recipe.path}{_line_of(error.field, recipe.path)}: {error}") from error
    if recipe.adapt:
        with in_recipe(recipe.path):
            lines.append(recipe.adapt(recipe.config))
    return "\n".join(lines)


def _line_of(field: str, path: Path) -> str:
    """Where a recipe sets a field, to be put behind its path; "" if that can't be told."""
    lines = path.read_text().splitlines()
    found = (n for n, line in enumerate(lines, 1) if re.search(rf"\.{re.escape(field)}\b", line))
    return next((f", line {number}" for number in found), "")
