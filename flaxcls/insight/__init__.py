"""What a trained network knows, and what it tells of its data."""
