"""What `make demo` runs: a CT phantom with known truth, and the main job on it."""
