"""A recipe's config, completed for the run that it is to train."""

import contextlib

from ml_collections import ConfigDict

from flaxcls.buckets import AnyPath
from flaxcls.build.adapt import adapt
from flaxcls.config.fields import changes, fields, plain, update
from flaxcls.config.recipes import Recipe
from flaxcls.runs import run_folder
from flaxcls.runtime import processes


def completed(recipe: Recipe, workdir: AnyPath | None) -> ConfigDict:
    """The recipe's config with what it leaves to data and devices, as process 0 sees them.

    A run that is resumed keeps what it chose at first: today the devices may be faster.
    """
    before, chosen = plain(recipe.config), None
    if recipe.adapt and workdir is not None:
        with contextlib.suppress(run_folder.NoRun):
            chosen = run_folder.load_config(workdir)
    if chosen:
        kept = {name: value for name, value in fields(chosen) if name not in recipe.given}
        update(recipe.config, kept)
    said = "" if chosen else adapt(recipe)
    changed = {name: now for name, (_, now) in changes(before, recipe.config).items()}
    said, changed = processes.from_first([said, changed])
    if not processes.is_first():
        update(recipe.config, changed)
    if said:
        processes.say(said)
    return recipe.config
