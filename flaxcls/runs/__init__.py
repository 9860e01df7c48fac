"""A run's folder: layout, checkpoints, metrics, and where its seconds went."""
