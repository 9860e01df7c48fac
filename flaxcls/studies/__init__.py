"""Studies of many runs: cross-validation and sweeps."""
