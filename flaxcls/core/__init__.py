"""The mathematics of training: pure functions, no I/O, no devices."""
