"""What a network has learned: how good its answers are, and how sure one can be of them."""
