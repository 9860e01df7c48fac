"""The commands of `python -m flaxcls.data`."""
