"""A recipe's config, completed for the run that it is to train."""

import contextlib
from pathlib import Path

from ml_collections import ConfigDict

from flaxcls.build.adapt import adapt
from flaxcls.config.fields import fields, update
from flaxcls.config.recipes import Recipe
from flaxcls.runs import run_folder
from flaxcls.runtime import processes


def completed(recipe: Recipe, workdir: Path | None) -> ConfigDict:
    """The recipe's config with what it leaves to data and devices, as process 0 sees them.

    A run that is resumed keeps what it chose at first: today the devices may be faster.
    """
    chosen = None
    if recipe.adapt and workdir is not None:
        with contextlib.suppress(run_folder.NoRun):
            chosen = run_folder.load_config(workdir)
    if chosen:
        kept = {name: value for name, value in fields(chosen) if name not in recipe.given}
        update(recipe.config, kept)
    said = "" if chosen else adapt(recipe)
    said, config = processes.from_first([said, dict(fields(recipe.config))])
    if not processes.is_first():
        update(recipe.config, config)
    if said:
        processes.say(said)
    return recipe.config
