"""A run under way: the compiled functions, and what each step may lead to."""
