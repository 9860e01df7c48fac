"""How fast it is: the step, the input, the augmentations."""
