"""What a recipe leaves open: options that nothing takes any more, and what data and devices say."""

from flaxcls.build import accepted
from flaxcls.config.recipes import Recipe, in_recipe


def adapt(recipe: Recipe) -> str:
    """Completes the recipe's config in place; returns what is to be said about it, or "".

    Options that the thing which the command line names does not take are dropped, and a recipe's
    own `adapt` fills in the rest. It is called last, as it may use devices.
    """
    lines = [*accepted.drop_unused(recipe.config, recipe.given)]
    if recipe.adapt:
        accepted.check(recipe.config)  # before something is said about them
        with in_recipe(recipe.path):
            lines.append(recipe.adapt(recipe.config))
    return "\n".join(lines)
