"""The config: its default tree, typed options, recipes and durations."""

from flaxcls.config.tree import default as default
