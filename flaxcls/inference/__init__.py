"""What a saved run is used for: evaluation and prediction."""
