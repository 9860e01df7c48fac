"""What a run was and what came of it, as one page for a browser."""
