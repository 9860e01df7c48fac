"""Trains image classifiers with JAX and Flax. `python -m flaxcls.main --help` is the way in."""
