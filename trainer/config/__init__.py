"""What `train.toml` and `evaluate.toml` may say. Imports neither torch nor Ray."""
